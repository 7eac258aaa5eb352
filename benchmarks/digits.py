"""Encoded test images, as clients send them."""

from __future__ import annotations

import io

import numpy as np
import torch
from carso_training.datasets.mnist import MNIST
from PIL import Image


def png_digits(count: int, *, seed: int = 0) -> list[bytes]:
    """PNG files of `count` different MNIST test images, drawn at random."""
    data = MNIST.load("test")
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return [png_of(image[0].numpy()) for image in data.images[rows]]


def png_of(pixels: np.ndarray) -> bytes:
    """Return the PNG file of a grey image [height, width] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
