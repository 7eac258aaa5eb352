"""Scale images to the size that a bundle takes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from carso.choices import Fit


def resized(image: np.ndarray, *, height: int, width: int, fit: Fit, background: float) -> np.ndarray:
    """Scale [C, h, w] float32 to [C, height, width] float32.

    `fit`: with "pad", the image keeps its proportions, and what is left at two sides is `background`; with "stretch",
    it does not keep them. The interpolation is bilinear. When it shrinks an image, its support is widened so that no
    pixel is skipped.
    """
    rows, columns = height, width
    if fit == "pad":
        scale = min(height / image.shape[1], width / image.shape[2])
        rows, columns = (max(1, round(scale * side)) for side in image.shape[1:])
    top, left = (height - rows) // 2, (width - columns) // 2
    whole = np.full((len(image), height, width), background, np.float32)
    for channel, into in zip(np.ascontiguousarray(image), whole, strict=True):
        scaled = Image.fromarray(channel).resize((columns, rows), Image.Resampling.BILINEAR)
        into[top : top + rows, left : left + columns] = np.asarray(scaled)
    return whole
