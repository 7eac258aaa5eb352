"""Turn images as callers have them into the cheapest body that carries them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx

if TYPE_CHECKING:
    import numpy as np

Image: TypeAlias = "str | os.PathLike[str] | bytes"  # a path, or an encoded image
Images: TypeAlias = "Image | Sequence[Image] | np.ndarray[Any, np.dtype[Any]]"

NPY = "application/x-npy"
_TYPES = {  # by a file's first bytes
    b"\x93NUMPY": NPY,
    b"\xff\xd8": "image/jpeg",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}


@dataclass(frozen=True)
class Body:
    """The body of a request, and its Content-Type."""

    content: bytes
    content_type: str


def body_of(images: Images) -> Body:
    """Make the body of a request: one image as it is, several as multipart, an array as .npy.

    An array is [H, W], [C, H, W], [N, H, W] (one channel) or [N, C, H, W]; floating point in the bundle's range, or
    uint8. Raises OSError for a file that cannot be read, TypeError, and ValueError for an empty sequence.
    """
    if _is_array(images):
        return Body(_npy(images), NPY)
    if isinstance(images, (str, os.PathLike, bytes)):
        images = [images]
    if not isinstance(images, Sequence):
        raise TypeError(
            f"images is a {type(images).__name__}: give a path, bytes, an array, or a list of paths or bytes"
        )
    if not images:
        raise ValueError("images is empty: give at least one")
    contents = [_read(image) for image in images]
    if len(contents) == 1:
        return Body(contents[0], _type_of(contents[0]))
    files = [("file", (str(index), content, _type_of(content))) for index, content in enumerate(contents)]
    form = httpx.Request("POST", "http://carso", files=files)
    return Body(form.read(), form.headers["content-type"])


def _is_array(images: object) -> bool:
    """Tell without importing numpy: where nobody has imported it, there is no array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(images, numpy.ndarray)


def _npy(array: Any) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read(image: object) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    raise TypeError(
        f"an image is a {type(image).__name__}: give a path or bytes, or join arrays of one shape with numpy.stack"
    )


def _type_of(content: bytes) -> str:
    """Guess the Content-Type; PNG if it is none of the others. The service looks at the bytes itself, and names what is
    wrong with them."""
    return next((kind for start, kind in _TYPES.items() if content.startswith(start)), "image/png")
