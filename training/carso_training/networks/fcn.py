"""The published networks, fully connected: the classifier, and the conditional VAE that purifies.

Layer sizes, activations and dropout rates are those of E. Ballarin, "Counteradversarial Recall of Synthetic
Observations" (2022). With them and MNIST's 28x28 grey images the classifier has 174 450 parameters and the decoder
2.18 million.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from carso_training.networks import folding
from carso_training.networks.interface import (
    Classifier,
    ClassifierArchitecture,
    ClassifierConfig,
    ClassifierOutput,
    Purifier,
    PurifierArchitecture,
    PurifierConfig,
)

Dropout = Annotated[float, Field(ge=0, lt=1)]


class FcnClassifierConfig(ClassifierConfig):
    """The sizes of the classifier."""

    network: Literal["fcn"] = "fcn"
    hidden: tuple[PositiveInt, ...] = (200, 80)
    dropout: Dropout = 0.15  # after each hidden layer

    @property
    def representation(self) -> int:
        """The size of the representation: the outputs of all layers."""
        return sum(self.hidden) + self.classes


class FcnPurifierConfig(PurifierConfig):
    """The sizes of the purifier."""

    network: Literal["fcn"] = "fcn"
    latent: PositiveInt = 36
    input_encoder: tuple[PositiveInt, PositiveInt] = (490, 196)  # E_DRI: hidden, output
    code_encoder: tuple[PositiveInt, PositiveInt] = (174, 58)  # E_DRR: hidden, output (the code)
    encoder: tuple[PositiveInt, PositiveInt] = (199, 145)  # E: hidden, output
    decoder: tuple[PositiveInt, PositiveInt] = (1244, 1014)  # D: the two hidden layers
    encoder_dropout: Dropout = 0.0375
    decoder_dropout: tuple[Dropout, Dropout] = (0.075, 0.0375)

    @property
    def code(self) -> int:
        """The size of a code."""
        return self.code_encoder[1]


class FcnClassifier(Classifier):
    """Linear, Mish, BatchNorm, dropout per hidden layer; Linear, Mish, log-softmax last."""

    def __init__(self, config: FcnClassifierConfig) -> None:
        super().__init__()
        self.config: FcnClassifierConfig = config
        widths = (prod(config.input_shape), *config.hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Linear(widths[-1], config.classes)

    def represent(self, images: Tensor) -> ClassifierOutput:
        """Return the class scores of images, and the Mish outputs of all layers, concatenated."""
        x = ((images - self.config.mean) / self.config.std).flatten(1)
        activations = []
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = F.mish(linear(x))
            activations.append(x)
            x = self.dropout(norm(x))
        x = F.mish(self.last(x))
        activations.append(x)
        return ClassifierOutput(F.log_softmax(x, dim=1), torch.cat(activations, dim=1))

    def folded(self) -> folding.FoldedClassifier:
        """Return the same function for export, with standardisation and batch norms folded into the layers."""
        return folding.FoldedClassifier(
            [*self.hidden, self.last], list(self.norms), mean=self.config.mean, std=self.config.std
        )

    def chain(self) -> list[nn.Module]:
        """Return the folded layers from images to scores, one after another; their weights are copies."""
        return self.folded().chain()


class FcnPurifier(Purifier):
    """Each hidden layer of encoders and decoder is Linear, LeakyReLU, BatchNorm."""

    def __init__(self, config: FcnPurifierConfig) -> None:
        super().__init__()
        self.config: FcnPurifierConfig = config
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

    def decode_logits(self, code: Tensor, latent: Tensor) -> Tensor:
        """Return the logits of the pixels of purified images, [B, *input_shape]."""
        return self.decoder(torch.cat([code, latent], dim=1)).unflatten(1, self.config.input_shape)

    def folded_encoder(self) -> nn.Module:
        """Return the code encoder for export, with batch norms folded into the layers."""
        return folding.folded(self.code_encoder)

    def folded_decoder(self) -> folding.FoldedDecoder:
        """Return the decoder for export, with batch norms folded and the codes' share computed once per image."""
        return folding.FoldedDecoder(self.decoder, code=self.config.code, shape=self.config.input_shape)


def _hidden(inputs: int, outputs: int, *, dropout: float = 0.0) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs), nn.LeakyReLU(), nn.BatchNorm1d(outputs)]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


CLASSIFIER = ClassifierArchitecture("fcn", FcnClassifierConfig, FcnClassifier)
PURIFIER = PurifierArchitecture("fcn", FcnPurifierConfig, FcnPurifier)
