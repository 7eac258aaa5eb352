"""Take the body of a request apart: into image sources, and the options that a JSON body carries beside them."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Any

from carso.complaints import shown
from carso.errors import (
    EmptyBatch,
    MissingImages,
    TooManyImages,
    UnsupportedMediaType,
)
from carso.images import base64_text, encoded, json_values, multipart, npy
from carso.images.media_types import IMAGE_ALIASES, IMAGE_TYPES, JSON, MEDIA_TYPES, MULTIPART, NPY, UNSAID
from carso.images.numbers import Source

_RAW = frozenset((*IMAGE_TYPES, *IMAGE_ALIASES))
_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Body:
    """A body that was taken apart."""

    sources: list[Source]
    options: dict[str, Any] = field(default_factory=dict)  # unchecked


def parse(content_type: str, data: bytes, *, max_images: int, max_values: int) -> Body:
    """Take a body apart without decoding any image. At most `max_images` are allowed, and `max_values` in JSON.

    If the Content-Type is one that clients send when they were told nothing, or if there is none, the bytes decide.
    Raises UnsupportedMediaType, MissingImages, EmptyBatch, TooManyImages, and the errors of base64_text.decoded,
    json_values.parse, npy.parse and multipart.parse.
    """
    said = content_type.partition(";")[0].strip().lower()
    media_type = _by_bytes(data) if said in UNSAID else said
    if media_type in _RAW:
        return Body([data])
    if media_type == JSON:
        return _json(data, max_images=max_images, max_values=max_values)
    if media_type == NPY:
        return Body([npy.parse(data)])
    if media_type == MULTIPART:
        return Body(list(multipart.parse(content_type, data, max_files=max_images)))
    raise UnsupportedMediaType(
        f"Content-Type {shown(said)} is not supported{', and the bytes do not tell what they are' * (said in UNSAID)}: "
        f"send one of {', '.join(MEDIA_TYPES)}"
        if said
        else "the request has no Content-Type, and the bytes do not tell what they are: send one of "
        f"{', '.join(MEDIA_TYPES)}"
    )


def _by_bytes(data: bytes) -> str:
    """Return the media type that the first bytes of a body tell, or nothing."""
    if encoded.recognised(data):
        return IMAGE_TYPES[0]  # which of them does not matter
    if data.startswith(npy.SIGNATURE):
        return NPY
    return JSON if data.startswith((b"{", b"[", *_BOMS)) or data[:64].replace(b"\0", b"").lstrip()[:1] == b"{" else ""


def _json(data: bytes, *, max_images: int, max_values: int) -> Body:
    content = json_values.parse(data, max_values=max_values)
    if not isinstance(content, dict) or not isinstance(images := content.pop("images", None), list):
        raise MissingImages(
            'the body must be an object with a list "images", of nested numbers or base64 strings: {"images": [...]}'
        )
    if not images:
        raise EmptyBatch("images is empty: send at least one")
    if len(images) > max_images:
        raise TooManyImages(f"images holds {len(images)}, at most {max_images} are allowed: send several requests")
    sources = [base64_text.decoded(entry, i) if isinstance(entry, str) else entry for i, entry in enumerate(images)]
    return Body(sources, content)
