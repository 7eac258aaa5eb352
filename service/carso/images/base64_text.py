"""Decode text that holds an encoded image: base64 as all kinds of programs write it."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from carso.complaints import shown
from carso.errors import UndecodableBase64

_DATA_URL = re.compile(r"\Adata:[^,]{0,1000};base64,", re.IGNORECASE)
_SPACES = str.maketrans("", "", " \t\r\n")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decoded(text: str, index: int) -> bytes:
    """Return the bytes of image `index`. Raises UndecodableBase64.

    The text may be the data URL of an image, have line breaks, be of the URL-safe alphabet, and lack its padding.
    """
    text = text.translate(_SPACES)
    start = _DATA_URL.match(text)
    digits = text[start.end() :] if start else text
    try:
        ascii_digits = unquote_to_bytes(digits) if start and "%" in digits else digits.encode("ascii")
        ascii_digits = ascii_digits.translate(_URL_SAFE).rstrip(b"=")
        return base64.b64decode(ascii_digits + b"=" * (-len(ascii_digits) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise UndecodableBase64(
            f"image {index}, {shown(text)}, is not base64 of an encoded image ({e}): encode the whole file"
        ) from None
