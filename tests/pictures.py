"""Arrays as files: what callers send."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """[H, W] or [H, W, channels] integers -> an image file."""
    return saved(Image.fromarray(pixels), kind, **options)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
