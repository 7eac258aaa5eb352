"""Take PNG files apart, to what makes up the pixels.

Of all else that a file may hold (profiles, texts, times) only the Exif data is looked at. So nothing that is wrong with
the rest makes the image unreadable, and a file that has all its pixels but no end is whole.
"""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Final

from PIL import Image

from carso.errors import AnimatedImage, UndecodableImage

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# Chunks of one file: each is looked at in Python, at 1 to 2 microseconds, and 8 MiB may be a million empty ones. An
# honest image of 2048 x 2048 pixels has some thousands.
MAX_CHUNKS = 2**16
_HEADER, _PALETTE, _TRANSPARENCY, _PIXELS, _END = b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"
_ANIMATION, _EXIF = b"acTL", b"eXIf"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 2**16
# Pillow's mode of the pictures that most clients send, by bits of a value and colour type: no palette, no passes
_PLAIN = {(8, 0): "L", (8, 2): "RGB", (8, 6): "RGBA"}


@dataclass(frozen=True)
class Png:
    """A PNG file of which no pixel is decoded yet."""

    size: tuple[int, int]  # width, height
    bits: int  # of a value
    exif: bytes
    _bytes_of_rows: int
    _chunks: list[tuple[bytes, bytes]]  # those that make up the picture, without the pixels
    _pixels: list[bytes]  # in pieces, compressed
    _plain: str | None  # the mode, if header and pixels are all there is; None: there is more to them

    def charge(self, *, at_least: int | None) -> int:
        """Return the pixels that decoding costs. PNG has no cheaper way to a smaller picture."""
        return self.size[0] * self.size[1]

    def decoded(self, mode: str, *, at_least: int | None) -> Image.Image:
        """Return the picture in its own mode and size. Raises UndecodableImage, and whatever Pillow raises."""
        pixels = b"".join(self._pixels)
        self._check_complete(pixels)
        if self._plain is not None:  # Pillow's decoder without its reader of files takes a third of the time
            with suppress(ValueError):  # where it stops early, the reader of files tells whether that matters
                return Image.frombytes(self._plain, self.size, pixels, "zip", self._plain)
        chunks = (*self._chunks, (_PIXELS, pixels), (_END, b""))
        image = Image.open(io.BytesIO(SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)), formats=("PNG",))
        image.load()
        return image

    def _check_complete(self, pixels: bytes) -> None:
        """Unpack the pixels once, to count them: where the packed data ends too early, Pillow leaves the rest black."""
        unpacker = zlib.decompressobj()
        missing, packed = self._bytes_of_rows, pixels
        try:
            while missing > 0 and packed and not unpacker.eof:
                missing -= len(unpacker.decompress(packed, _PIECE))
                packed = unpacker.unconsumed_tail
        except zlib.error as e:
            raise UndecodableImage(f"the pixels of the PNG file are damaged ({e}): send an intact file") from None
        if missing > 0:
            raise UndecodableImage(f"the PNG file lacks {missing} bytes of pixels: send all of it")


def opened(data: bytes) -> Png:
    """Take a file apart; no pixel is decoded. Raises UndecodableImage, AnimatedImage."""
    chunks: list[tuple[bytes, bytes]] = []
    pixels: list[bytes] = []
    exif = b""
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        size, kind, end = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if len(kind) < 4 or kind == _END:
            break
        content = data[end : end + size]
        if kind in (_HEADER, _PALETTE, _TRANSPARENCY):
            if any(kind == other for other, _ in chunks):
                raise UndecodableImage(f"the PNG file holds two chunks {kind.decode()}: save the image again")
            _check(kind, content, data[end + size : end + size + 4])
            chunks.append((kind, content))
        elif kind == _PIXELS:
            if end + size + 4 <= len(data):  # otherwise the file is cut here, and the pixels themselves tell
                _check(kind, content, data[end + size : end + size + 4])
            pixels.append(content)
        elif kind == _EXIF:
            exif = content
        elif kind == _ANIMATION and (frames := int.from_bytes(content[:4])) > 1:
            raise AnimatedImage(f"the file holds {frames} frames: send one of them")
        elif kind[:1].isupper():
            raise UndecodableImage(f"the PNG file holds an unknown chunk {kind!r}: save the image again")
        at = end + size + 4
    else:
        raise UndecodableImage(f"the PNG file is in more than {MAX_CHUNKS} pieces: save the image again")
    shape, bits, length, plain = _header(chunks)
    return Png(shape, bits, exif, length, chunks, pixels, plain if len(chunks) == 1 else None)


def _header(chunks: list[tuple[bytes, bytes]]) -> tuple[tuple[int, int], int, int, str | None]:
    """Return (width, height), the bits of a value, the bytes of all rows, and the mode of a plain picture. Raises
    UndecodableImage.
    """
    content = chunks[0][1] if chunks and chunks[0][0] == _HEADER else b""
    if len(content) != 13:
        raise UndecodableImage("the PNG file does not begin with a header: send an intact file")
    width, height, bits, colour, *methods, interlaced = struct.unpack(">IIBBBBB", content)
    if not width or not height or colour not in _CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise UndecodableImage(
            f"the header of the PNG file makes no sense ({width} x {height}, {bits} bits, colour type {colour}): send "
            "an intact file"
        )
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    length = 0
    for left, top, across, down in passes:
        columns, rows = ceil((width - left) / across), ceil((height - top) / down)
        if columns > 0 and rows > 0:
            length += rows * (1 + (columns * _CHANNELS[colour] * bits + 7) // 8)
    return (width, height), bits, length, None if interlaced or any(methods) else _PLAIN.get((bits, colour))


def _check(kind: bytes, content: bytes, checksum: bytes) -> None:
    if zlib.crc32(kind + content) != int.from_bytes(checksum) or len(checksum) < 4:
        raise UndecodableImage(f"the PNG file is damaged in its chunk {kind.decode()}: send an intact file")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return b"".join((len(content).to_bytes(4), kind, content, zlib.crc32(kind + content).to_bytes(4)))
