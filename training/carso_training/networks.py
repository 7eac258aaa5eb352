"""The networks of CARSO on 28x28 grey images: the classifier and the conditional VAE (the purifier).

Layer sizes, activations and dropout rates are those of E. Ballarin, "Counteradversarial Recall of
Synthetic Observations" (2022); with them the classifier has 174 450 parameters and the decoder 2.18 million.

    images       [B, *input_shape]  float32 in [0, 1]
    log_probs    [B, classes]       log-softmax class scores
    representation [B, sum(hidden) + classes]   the classifier's activations, concatenated
    code         [B, code]          compressed representation, in (0, 1)
    latent       [B, latent]        N(0, I) at inference time
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    input_shape: tuple[int, ...] = (1, 28, 28)  # channels, height, width
    hidden: tuple[int, ...] = (200, 80)
    classes: int = 10
    dropout: float = 0.15  # after each hidden layer
    mean: float = 0.1307  # MNIST's pixel mean and deviation: the input is standardised inside the
    std: float = 0.3081  # network, so that attacks and bundles live on plain [0, 1] pixels


@dataclass(frozen=True, kw_only=True)
class PurifierConfig:
    input_shape: tuple[int, ...] = (1, 28, 28)
    representation: int = 290  # of the classifier
    input_encoder: tuple[int, int] = (490, 196)  # E_DRI: hidden, output
    code_encoder: tuple[int, int] = (174, 58)  # E_DRR: hidden, output (the code)
    encoder: tuple[int, int] = (199, 145)  # E: hidden, output
    latent: int = 36
    decoder: tuple[int, int] = (1244, 1014)  # D: the two hidden layers
    encoder_dropout: float = 0.0375
    decoder_dropout: tuple[float, float] = (0.075, 0.0375)

    @property
    def code(self) -> int:
        return self.code_encoder[1]


class ClassifierOutput(NamedTuple):
    log_probs: Tensor  # [B, classes]
    representation: Tensor  # [B, sum(hidden) + classes]


class Classifier(nn.Module):
    """Fully connected; Linear, Mish, BatchNorm, dropout per hidden layer; Linear, Mish, log-softmax last."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = (prod(config.input_shape), *config.hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Linear(widths[-1], config.classes)

    @property
    def representation_size(self) -> int:
        return sum(self.config.hidden) + self.config.classes

    def represent(self, images: Tensor) -> ClassifierOutput:
        """Class scores together with the internal representation that conditions the purifier."""
        x = ((images - self.config.mean) / self.config.std).flatten(1)
        activations = []
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = F.mish(linear(x))
            activations.append(x)
            x = self.dropout(norm(x))
        x = F.mish(self.last(x))
        activations.append(x)
        return ClassifierOutput(F.log_softmax(x, dim=1), torch.cat(activations, dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.represent(images).log_probs


def _hidden(inputs: int, outputs: int, *, dropout: float = 0.0) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs), nn.LeakyReLU(), nn.BatchNorm1d(outputs)]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


class PurifierOutput(NamedTuple):
    logits: Tensor  # [B, prod(input_shape)], before the decoder's sigmoid
    mean: Tensor  # [B, latent]
    log_variance: Tensor  # [B, latent]


class Purifier(nn.Module):
    """The conditional VAE. Only `code_encoder` and `decoder` are used online."""

    def __init__(self, config: PurifierConfig) -> None:
        super().__init__()
        self.config = config
        pixels = prod(config.input_shape)
        wide, narrow = config.input_encoder
        self.input_encoder = nn.Sequential(*_hidden(pixels, wide), nn.Linear(wide, narrow), nn.Sigmoid())
        wide, code = config.code_encoder
        self.code_encoder = nn.Sequential(*_hidden(config.representation, wide), nn.Linear(wide, code), nn.Sigmoid())
        wide, encoded = config.encoder
        self.encoder = nn.Sequential(
            *_hidden(narrow + code, wide, dropout=config.encoder_dropout), nn.Linear(wide, encoded), nn.Tanh()
        )
        self.mean = nn.Linear(encoded, config.latent)
        self.log_variance = nn.Linear(encoded, config.latent)
        (first, second), (drop_first, drop_second) = config.decoder, config.decoder_dropout
        self.decoder = nn.Sequential(
            *_hidden(code + config.latent, first, dropout=drop_first),
            *_hidden(first, second, dropout=drop_second),
            nn.Linear(second, pixels),
        )

    def encode(self, representation: Tensor) -> Tensor:
        """The code [B, code] of a representation [B, representation]."""
        return self.code_encoder(representation)

    def decode(self, code: Tensor, latent: Tensor) -> Tensor:
        """Purified images [B, *input_shape] in [0, 1]."""
        logits = self.decoder(torch.cat([code, latent], dim=1))
        return torch.sigmoid(logits).unflatten(1, self.config.input_shape)

    def forward(self, images: Tensor, representation: Tensor, noise: Tensor) -> PurifierOutput:
        """Reconstruct `images` from themselves and their representation; `noise` [B, latent] is N(0, I)."""
        code = self.encode(representation)
        encoded = self.encoder(torch.cat([self.input_encoder(images.flatten(1)), code], dim=1))
        mean, log_variance = self.mean(encoded), self.log_variance(encoded)
        latent = mean + noise * torch.exp(0.5 * log_variance)
        return PurifierOutput(self.decoder(torch.cat([code, latent], dim=1)), mean, log_variance)


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """Both networks of one system; the purifier's representation size must be the classifier's."""

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    purifier: PurifierConfig = field(default_factory=PurifierConfig)
