"""Trained layers in a cheaper form, for export.

Each form computes what its layers compute in eval mode, to rounding. Batch norms follow the activation in these
networks, so each is folded into the next layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from carso_training.networks.layers import Mish


def fold(norm: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    """Return the one Linear that equals `linear` after `norm` in eval mode. It is computed in float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight = linear.weight.double()
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight.data = (weight * scale).float()
    folded.bias.data = (linear.bias.double() + weight @ shift).float()
    return folded


def folded(layers: nn.Sequential) -> nn.Sequential:
    """Return the same chain of layers without its batch norms and dropouts.

    Each batch norm must be followed by a Linear, with at most a dropout between them.
    """
    result: list[nn.Module] = []
    norm: nn.BatchNorm1d | None = None
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            norm = layer
        elif not isinstance(layer, nn.Dropout):
            result.append(fold(norm, layer) if norm is not None and isinstance(layer, nn.Linear) else layer)
            norm = None
    return nn.Sequential(*result)


class FoldedClassifier(nn.Module):
    """Linear, Mish, Linear, Mish, ...: images [B, ...] in [0, 1] -> logits [B, classes], all Mish outputs [B, sum]."""

    def __init__(
        self, linears: Sequence[nn.Linear], norms: Sequence[nn.BatchNorm1d], *, mean: float, std: float
    ) -> None:
        """`norms` follow the Mish of all `linears` but the last; `mean` and `std` standardise the images."""
        super().__init__()
        first, *rest = linears
        standardised = nn.Linear(first.in_features, first.out_features)
        standardised.weight.data = (first.weight.double() / std).float()
        shift = first.weight.double().sum(dim=1) * (mean / std)
        standardised.bias.data = (first.bias.double() - shift).float()
        self.layers = nn.ModuleList([standardised, *(fold(n, linear) for n, linear in zip(norms, rest, strict=True))])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activations, x, mish = [], images.flatten(1), Mish()
        for layer in self.layers:
            x = mish(layer(x))
            activations.append(x)
        return x, torch.cat(activations, dim=1)

    def chain(self) -> list[nn.Module]:
        """Return the layers from images to scores, one after another."""
        return [nn.Flatten(), *(part for layer in self.layers for part in (layer, Mish()))]


class FoldedDecoder(nn.Module):
    """codes [M, code], code_index [R], latents [R, latent] -> purified images [R, *shape] in [0, 1].

    The part of the first layer that depends on the code is computed once per image, not once per vote.
    """

    def __init__(self, layers: nn.Sequential, *, code: int, shape: tuple[int, ...]) -> None:
        """`layers`: Linear, LeakyReLU, BatchNorm, ..., Linear on [code, latent]; the sigmoid comes on top."""
        super().__init__()
        first, *rest = folded(layers)
        assert isinstance(first, nn.Linear)
        self.from_code = nn.Linear(code, first.out_features)
        self.from_code.weight.data, self.from_code.bias.data = first.weight.data[:, :code].clone(), first.bias.data
        self.from_latent = nn.Linear(first.in_features - code, first.out_features, bias=False)
        self.from_latent.weight.data = first.weight.data[:, code:].clone()
        self.rest = nn.Sequential(*rest)
        self.shape = shape

    def forward(self, codes: Tensor, code_index: Tensor, latents: Tensor) -> Tensor:
        x = self.from_latent(latents) + self.from_code(codes).index_select(0, code_index)
        return torch.sigmoid(self.rest(x)).unflatten(1, self.shape)
