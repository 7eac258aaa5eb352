"""What every classifier and every purifier offers, whatever its architecture.

images          [B, *input_shape]    float32 in [0, 1]
log_probs       [B, classes]         log-softmax class scores
representation  [B, representation]  the classifier's activations, concatenated
code            [B, code]            compressed representation
latent          [B, latent]          N(0, I) at inference time
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn


class ClassifierConfig(BaseModel, ABC, frozen=True, extra="forbid", allow_inf_nan=False):
    """All that decides a classifier but its weights."""

    trains_for_bounds: ClassVar[bool] = False  # whether its `chain` shares its weights

    network: str  # the architecture: a key of CLASSIFIERS
    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels, height, width
    classes: int = Field(ge=2)
    mean: float  # of the data's pixels: images are standardised inside the network,
    std: PositiveFloat  # so that attacks and bundles live on plain [0, 1] pixels

    @property
    @abstractmethod
    def representation(self) -> int:
        """The size of the representation of one image."""


class PurifierConfig(BaseModel, ABC, frozen=True, extra="forbid", allow_inf_nan=False):
    """All that decides a purifier but its weights."""

    network: str  # the architecture: a key of PURIFIERS
    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels, height, width
    representation: PositiveInt  # of the classifier
    latent: PositiveInt  # the size of a latent

    @property
    @abstractmethod
    def code(self) -> int:
        """The size of a code."""


class ClassifierOutput(NamedTuple):
    """Of a batch of images."""

    log_probs: Tensor  # [B, classes]
    representation: Tensor  # [B, representation]


class PurifierOutput(NamedTuple):
    """Of a batch of images in training."""

    logits: Tensor  # [B, prod(input_shape)]: the decoder's output before its sigmoid
    mean: Tensor  # [B, latent]
    log_variance: Tensor  # [B, latent]


class Classifier(nn.Module, ABC):
    """A classifier that also gives its internal representation."""

    config: ClassifierConfig

    @abstractmethod
    def represent(self, images: Tensor) -> ClassifierOutput:
        """Return the class scores of images together with their representation."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the log-softmax class scores [B, classes] of images."""
        return self.represent(images).log_probs

    def folded(self) -> nn.Module:
        """Return a module for export: images -> (log_probs or logits, representation), as `represent` in eval mode.

        An architecture may give one that is cheaper to run. It is not for further training.
        """
        return _Representing(self)

    def chain(self) -> Sequence[nn.Module] | None:
        """Return the layers that are exported, from images to the scores that decide, for bounds to be taken through.

        One after another they compute the scores of `folded` in eval mode. None: the network is not such a chain.
        """
        return None


class Purifier(nn.Module, ABC):
    """A conditional VAE. Online, only `encode` and `decode` are used."""

    config: PurifierConfig
    code_encoder: nn.Module  # these two hold all weights that are used online
    decoder: nn.Module
    # for training only
    input_encoder: nn.Module  # of the flattened image
    encoder: nn.Module  # of what both encoders give, concatenated
    mean: nn.Module  # of the latent, from what the encoder gives
    log_variance: nn.Module

    def encode(self, representation: Tensor) -> Tensor:
        """Return the codes [B, code], in (0, 1), of representations."""
        return self.code_encoder(representation)

    @abstractmethod
    def decode_logits(self, code: Tensor, latent: Tensor) -> Tensor:
        """Return the logits of the pixels of purified images, [B, *input_shape]."""

    def decode(self, code: Tensor, latent: Tensor) -> Tensor:
        """Return purified images [B, *input_shape] in [0, 1]."""
        return torch.sigmoid(self.decode_logits(code, latent))

    def forward(self, images: Tensor, representation: Tensor, noise: Tensor) -> PurifierOutput:
        """Reconstruct images from themselves and their representation; `noise` [B, latent] is N(0, I)."""
        code = self.encode(representation)
        encoded = self.encoder(torch.cat([self.input_encoder(images.flatten(1)), code], dim=1))
        mean, log_variance = self.mean(encoded), self.log_variance(encoded)
        latent = mean + noise * torch.exp(0.5 * log_variance)
        return PurifierOutput(self.decode_logits(code, latent).flatten(1), mean, log_variance)

    def folded_encoder(self) -> nn.Module:
        """Return a module for export: representation -> codes, as `encode` in eval mode."""
        return _Encoding(self)

    def folded_decoder(self) -> nn.Module:
        """Return a module for export: codes [M, code], code_index [R], latents [R, latent] -> purified images [R, ...].

        It equals `decode(codes[code_index], latents)` in eval mode, and may be cheaper to run.
        """
        return _Decoding(self)


class _Representing(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.classifier.represent(images))


class _Encoding(nn.Module):
    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier

    def forward(self, representation: Tensor) -> Tensor:
        return self.purifier.encode(representation)


class _Decoding(nn.Module):
    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier

    def forward(self, codes: Tensor, code_index: Tensor, latents: Tensor) -> Tensor:
        return self.purifier.decode(codes.index_select(0, code_index), latents)


C = TypeVar("C", bound=BaseModel)
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Architecture(Generic[C, N]):
    """An entry of a table of networks."""

    name: str
    config: type[C]
    build: Callable[[C], N]  # with fresh weights, from PyTorch's global random generator


class ClassifierArchitecture(Architecture[ClassifierConfig, Classifier]):
    """An entry of CLASSIFIERS."""


class PurifierArchitecture(Architecture[PurifierConfig, Purifier]):
    """An entry of PURIFIERS."""
