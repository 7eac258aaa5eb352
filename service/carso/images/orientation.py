"""How an image is to be turned: the orientation in its Exif data."""

from __future__ import annotations

import struct

from PIL import Image

_TAG = 0x0112
_SHORT, _LONG = 3, 4  # types of a value
MAX_ENTRIES = 1000  # of the directory; cameras write some dozens

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, exif: bytes) -> Image.Image:
    """Return the image as `exif` says that it is to be seen. Exif data that cannot be read says nothing."""
    turn = _TURNS.get(_orientation(exif))
    return image if turn is None else image.transpose(turn)


def _orientation(exif: bytes) -> int:
    """Return the number, from 1 to 8, or another one where there is none."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 0
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * min(entries, MAX_ENTRIES), 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == _TAG:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == _LONG else 'H'}", tiff, at + 8)
                return int(value) if kind in (_SHORT, _LONG) else 0
    except struct.error:  # it points past its end
        pass
    return 0
