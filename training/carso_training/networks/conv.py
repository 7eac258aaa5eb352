"""Convolutional networks: a small classifier, and a purifier whose decoder is made of transposed convolutions.

The classifier may begin with *soft thresholds*: each pixel goes through a few sigmoids, steep and centred near the
middle of the range, whose steepness and centre are trained along. Robust networks on MNIST learn such a layer by
themselves: in the one of Madry et al. (2018, arXiv:1706.06083, appendix C), three filters of the first layer are in
use, and all three threshold the pixels. Beginning with it saves most of the training. It helps where pixels are nearly
black or white, and nowhere else.
"""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from carso_training.networks.interface import (
    Classifier,
    ClassifierArchitecture,
    ClassifierConfig,
    ClassifierOutput,
    Purifier,
    PurifierArchitecture,
    PurifierConfig,
)
from carso_training.networks.layers import SoftThresholds, Standardise

STRIDES = 4  # two layers of stride 2: sides must be multiples of it


def _sides(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return height and width after both strides. Raises ValueError if they are not whole."""
    _, height, width = shape
    if height % STRIDES or width % STRIDES:
        raise ValueError(f"images of {height} x {width} pixels: both must be multiples of {STRIDES} for this network")
    return height // STRIDES, width // STRIDES


class ConvClassifierConfig(ClassifierConfig):
    """The sizes of the classifier."""

    trains_for_bounds = True

    network: Literal["conv"] = "conv"
    thresholds: int = Field(default=2, ge=0)  # per pixel and channel; 0: images are standardised instead
    steepness: PositiveFloat = 12.0  # of the thresholds, at the start
    channels: tuple[PositiveInt, PositiveInt] = (32, 64)
    hidden: PositiveInt = 256

    @property
    def features(self) -> int:
        """The size of what the convolutions give."""
        return self.channels[1] * prod(_sides(self.input_shape))

    @property
    def representation(self) -> int:
        """The size of the representation: the outputs of all layers from the second convolution on."""
        return self.features + self.hidden + self.classes

    @model_validator(mode="after")
    def _whole(self) -> ConvClassifierConfig:
        _sides(self.input_shape)
        return self


class ConvPurifierConfig(PurifierConfig):
    """The sizes of the purifier."""

    network: Literal["conv"] = "conv"
    latent: PositiveInt = 36
    code_encoder: tuple[PositiveInt, PositiveInt] = (256, 64)  # hidden, output (the code)
    input_encoder: PositiveInt = 196  # training only
    encoder: PositiveInt = 145  # training only
    channels: tuple[PositiveInt, PositiveInt] = (64, 32)  # of the decoder: at a quarter and at half of the size

    @property
    def code(self) -> int:
        """The size of a code."""
        return self.code_encoder[1]

    @model_validator(mode="after")
    def _whole(self) -> ConvPurifierConfig:
        _sides(self.input_shape)
        return self


class ConvClassifier(Classifier):
    """Soft thresholds; two 4x4 convolutions of stride 2, each with a ReLU; Linear, ReLU; Linear, log-softmax."""

    def __init__(self, config: ConvClassifierConfig) -> None:
        super().__init__()
        self.config: ConvClassifierConfig = config
        channels, (first, second) = config.input_shape[0], config.channels
        self.thresholds = (
            SoftThresholds(channels, config.thresholds, steepness=config.steepness) if config.thresholds else None
        )
        self.first = nn.Conv2d(channels * max(config.thresholds, 1), first, 4, stride=2, padding=1)
        self.second = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.hidden = nn.Linear(config.features, config.hidden)
        self.last = nn.Linear(config.hidden, config.classes)

    def represent(self, images: Tensor) -> ClassifierOutput:
        """Return the class scores of images, and the outputs of all layers from the second convolution on."""
        standardised = (images - self.config.mean) / self.config.std
        x = standardised if self.thresholds is None else self.thresholds(images)
        features = F.relu(self.second(F.relu(self.first(x)))).flatten(1)
        hidden = F.relu(self.hidden(features))
        scores = self.last(hidden)
        return ClassifierOutput(F.log_softmax(scores, dim=1), torch.cat([features, hidden, scores], dim=1))

    def chain(self) -> list[nn.Module]:
        """Return the layers from images to scores, one after another; they share their weights with this network."""
        begin = self.thresholds or Standardise(mean=self.config.mean, std=self.config.std)
        convolutions = [self.first, nn.ReLU(), self.second, nn.ReLU(), nn.Flatten()]
        return [begin, *convolutions, self.hidden, nn.ReLU(), self.last]


class ConvPurifier(Purifier):
    """The decoder is Linear, LeakyReLU, and two transposed 4x4 convolutions of stride 2 with a LeakyReLU between."""

    def __init__(self, config: ConvPurifierConfig) -> None:
        super().__init__()
        self.config: ConvPurifierConfig = config
        wide, code = config.code_encoder
        self.code_encoder = nn.Sequential(
            nn.Linear(config.representation, wide), nn.LeakyReLU(), nn.Linear(wide, code), nn.Sigmoid()
        )
        self.input_encoder = nn.Sequential(nn.Linear(prod(config.input_shape), config.input_encoder), nn.Sigmoid())
        self.encoder = nn.Sequential(nn.Linear(config.input_encoder + code, config.encoder), nn.Tanh())
        self.mean = nn.Linear(config.encoder, config.latent)
        self.log_variance = nn.Linear(config.encoder, config.latent)
        sides, (first, second) = _sides(config.input_shape), config.channels
        self.decoder = nn.Sequential(
            nn.Linear(code + config.latent, first * prod(sides)),
            nn.LeakyReLU(),
            nn.Unflatten(1, (first, *sides)),
            nn.ConvTranspose2d(first, second, 4, stride=2, padding=1),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(second, config.input_shape[0], 4, stride=2, padding=1),
        )

    def decode_logits(self, code: Tensor, latent: Tensor) -> Tensor:
        """Return the logits of the pixels of purified images, [B, *input_shape]."""
        return self.decoder(torch.cat([code, latent], dim=1))


CLASSIFIER = ClassifierArchitecture("conv", ConvClassifierConfig, ConvClassifier)
PURIFIER = PurifierArchitecture("conv", ConvPurifierConfig, ConvPurifier)
