"""Scale images to the size that a bundle takes."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resized(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Scale [C, h, w] float32 to [C, height, width] float32, without keeping proportions.

    The interpolation is bilinear. When it shrinks an image, its support is widened so that no pixel is skipped.
    """
    return np.stack(
        [
            np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
            for channel in np.ascontiguousarray(image)
        ]
    )
