"""Take the body of a request apart: into image sources, and the options that a JSON body carries beside them."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Any

from carso.complaints import shown
from carso.errors import (
    EmptyBatch,
    MissingImages,
    TooManyImages,
    UndecodableBase64,
    UnsupportedMediaType,
)
from carso.images import json_values, multipart, npy
from carso.images.media_types import IMAGE_ALIASES, IMAGE_TYPES, JSON, MEDIA_TYPES, MULTIPART, NPY
from carso.images.numbers import Source

_RAW = frozenset((*IMAGE_TYPES, *IMAGE_ALIASES))
_DATA_URL = re.compile(r"\Adata:[^,]{0,100};base64,")


@dataclass(frozen=True)
class Body:
    """A body that was taken apart."""

    sources: list[Source]
    options: dict[str, Any] = field(default_factory=dict)  # unchecked


def parse(content_type: str, data: bytes, *, max_images: int, max_values: int) -> Body:
    """Take a body apart without decoding any image. At most `max_images` are allowed, and `max_values` in JSON.

    Raises UnsupportedMediaType, MissingImages, EmptyBatch, TooManyImages, UndecodableBase64, and the errors of
    json_values.parse, npy.parse and multipart.parse.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in _RAW:
        return Body([data])
    if media_type == JSON:
        return _json(data, max_images=max_images, max_values=max_values)
    if media_type == NPY:
        return Body([npy.parse(data)])
    if media_type == MULTIPART:
        return Body(list(multipart.parse(content_type, data, max_files=max_images)))
    raise UnsupportedMediaType(
        f"Content-Type {shown(media_type)} is not supported: send one of {', '.join(MEDIA_TYPES)}"
        if media_type
        else f"the request has no Content-Type: send one of {', '.join(MEDIA_TYPES)}"
    )


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
    return Body([_base64(entry, i) if isinstance(entry, str) else entry for i, entry in enumerate(images)], content)


def _base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(_DATA_URL.sub("", text, count=1), validate=True)
    except (binascii.Error, ValueError) as e:
        raise UndecodableBase64(f"image {index} is a string but not base64 of an encoded image ({e})") from None
