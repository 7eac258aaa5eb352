"""The IDX format of MNIST and of the data sets that take its place."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import torch

from carso_training.datasets.examples import Examples
from carso_training.datasets.spec import Split
from carso_training.errors import DataUnavailableError

PREFIXES: dict[Split, str] = {"train": "train", "test": "t10k"}


def read_examples(folder: Path, split: Split) -> Examples:
    """Read ``train-...`` or ``t10k-...``: images [N, 1, height, width] and labels [N]. Raises DataUnavailableError."""
    prefix = PREFIXES[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte")
    return Examples(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes: magic 0 0 8 ndim, big-endian sizes, then the data.

    Raises DataUnavailableError if it is anything else.
    """
    content = path.read_bytes()
    if len(content) >= 4 and content[:3] == b"\x00\x00\x08" and len(content) >= (start := 4 + 4 * content[3]):
        shape = tuple(np.frombuffer(content, ">u4", count=content[3], offset=4).tolist())
        if len(content) == start + prod(shape):
            return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
    raise DataUnavailableError(f"{path} is not an IDX file of unsigned bytes")
