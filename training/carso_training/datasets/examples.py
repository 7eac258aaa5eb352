"""Images with their labels, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    def moved(self, rows: Tensor, *, by: int, generator: torch.Generator) -> Tensor:
        """Return the images at `rows` as `pixels` does, each moved by up to `by` whole pixels along both axes.

        What is moved in is 0, and what is moved out is lost. All moves are equally likely. Without any (`by` = 0),
        nothing is drawn.
        """
        images = self.pixels(rows)
        if not by:
            return images
        count, _, height, width = images.shape
        down, right = torch.randint(2 * by + 1, (2, count, 1), generator=generator, device=images.device)
        image = torch.arange(count, device=images.device).view(-1, 1, 1)
        row = (down + torch.arange(height, device=images.device)).unsqueeze(2)
        column = (right + torch.arange(width, device=images.device)).unsqueeze(1)
        return F.pad(images, (by,) * 4)[image, :, row, column].permute(0, 3, 1, 2).contiguous()

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
