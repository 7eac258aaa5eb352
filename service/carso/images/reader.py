"""Read image sources into the array that the pipeline takes, and check shape, values and limits.

For a bundle of C channels, a source may be:

    encoded image (bytes)      one image; made grey or RGB as C asks, scaled to the bundle's range
    nested numbers (list)      one image [C, H, W], or [H, W] if C = 1; values in the bundle's range
    .npy (array), C = 1        [H, W] and [1, H, W] one image; [N, H, W] and [N, 1, H, W] a batch
    .npy (array), C = 3        [3, H, W] one image; [N, 3, H, W] a batch

Floating-point arrays have values in the bundle's range. uint8 arrays are scaled to it from 0..255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from carso.bundle import InputSpec
from carso.errors import (
    EmptyBatch,
    NotFinite,
    OutOfRange,
    RequestError,
    TooManyImages,
    TooManyPixels,
    WrongShape,
)
from carso.images import encoded
from carso.images.numbers import Source, from_lists
from carso.images.resizing import resized


class Reader:
    """Reads the images of one bundle, within the operator's limits."""

    def __init__(self, spec: InputSpec, *, max_images: int, max_pixels: int) -> None:
        self.spec = spec
        self.max_images = max_images
        self.max_pixels = max_pixels
        self._scaled: dict[np.dtype[Any], np.ndarray] = {  # the float value of each integer pixel value
            np.dtype(kind): (spec.low + (spec.high - spec.low) * (np.arange(top + 1) / top)).astype(np.float32)
            for kind, top in ((np.uint8, 255), (np.uint16, 65535))
        }

    def read(self, sources: Sequence[Source], *, resize: bool) -> np.ndarray:
        """Return the images of all sources, [N, *shape] float32 in the bundle's range.

        `resize`: scale images of another height and width, instead of refusing them. Raises the errors of carso.errors
        about images. With several sources, the message says which one is at fault.
        """
        pixels_left = self.max_pixels
        parts: list[np.ndarray] = []
        for index, source in enumerate(sources):
            try:
                if isinstance(source, bytes):
                    part, pixels = self._encoded(source, resize=resize, pixels_left=pixels_left)
                    pixels_left -= pixels
                else:
                    part = self._numbers(source)
                parts.append(self._fitting(part, resize=resize))
            except RequestError as e:
                raise type(e)(f"image {index}: {e}") if len(sources) > 1 else e from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encoded(self, data: bytes, *, resize: bool, pixels_left: int) -> tuple[np.ndarray, int]:
        """Return [1, C, H, W] float32, and how many pixels were decoded. Nothing is decoded that would be refused."""
        image = encoded.opened(data)
        width, height = image.size
        if width * height > pixels_left:
            raise TooManyPixels(
                f"{width} x {height} pixels; the encoded images of one request may have {self.max_pixels} together: "
                "scale them down, or send them in several requests"
            )
        channels, *size = self.spec.shape
        if not resize and sorted(size) != sorted((height, width)):  # the EXIF orientation may yet swap them
            raise self._wrong_shape((channels, height, width))
        array = encoded.pixels(image, channels=channels)
        return self._scaled[array.dtype][array[None]], width * height

    def _numbers(self, source: Source) -> np.ndarray:
        """Return [N, C, H, W] float32 in the bundle's range."""
        array = source if isinstance(source, np.ndarray) else from_lists(source)
        if not array.size:
            raise EmptyBatch(f"an array of shape {list(array.shape)} has no pixels: send at least one image")
        batch = self._as_batch(array, several=isinstance(source, np.ndarray))
        if len(batch) > self.max_images:
            raise TooManyImages(f"{len(batch)} images, at most {self.max_images} are allowed: send several requests")
        if array.dtype == np.uint8:
            scaled: np.ndarray = self._scaled[array.dtype][batch]
            return scaled
        self._check_values(batch)
        return batch.astype(np.float32)

    def _as_batch(self, array: np.ndarray, *, several: bool) -> np.ndarray:
        """Return a view of `array` as [N, C, H, W]. N may be other than 1 only if `several`. Raises WrongShape."""
        channels = self.spec.shape[0]
        if array.ndim == 2 and channels == 1:
            return array[None, None]
        if array.ndim == 3 and array.shape[0] == channels:
            return array[None]
        if array.ndim == 3 and channels == 1 and several:
            return array[:, None]
        if array.ndim == 4 and array.shape[1] == channels and several:
            return array
        raise self._wrong_shape(array.shape)

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

    def _fitting(self, batch: np.ndarray, *, resize: bool) -> np.ndarray:
        _, height, width = self.spec.shape
        if batch.shape[2:] == (height, width):
            return batch
        if not resize:
            raise self._wrong_shape(batch.shape[1:])
        scaled = np.stack([resized(image, height=height, width=width) for image in batch])
        return scaled.clip(self.spec.low, self.spec.high, out=scaled)  # interpolation rounds

    def _wrong_shape(self, found: tuple[int, ...]) -> WrongShape:
        return WrongShape(
            f"shape {list(found)}, and this bundle takes {list(self.spec.shape)} (channels, height, width): "
            "send that, or set resize=true to have height and width scaled"
        )
