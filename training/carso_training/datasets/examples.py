"""Images with their labels, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """N images and their classes, on one device."""

    images: Tensor  # [N, channels, height, width] uint8
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Examples:
        """The examples at `rows`: a slice, or indices [M] int64 on the same device."""
        return Examples(self.images[rows], self.labels[rows])

    def pixels(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return the images at `rows` as float32 in [0, 1], in memory of their own."""
        return self.images[rows].float().div_(255.0)

    def to(self, device: torch.device) -> Examples:
        """Return the same examples on another device."""
        return Examples(self.images.to(device), self.labels.to(device))

    def split(self, *, held_out: int, seed: int, train: int | None = None) -> tuple[Examples, Examples]:
        """Draw `train` examples (None: all others) and `held_out` other ones; return them in this order.

        The same seed gives the same split, and the two parts never overlap. Raises ValueError if there are not as many.
        """
        if held_out + (train or 1) > len(self):
            raise ValueError(f"{len(self)} images cannot give {held_out} held out and {train or 1} to train on")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rest = order[held_out:] if train is None else order[held_out : held_out + train]
        return self[rest], self[order[:held_out]]
