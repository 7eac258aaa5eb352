"""All of CARSO as one differentiable function: what an attacker who knows everything takes gradients of.

It is made of the same folded modules that are exported as the bundle's graphs, so it computes what the graphs compute,
to rounding (`tests/test_system.py`). What it adds are the *raw scores* of the votes: what the last linear layer of
the second pass gives. The published classifier has a Mish after that layer, which is flat where scores are low. So
gradients taken behind it are weak or zero, and an attacker takes them before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from carso_training.networks.interface import Classifier, Purifier

Average = Literal["softmax", "logits", "log-probabilities"]
"""What stands for the vote, whose count has no gradient: the mean over votes of their probabilities (the logarithm of
it), of their raw scores, or of the logarithms of the softmax of their raw scores."""

AVERAGES: tuple[Average, ...] = ("logits", "softmax", "log-probabilities")  # the one that most often works first
Scores = Callable[[Tensor], Tensor]
"""Images [B, *shape] in [0, 1] -> class scores [B, classes]: what an attack differentiates."""

Latents = Callable[[int], Tensor]
"""A number of rows R -> latents [R, latent]."""


class System(nn.Module):
    """First pass, code encoder, decoder and second pass, in eval mode, with frozen weights.

    Moving a system to another device or dtype may move the networks that it was built from.
    """

    def __init__(self, *, classifier: Classifier, purifier: Purifier, second_pass: Classifier) -> None:
        super().__init__()
        self.latent, self.classes = purifier.config.latent, classifier.config.classes
        with torch.no_grad():
            self.first_pass = _Scoring(classifier.folded(), classes=self.classes)
            self.code_encoder = purifier.folded_encoder()
            self.decoder = purifier.folded_decoder()
            self.second_pass = _Scoring(second_pass.folded(), classes=self.classes)
        self.eval().requires_grad_(False)

    def double_copy(self) -> System:
        """Return the same system in float64; this one stays as it is."""
        return deepcopy(self).double()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, *shape] in [0, 1] -> the first pass's raw scores [B, classes] and the codes [B, code]."""
        raw, (_, representation) = self.first_pass(images)
        return raw, self.code_encoder(representation)

    def vote(self, codes: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, code] and latents [K * B, latent] -> raw scores and scores, [K, B, classes] each.

        Latents are in order of votes, then of images: the rows k * B ... k * B + B - 1 are vote k of all images. A vote
        is the class of highest score.
        """
        count = len(latents) // len(codes)
        index = torch.arange(len(codes), device=codes.device).repeat(count)
        raw, (scores, _) = self.second_pass(self.decoder(codes, index, latents))
        return tuple(part.unflatten(0, (count, len(codes))) for part in (raw, scores))

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, *shape] and latents [K * B, latent] -> the votes' raw scores and scores, [K, B, classes] each."""
        return self.vote(self.encode(images)[1], latents)

    def classifier_scores(self, *, raw: bool = True) -> Scores:
        """Return the first pass alone as a differentiable function: images -> raw scores, or those it decides by."""

        def function(images: Tensor) -> Tensor:
            before, (after, _) = self.first_pass(images)
            return before if raw else after

        return function

    def scores(self, average: Average, *, votes: int, latents: Latents) -> Scores:
        """Return all of the system as a differentiable function: images [B, *shape] -> [B, classes].

        `latents` is called once per call, with `votes` * B rows: it decides whether they are fresh each time.
        """

        def function(images: Tensor) -> Tensor:
            drawn = latents(votes * len(images)).to(images)
            return averaged(*self(images, drawn), average=average)

        return function

    def fresh(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return `scores` over fresh latents at every call: their expectation is under attack."""
        device = generator.device
        return self.scores(
            average,
            votes=votes,
            latents=lambda rows: torch.randn(rows, self.latent, generator=generator, device=device),
        )

    def held(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return `scores` over the same latents at every call and for every image: a function without chance in it."""
        latents = torch.randn(votes, self.latent, generator=generator, device=generator.device)
        return self.scores(average, votes=votes, latents=lambda rows: latents.repeat_interleave(rows // votes, dim=0))


def averaged(raw: Tensor, scores: Tensor, *, average: Average) -> Tensor:
    """Raw scores and scores of votes [K, B, classes] -> what stands for the vote, [B, classes]."""
    if average == "logits":
        return raw.mean(dim=0)
    if average == "log-probabilities":
        return torch.log_softmax(raw, dim=-1).mean(dim=0)
    log_probabilities = torch.log_softmax(scores, dim=-1)
    return log_probabilities.logsumexp(dim=0) - math.log(len(scores))


class _Scoring(nn.Module):
    """A folded classifier, and what its last linear layer gives."""

    def __init__(self, folded: nn.Module, *, classes: int) -> None:
        super().__init__()
        self.folded = folded
        linears = [module for module in folded.modules() if isinstance(module, nn.Linear)]
        if not linears or linears[-1].out_features != classes:
            raise ValueError(
                f"the classifier does not end in a linear layer with {classes} outputs: raw scores unknown"
            )
        self._last = [linears[-1]]  # in a list: it is registered in `folded` already

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Images -> raw scores [B, classes], (scores or log-probabilities [B, classes], representation)."""
        with _output_of(self._last[0]) as seen:
            result = self.folded(images)
        return seen[-1], result


@contextmanager
def _output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a layer gives while the block runs."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
