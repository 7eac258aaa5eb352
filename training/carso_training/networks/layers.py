"""Layers of several networks that PyTorch does not have, or not in the form that is exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

THRESHOLDS = (0.35, 0.65)  # the centres at the start lie evenly in this range


class Standardise(nn.Module):
    """Images of any shape -> the same, with `mean` taken off and divided by `std` > 0."""

    def __init__(self, *, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class SoftThresholds(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> [B, C * count, H, W] in (0, 1): sigmoids of steepness * (pixel - centre)."""

    def __init__(self, channels: int, count: int, *, steepness: float = 12.0) -> None:
        super().__init__()
        centres = torch.linspace(*THRESHOLDS, count + 2)[1:-1].repeat(channels)
        self.centres = nn.Parameter(centres.view(1, -1, 1, 1))
        self.steepness = nn.Parameter(torch.full((1, channels * count, 1, 1), steepness))
        self.count = count

    def forward(self, images: Tensor) -> Tensor:
        # In float32 at least, whatever the network is in. In bfloat16 a white pixel would come out as exactly 1, with a
        # gradient of exactly 0, and no attack in training would ever darken it.
        if images.shape[1] > 1:  # a single channel is broadcast
            images = images.repeat_interleave(self.count, dim=1)
        exact = torch.promote_types(images.dtype, torch.float32)
        above = images.to(exact) - self.centres.to(exact)
        return torch.sigmoid(self.steepness.to(exact) * above).to(images.dtype)


class Mish(nn.Module):
    """x * tanh(softplus(x)), by way of one sigmoid: ONNX Runtime has a fast kernel for that, and none for Mish.

    With s = sigmoid(-x)^2 = (1 + e^x)^-2 the factor tanh(log(1 + e^x)) is (1 - s) / (1 + s).
    """

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(-x).square()
        return x * (1 - s) / (1 + s)
