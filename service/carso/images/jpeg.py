"""Decode JPEG files, by libjpeg-turbo as simplejpeg binds it.

Pillow drops the warnings of its decoder, and shows grey or garbage where pixels are missing. Here a warning about the
pixels is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import simplejpeg
from PIL import Image

from carso.errors import UndecodableImage

SIGNATURE: Final = b"\xff\xd8"
# Scans of one file. Each goes over all pixels once more, however few bytes it has (4 ms at 2048 x 2048). Encoders write
# at most 10; thumbnails and previews in the same file have their own.
MAX_SCANS = 64
MAX_SEGMENTS = 2**16  # before the pixels; each is looked at in Python
# A file that is to be scaled down is decoded at a half to an eighth of its size, which costs no more than reading what
# is packed: this share of the pixels is charged.
REDUCED = 4
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_EXIF = 0xE1
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file of which no pixel is decoded yet."""

    size: tuple[int, int]  # width, height
    exif: bytes
    _data: bytes
    _colours: str
    _scans: int
    bits: int = 8

    def charge(self, *, at_least: int | None) -> int:
        """Return the pixels that decoding costs, where it may be reduced to a height and width of `at_least`."""
        width, height = self.size
        if at_least is None:
            return width * height
        reduced_height, reduced_width, *_ = simplejpeg.decode_jpeg_header(self._data, at_least, at_least, strict=False)
        worked_on = width * height * max(MAX_SCANS // REDUCED, self._scans) // MAX_SCANS
        return max(worked_on, int(reduced_height) * int(reduced_width))

    def decoded(self, mode: str, *, at_least: int | None) -> Image.Image:
        """Return the picture in `mode` (L or RGB), or in CMYK. Raises ValueError with what the decoder warns of."""
        cmyk = self._colours in ("CMYK", "YCCK")
        array = simplejpeg.decode_jpeg(
            self._data,
            "CMYK" if cmyk else "GRAY" if mode == "L" else "RGB",
            min_height=at_least or 0,
            min_width=at_least or 0,
            strict=True,
        )
        if cmyk:
            return Image.fromarray(255 - array, "CMYK")  # as everybody writes it since Adobe did: inverted
        return Image.fromarray(array[..., 0] if mode == "L" else array)


def opened(data: bytes) -> Jpeg:
    """Read the header; no pixel is decoded. Raises UndecodableImage."""
    if (scans := data.count(_SCAN)) > MAX_SCANS:
        raise UndecodableImage(f"the JPEG file has {scans} scans, at most {MAX_SCANS} are allowed: save it again")
    exif, progressive = b"", False
    for marker, start, end in _segments(data):
        if marker == _EXIF and not exif and data.startswith(b"Exif\0\0", start):
            exif = data[start:end]
        progressive = progressive or marker in _PROGRESSIVE
    if data.rfind(_END) < data.rfind(_SCAN):
        if progressive:  # nobody can tell whether scans are missing, which would make it finer
            raise UndecodableImage(f"the JPEG file of {len(data)} bytes is truncated: send all of it")
        data += _END  # if pixels are missing too, the decoder says so
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception as e:  # KeyError, too, of colours that it does not know
        raise UndecodableImage(f"the header of the JPEG file cannot be read ({e}): send an intact file") from None
    return Jpeg((width, height), exif, data, colours, scans)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield of each segment before the first scan its marker, and where its content starts and ends.

    Raises UndecodableImage if they are more than MAX_SEGMENTS.
    """
    at = len(SIGNATURE)
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] in (0xDA, 0xD9):
            return
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        size = int.from_bytes(data[at + 2 : at + 4])
        yield data[at + 1], at + 4, at + 2 + size
        at += 2 + size
    raise UndecodableImage(f"the JPEG file is in more than {MAX_SEGMENTS} pieces: save it again")
