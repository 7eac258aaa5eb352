"""Read image sources into the array that the pipeline takes, and check shape, values and limits.

For a bundle of C channels, height H and width W, a source may be:

    encoded image (bytes)      one image; made grey or RGB as C asks, scaled to the bundle's range
    nested numbers (list)      one image [C, H, W], or [H, W] if C = 1; values in the bundle's range
    .npy (array), C = 1        [H, W] and [1, H, W] one image; [N, H, W] and [N, 1, H, W] a batch
    .npy (array), C = 3        [3, H, W] one image; [N, 3, H, W] a batch

Floating-point arrays have values in the bundle's range. bool is the ends of it. uint16 arrays are scaled to it from
0..65535, and all other integers from 0..255.

The shape of an array must be one of these exactly. Only encoded images are resized: which axis of an array is which
would be a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from carso.bundle import InputSpec
from carso.errors import (
    BlankImage,
    EmptyBatch,
    NotFinite,
    OutOfRange,
    RequestError,
    TooManyImages,
    TooManyPixels,
    WrongScale,
    WrongShape,
)
from carso.images import encoded
from carso.images.numbers import Source, from_lists
from carso.images.resizing import resized
from carso.options import ImageOptions

PLAIN = ImageOptions()
# JPEG files that are to be resized are decoded to no less than this many times the bundle's size, so that the filter
# still has what it needs.
FINER = 4
# An image whose values differ by no more than this share of the range has two grey levels of 256 at most.
ONE_LEVEL = (1 + 1e-5) / 255
BITS_USED = 14  # 16-bit values that need no more bits are 14-, 12-, 10- or 8-bit ones: a dark image, at best
_LAST = {3: "2, 0, 1", 4: "0, 3, 1, 2"}  # the axes in their right order where channels are the last, by their number


class Reader:
    """Reads the images of one bundle, within the operator's limits."""

    def __init__(self, spec: InputSpec, *, max_images: int, max_pixels: int) -> None:
        self.spec = spec
        self.max_images = max_images
        self.max_pixels = max_pixels
        self._scaled: dict[np.dtype[Any], np.ndarray] = {  # the float value of each integer pixel value
            np.dtype(kind): (spec.low + (spec.high - spec.low) * (np.arange(top + 1) / top)).astype(np.float32)
            for kind, top in ((np.bool_, 1), (np.uint8, 255), (np.uint16, 65535))
        }

    def read(self, sources: Sequence[Source], options: ImageOptions = PLAIN) -> np.ndarray:
        """Return the images of all sources, [N, *shape] float32 in the bundle's range.

        Raises the errors of carso.errors about images. With several sources, the message says which one is at fault.
        """
        pixels_left = self.max_pixels
        parts: list[np.ndarray] = []
        for index, source in enumerate(sources):
            try:
                if isinstance(source, bytes):
                    part, pixels = self._encoded(source, options, pixels_left=pixels_left)
                    pixels_left -= pixels
                else:
                    part = self._numbers(source)
                    if options.invert:
                        part = self._inverted(part)
                parts.append(part)
            except RequestError as e:
                raise type(e)(f"image {index}: {e}") if len(sources) > 1 else e from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encoded(self, data: bytes, options: ImageOptions, *, pixels_left: int) -> tuple[np.ndarray, int]:
        """Return [1, C, H, W] float32, and how many pixels were decoded. Nothing is decoded that would be refused."""
        picture = encoded.opened(data)
        width, height = picture.size
        channels, *size = self.spec.shape
        at_least = FINER * max(size) if options.resize else None
        if (cost := picture.charge(at_least=at_least)) > pixels_left:
            raise TooManyPixels(
                f"{width} x {height} pixels; the encoded images of one request may have {self.max_pixels} together, "
                "and up to four times that in JPEG files that are resized: scale them down, or send several requests"
            )
        if not options.resize and sorted(size) != sorted((height, width)):  # the orientation may yet swap them
            raise self._wrong_size((channels, height, width))
        array = encoded.pixels(picture, channels=channels, background=_colour(options.background), at_least=at_least)
        batch = self._as_floats(array[None], bits=picture.bits)
        if options.invert:
            batch = self._inverted(batch)
        if batch.shape[1:] == self.spec.shape:
            return batch, cost
        if not options.resize:
            raise self._wrong_size(batch.shape[1:])
        _, height, width = self.spec.shape
        image = resized(batch[0], height=height, width=width, fit=options.fit, background=self.spec.background)
        return image.clip(self.spec.low, self.spec.high, out=image)[None], cost  # interpolation rounds

    def _numbers(self, source: Source) -> np.ndarray:
        """Return [N, C, H, W] float32 in the bundle's range."""
        array = source if isinstance(source, np.ndarray) else from_lists(source)
        if not array.size:
            raise EmptyBatch(f"an array of shape {list(array.shape)} has no pixels: send at least one image")
        batch = self._as_batch(array, several=isinstance(source, np.ndarray))
        if len(batch) > self.max_images:
            raise TooManyImages(f"{len(batch)} images, at most {self.max_images} are allowed: send several requests")
        if batch.dtype.kind in "iu" and batch.dtype not in self._scaled:
            least, most = int(batch.min()), int(batch.max())
            if least < 0 or most > 255:
                raise OutOfRange(
                    f"the array of {array.dtype} holds the value {least if least < 0 else most}, and integers are "
                    "pixels from 0 to 255 (uint16: to 65535): scale the values, or send floating point in "
                    f"[{self.spec.low:g}, {self.spec.high:g}]"
                )
            batch = batch.astype(np.uint8)
        return self._as_floats(batch, bits=16 if batch.dtype == np.uint16 else 8)

    def _as_batch(self, array: np.ndarray, *, several: bool) -> np.ndarray:
        """Return a view of `array` as [N, C, H, W]. N may be other than 1 only if `several`. Raises WrongShape."""
        channels, *size = self.spec.shape
        if list(array.shape[-2:]) == size:
            if array.ndim == 2 and channels == 1:
                return array[None, None]
            if array.ndim == 3 and array.shape[0] == channels:
                return array[None]
            if array.ndim == 3 and channels == 1 and several:
                return array[:, None]
            if array.ndim == 4 and array.shape[1] == channels and several:
                return array
        raise self._wrong_layout(array.shape, several=several)

    def _as_floats(self, batch: np.ndarray, *, bits: int) -> np.ndarray:
        """Scale [N, C, H, W] to float32 in the bundle's range. `bits`: 16 if the values had 16 of them.

        Raises NotFinite, OutOfRange, BlankImage, WrongScale.
        """
        if batch.dtype in self._scaled:
            index = batch.view(np.uint8) if batch.dtype == np.bool_ else batch
            values: np.ndarray = self._scaled[batch.dtype][index]
        else:
            self._check_values(batch)
            values = batch.astype(np.float32)
        channels = values.reshape(*values.shape[:2], -1)
        least, most = channels.min(axis=2), channels.max(axis=2)
        spread, span = (most - least).max(axis=1), self.spec.high - self.spec.low
        faults = spread <= span * ONE_LEVEL
        if bits == 16:
            faults |= most.max(axis=1) < self.spec.low + span * 2**BITS_USED / 2**16
        if faults.any():
            at = int(faults.argmax())
            where = f"entry {at} of the array: " if len(batch) > 1 else ""
            raise self._fault(batch[at], spread=float(spread[at]), bits=bits, where=where)
        return values

    def _fault(self, image: np.ndarray, *, spread: float, bits: int, where: str) -> RequestError:
        """Return what is wrong with an image that uses next to nothing of its range."""
        least, most = image.min(), image.max()
        if not spread:
            return BlankImage(
                f"{where}every pixel has the same value ({most:g}), so there is nothing to see: send an image"
            )
        if image.dtype == np.uint8 and bits == 8 and most == 1:
            return WrongScale(
                f"{where}the maximum of a uint8 image is 1, so it is not scaled to 0..255: multiply it by 255, or send "
                "bool or floating point"
            )
        if bits == 16:
            top = "a quarter of what 16 bits hold"
            return WrongScale(
                f"{where}the maximum of a 16-bit image is less than {top}, as that of values with {BITS_USED} or fewer "
                "bits is: scale the values to 0..65535, or send 8 bits"
            )
        return WrongScale(
            f"{where}the values run from {least:g} to {most:g}, which is no more than one grey level of 256: they may "
            "have been scaled twice"
        )

    def _check_values(self, batch: np.ndarray) -> None:
        least, most = batch.min(), batch.max()
        if self.spec.low <= least and most <= self.spec.high:
            return
        if not np.isfinite(batch).all():
            raise NotFinite("the values include NaN or infinity: send finite numbers")
        bad = least if least < self.spec.low else most
        raise OutOfRange(
            f"the value {bad:g} is outside the range of this bundle, [{self.spec.low:g}, {self.spec.high:g}]: scale "
            "the values, or send uint8 as .npy or an encoded image, which the service scales"
        )

    def _inverted(self, batch: np.ndarray) -> np.ndarray:
        inverted: np.ndarray = np.float32(self.spec.low + self.spec.high) - batch
        return inverted.clip(self.spec.low, self.spec.high, out=inverted)  # subtraction rounds

    def _wrong_size(self, found: tuple[int, ...]) -> WrongShape:
        return WrongShape(
            f"shape {list(found)}, and this bundle takes {list(self.spec.shape)} (channels, height, width): "
            "send that, or set resize=true to have height and width scaled"
        )

    def _wrong_layout(self, found: tuple[int, ...], *, several: bool) -> WrongShape:
        """Say what an array looks like, and how to make it fit."""
        channels, height, width = self.spec.shape
        taken: list[list[object]] = [[height, width]] if channels == 1 else []
        taken.append([channels, height, width])
        if several:
            taken += [["N", height, width]] if channels == 1 else []
            taken.append(["N", channels, height, width])
        listed = ", ".join(str(shape).replace("'", "") for shape in taken)
        if len(found) in _LAST and found[-1] in (1, 3, 4):
            mend = f"it looks like channels last; transpose it to channels first (array.transpose({_LAST[len(found)]}))"
            if found[-1] != channels:
                mend += f", and make its {found[-1]} channels {channels}"
        elif len(found) == 3 and found[:2] == (height, width):
            mend = "it looks like a batch whose images are the last axis; transpose it (array.transpose(2, 0, 1))"
        elif prod(self.spec.shape) in found or height * width in found:
            first = "-1, " if several else ""
            mend = f"it looks flattened; reshape it (array.reshape({first}{channels}, {height}, {width}))"
        else:
            mend = "send that; arrays are not resized, which resize=true does with encoded images only"
        return WrongShape(f"shape {list(found)}, and this bundle takes {listed}: {mend}")


def _colour(background: str | None) -> encoded.Colour | None:
    """Return a background as red, green and blue."""
    if background is None:
        return None
    red, green, blue = bytes.fromhex({"black": "000000", "white": "FFFFFF"}.get(background, background))
    return red, green, blue
