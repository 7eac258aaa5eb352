"""An attack as a value: which method, how strong, with which settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from carso.bundle import Norm, Sees, Threat
from torch import Tensor

Scores = Callable[[Tensor], Tensor]
"""Images [B, ...] in [0, 1] -> class scores [B, classes], differentiable: logits or log-softmax (their cross-entropy is
the same). A classifier in eval mode is one."""


class Making(Protocol):
    """The function of an attack."""

    def __call__(
        self,
        scores: Scores,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float | Tensor,
        generator: torch.Generator | None,
        **settings: Any,
    ) -> Tensor:
        """Return attacked images, of the shape of `images` [B, ...], in [0, 1] and within `eps` of them.

        `labels` [B] int64 are the true classes. `generator`, on the device of `images`, decides all that is random.
        `eps` may be a tensor that broadcasts against `images`, so that one call makes attacks of several strengths.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """An entry of the table of attacks."""

    name: str  # as in a recipe, a bundle and a file name
    norm: Norm
    make: Making
    settings: Mapping[str, int | float | str] = field(default_factory=dict)  # of `make`, as published
    # settings for use in the inner loop of training, from eps (a number or tensor) and the number of steps
    in_training: Callable[[Any, int], dict[str, Any]] = lambda eps, steps: {}


@dataclass(frozen=True)
class Attack:
    """A method at one strength, with its settings as published: a row of a table."""

    method: Method
    eps: float = 0.0  # the radius of the ball, in units of pixels in [0, 1]

    @property
    def name(self) -> str:
        """The row's name, such as ``pgd-0.30`` or ``clean``; also a safe file name."""
        return self.threat("classifier").name

    def threat(self, sees: Sees) -> Threat:
        """Return the threat that a measurement of this attack records. No attack sees nothing, whatever `sees` says."""
        return Threat(
            attack=self.method.name,
            norm=self.method.norm,
            eps=self.eps,
            sees=sees if self.eps else "nothing",
            settings=dict(self.method.settings),
        )

    def images(
        self, scores: Scores, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the attacked images; see `Making` for the arguments."""
        return self.method.make(scores, images, labels, eps=self.eps, generator=generator, **self.method.settings)
