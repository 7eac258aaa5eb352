"""Decode encoded images to pixels.

PNG, JPEG, WebP and BMP are read. The bytes decide which it is, not the declared type. Cameras, browsers, drawing
programs and scanners write these formats, with one picture per file. Every further decoder is attack surface. So GIF
and TIFF, whose files hold several pictures, and Pillow's fifty other formats are not read.
"""

from __future__ import annotations

import io
from typing import cast

import numpy as np
from PIL import (
    Image,
    ImageOps,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  Pillow loads it on its own only when every format is allowed
)

from carso.errors import AnimatedImage, TooManyPixels, TransparentImage, UndecodableImage

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# Scans, and Exif segments, of one JPEG. Each scan goes over all pixels once more, however few bytes it has (4 ms at
# 2048 x 2048). At each further Exif segment, Pillow copies all Exif data read so far. Encoders write at most 10
# scans and 1 segment; thumbnails and previews in the same file have their own.
MAX_SCANS = 64
# Pieces of one file. Pillow takes a file apart in Python, at 1 to 2 microseconds a piece, and 8 MiB may be millions of
# empty pieces. An honest image of 2048 x 2048 pixels has some thousands.
MAX_READS = 2**16


class _Bounded(io.BytesIO):
    """A file that can be read at most MAX_READS times. Raises RuntimeError beyond that."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise RuntimeError(f"it is in more than {MAX_READS} pieces")
        return super().read(size)


def opened(data: bytes) -> Image.Image:
    """Open an image: its header is read and no pixel is decoded. Its `size` is (width, height).

    Raises UndecodableImage and AnimatedImage. Raises TooManyPixels beyond Pillow's own limit, which is above ours.
    """
    _check_scans(data)
    try:
        # a smaller file has fewer pieces anyway, and counting makes each read take twice as long
        file = _Bounded(data) if len(data) > MAX_READS else io.BytesIO(data)
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UndecodableImage(
            f"these {len(data)} bytes are not an image in a supported format: send PNG, JPEG, WebP or BMP"
        ) from None
    except Image.DecompressionBombError as e:
        raise TooManyPixels(f"{e}: scale the image down") from None
    except Exception as e:  # decoders raise errors of any kind on hostile bytes: there is no closed list
        raise UndecodableImage(f"the image's header cannot be read ({e}): send an intact file") from None
    if not _whole(image, data):
        raise UndecodableImage(f"the {image.format} file of {len(data)} bytes is truncated: send all of it")
    # a photo in MPO format is a JPEG with previews after the picture itself: its first frame is the picture
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise AnimatedImage(f"the file holds {getattr(image, 'n_frames', 1)} frames: send one of them")
    return image


def _check_scans(data: bytes) -> None:
    if not data.startswith(b"\xff\xd8"):
        return
    for what, mark in (("scans", b"\xff\xda"), ("Exif segments", b"Exif\0\0")):
        if (found := data.count(mark)) > MAX_SCANS:
            raise UndecodableImage(f"the JPEG file has {found} {what}, at most {MAX_SCANS} are allowed: save it again")


def _whole(image: Image.Image, data: bytes) -> bool:
    """Return whether the end of the file is there. Pillow does not always tell: it fills up some of what is missing."""
    match image.format:
        case "PNG":
            return b"IEND\xae\x42\x60\x82" in data
        case "JPEG":
            return b"\xff\xd9" in data
        case "BMP":
            return int.from_bytes(data[2:6], "little") <= len(data)
    return True


def pixels(image: Image.Image, *, channels: int) -> np.ndarray:
    """Decode to [channels, H, W] uint8, or uint16 for 16-bit grey images.

    1 channel is grey (ITU-R 601 luma), 3 are RGB. The EXIF orientation is applied; colour profiles are not. 16-bit
    colour is read to 8 bits.

    Raises UndecodableImage, and TransparentImage unless every pixel is opaque. What a transparent pixel shows depends
    on a background, which the service does not have. An image that one viewer sees on white and another on black is a
    way to deceive both.
    """
    try:
        image.load()
        if image.info:  # where the orientation would be
            ImageOps.exif_transpose(image, in_place=True)
        grey16 = image.mode.startswith("I")
        if image.has_transparency_data:
            opaque = _opaque_16_bit(image) if grey16 else _opaque(image)
            image = image if grey16 else image.convert("RGBA")
        else:
            opaque = True
        if not grey16 and image.mode != (mode := "L" if channels == 1 else "RGB"):
            image = image.convert(mode)
        array = np.asarray(image)
    except Exception as e:  # as above
        raise UndecodableImage(f"the {image.format} file is damaged or truncated ({e}): send an intact file") from None
    if not opaque:
        raise TransparentImage("some pixels are transparent: put the image on the background that it is meant for")
    if grey16:
        array = array.astype(np.uint16)
    if array.ndim == 3:
        return array.transpose(2, 0, 1)
    return array[None] if channels == 1 else np.broadcast_to(array, (channels, *array.shape))


def _opaque(image: Image.Image) -> bool:
    least, _ = cast("tuple[int, int]", image.convert("RGBA").getchannel("A").getextrema())
    return least == 255


def _opaque_16_bit(image: Image.Image) -> bool:
    """Tell whether no pixel is transparent. In Pillow, 16-bit grey has one transparent value and no alpha channel."""
    return not bool((np.asarray(image) == image.info["transparency"]).any())
