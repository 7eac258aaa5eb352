"""Decode encoded images to pixels.

PNG, JPEG, WebP and BMP are read. The bytes decide which it is, not the declared type. Cameras, browsers, drawing
programs and scanners write these formats, with one picture per file. Every further decoder is attack surface. So GIF
and TIFF, whose files hold several pictures, and Pillow's fifty other formats are not read.

Pixels that are damaged or missing make a file unreadable. Whatever else is wrong with it does not.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from PIL import (
    Image,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  Pillow loads it on its own only when every format is allowed
)

from carso.errors import AnimatedImage, RequestError, TooManyPixels, TransparentImage, UndecodableImage
from carso.images import jpeg, png
from carso.images.orientation import upright

# Reads of one file. Pillow takes some files apart in Python, at 1 to 2 microseconds a piece, and 8 MiB may be millions
# of pieces. An honest image of 2048 x 2048 pixels has some thousands.
MAX_READS = 2**16
# From this alpha on, a pixel counts as opaque: whatever is behind it changes it by one level of 256 at most.
OPAQUE = 254

Colour = tuple[int, int, int]  # red, green, blue, each from 0 to 255


class Picture(Protocol):
    """An image file of which no pixel is decoded yet."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in the file."""

    @property
    def bits(self) -> int:
        """Of a value in the file: 8 or fewer, or 16."""

    @property
    def exif(self) -> bytes:
        """Its Exif data, or nothing."""

    def charge(self, *, at_least: int | None) -> int:
        """Return the pixels that decoding costs. `at_least`: as of `decoded`."""

    def decoded(self, mode: str, *, at_least: int | None) -> Image.Image:
        """Return the picture in `mode` (L or RGB), or in a mode of its own; not turned yet.

        `at_least`: if decoding to a smaller picture is cheaper, the height and width that it must have; None: the
        picture must have its size.
        """


class _Bounded(io.BytesIO):
    """A file that can be read at most MAX_READS times. Raises RuntimeError beyond that."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise RuntimeError(f"it is in more than {MAX_READS} pieces")
        return super().read(size)


@dataclass(frozen=True)
class _ByPillow:
    """A WebP or BMP file."""

    _image: Image.Image
    bits: int = 8

    @property
    def size(self) -> tuple[int, int]:
        return self._image.size

    @property
    def exif(self) -> bytes:
        return cast("bytes", self._image.info.get("exif", b""))

    def charge(self, *, at_least: int | None) -> int:
        return self.size[0] * self.size[1]

    def decoded(self, mode: str, *, at_least: int | None) -> Image.Image:
        self._image.load()
        if self._image.format == "BMP" and self._image.mode == "RGBA" and _alpha(self._image)[1] == 0:
            return self._image.convert("RGB")  # a fourth byte that is nowhere used is not transparency
        return self._image


def recognised(data: bytes) -> bool:
    """Tell from its first bytes whether a file is in one of the formats that are read."""
    return data.startswith((png.SIGNATURE, jpeg.SIGNATURE, b"BM")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def opened(data: bytes) -> Picture:
    """Open an image: its header is read and no pixel is decoded.

    Raises UndecodableImage and AnimatedImage. Raises TooManyPixels beyond Pillow's own limit, which is above ours.
    """
    if data.startswith(png.SIGNATURE):
        return png.opened(data)
    if data.startswith(jpeg.SIGNATURE):
        return jpeg.opened(data)
    try:
        # a smaller file has fewer pieces anyway, and counting makes each read take twice as long
        file = _Bounded(data) if len(data) > MAX_READS else io.BytesIO(data)
        image = Image.open(file, formats=("WEBP", "BMP"))
    except UnidentifiedImageError:
        raise UndecodableImage(
            f"these {len(data)} bytes are not an image in a supported format: send PNG, JPEG, WebP or BMP"
        ) from None
    except Image.DecompressionBombError as e:
        raise TooManyPixels(f"{e}: scale the image down") from None
    except Exception as e:  # decoders raise errors of any kind on hostile bytes: there is no closed list
        raise UndecodableImage(f"the image's header cannot be read ({e}): send an intact file") from None
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise AnimatedImage(f"the file holds {frames} frames: send one of them")
    return _ByPillow(image)


def pixels(
    picture: Picture, *, channels: int, background: Colour | None = None, at_least: int | None = None
) -> np.ndarray:
    """Decode to [channels, H, W] uint8, or uint16 for 16-bit grey images.

    1 channel is grey (ITU-R 601 luma), 3 are RGB. The Exif orientation is applied; colour profiles are not. 16-bit
    colour is read to 8 bits. `background`: what transparent pixels show. `at_least`: as of Picture.decoded.

    Raises UndecodableImage. Without a background, raises TransparentImage unless every pixel is opaque: an image that
    one viewer sees on white and another on black is a way to deceive both.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        image = upright(picture.decoded(mode, at_least=at_least), picture.exif)
        grey16 = image.mode.startswith("I")
        if grey16:
            array = _grey16(image, background)
        else:
            image = _on(background, image) if image.has_transparency_data else image
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except RequestError:
        raise
    except Exception as e:  # as above
        raise UndecodableImage(f"the image file is damaged or truncated ({e}): send an intact file") from None
    if array.ndim == 3:
        return array.transpose(2, 0, 1)
    return array[None] if channels == 1 else np.broadcast_to(array, (channels, *array.shape))


def _on(background: Colour | None, image: Image.Image) -> Image.Image:
    """Return the image as it is seen on a background."""
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    if _alpha(image)[0] >= OPAQUE:
        return image.convert("RGB")
    if background is None:
        raise _transparent()
    seen = Image.new("RGB", image.size, background)
    seen.paste(image, mask=image)
    return seen


def _alpha(image: Image.Image) -> tuple[int, int]:
    """Return the least and the most alpha of an RGBA image."""
    return cast("tuple[int, int]", image.getchannel("A").getextrema())


def _grey16(image: Image.Image, background: Colour | None) -> np.ndarray:
    """Return [H, W] uint16. In Pillow, 16-bit grey has one transparent value and no alpha channel."""
    array = np.asarray(image).astype(np.uint16)
    if image.has_transparency_data and (hidden := array == image.info["transparency"]).any():
        if background is None:
            raise _transparent()
        red, green, blue = background
        array[hidden] = round(257 * (0.299 * red + 0.587 * green + 0.114 * blue))
    return array


def _transparent() -> TransparentImage:
    return TransparentImage(
        "some pixels are transparent: put the image on the background that it is meant for, or name it with "
        "background=white, black or RRGGBB"
    )
