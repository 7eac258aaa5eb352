"""Turn images as callers have them into the cheapest body that carries them."""

from __future__ import annotations

import base64
import io
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import httpx

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

# a path, an encoded image, or an image that Pillow has opened or made
Image: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image"
Images: TypeAlias = "Image | Sequence[Image] | np.ndarray[Any, np.dtype[Any]]"

NPY = "application/x-npy"
_PNG_MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"))  # that PNG holds as they are
_ORIENTATION = 0x0112  # in Exif
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
    """Make the body of a request: one image as it is, several as multipart, an array as .npy, Pillow's images as PNG.

    An array is [H, W], [C, H, W], [N, H, W] (one channel) or [N, C, H, W]; floating point in the bundle's range, or
    uint8. Raises OSError for a file that cannot be read, TypeError, and ValueError for an empty sequence.
    """
    if _is_array(images):
        return Body(_npy(images), NPY)
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)):
        images = [images]
    elif _is_pillows(images):
        images = [cast("Image", images)]
    if not isinstance(images, Sequence):
        raise TypeError(
            f"images is a {type(images).__name__}: give a path, bytes, an array, an image of Pillow's, or a list of "
            "paths, bytes or such images"
        )
    if not images:
        raise ValueError("images is empty: give at least one")
    contents = [_read(image) for image in images]
    if len(contents) == 1:
        return Body(contents[0], _type_of(contents[0]))
    files = [("file", (str(index), content, _type_of(content))) for index, content in enumerate(contents)]
    form = httpx.Request("POST", "http://carso", files=files)
    return Body(form.read(), form.headers["content-type"])


def json_of(image: object) -> Any:
    """Write one image as JSON holds it: base64, or nested numbers for an array of floating point.

    An array is [H, W], [1, H, W] or [3, H, W]. Raises OSError for a file that cannot be read, TypeError, ValueError.
    """
    if not _is_array(image):
        return base64.b64encode(_read(image)).decode()
    array = cast("np.ndarray[Any, np.dtype[Any]]", image)
    if array.dtype.kind == "f":
        return array.tolist()
    if array.dtype != "uint8":
        raise TypeError(f"an array of a frame is {array.dtype}: give floating point in the bundle's range, or uint8")
    return base64.b64encode(_png_of_pixels(array)).decode()


def _png_of_pixels(array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    """Encode uint8 [H, W], [1, H, W] or [3, H, W] as PNG, without filters: https://www.w3.org/TR/png-3/"""
    pixels = array[None] if array.ndim == 2 else array
    if pixels.ndim != 3 or len(pixels) not in (1, 3) or not pixels.size:
        raise ValueError(f"an array of a frame has the shape {list(array.shape)}: give [H, W], [1, H, W] or [3, H, W]")
    channels, height, width = pixels.shape
    rows = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _is_array(images: object) -> bool:
    """Tell without importing numpy: where nobody has imported it, there is no array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(images, numpy.ndarray)


def _is_pillows(image: object) -> bool:
    """Tell without importing Pillow: where nobody has imported it, there is no such image."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _png(image: Any) -> bytes:
    """Encode an image of Pillow's without loss, and its orientation, but none of the rest that a photo tells."""
    if image.mode == "F":
        raise TypeError("an image of Pillow's has mode F, floating point, which no file format holds: give an array")
    exif = type(image.getexif())()
    if orientation := image.getexif().get(_ORIENTATION):
        exif[_ORIENTATION] = orientation
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def _npy(array: Any) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read(image: object) -> bytes:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if _is_pillows(image):
        return _png(image)
    raise TypeError(
        f"an image is a {type(image).__name__}: give a path, bytes or an image of Pillow's, or join arrays of one "
        "shape with numpy.stack"
    )


def _type_of(content: bytes) -> str:
    """Guess the Content-Type; PNG if it is none of the others. The service looks at the bytes itself, and names what is
    wrong with them."""
    return next((kind for start, kind in _TYPES.items() if content.startswith(start)), "image/png")
