"""Interval bounds: what a chain of layers can give on all images of a box, in one pass.

A box is a lower and an upper end per value. A linear layer moves its centre by its weights and its radius by their
absolute values; every other layer here is monotone, or first falls and then rises, so that both ends and the lowest
point decide. The margins of the label against every other class are bounded directly, by the differences of the last
layer's weights: the two scores move together, and their separate bounds would add up what cancels.

With ``slack`` the bounds hold for what is computed in float32, not only for real numbers: they contain every value
that the same chain computes on an image of the box, whatever the order of its sums. `docs/certificate.md` has the proof
and derives every constant below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carso_training.networks.layers import Mish, SoftThresholds, Standardise

UNIT = 2.0**-24  # the relative error of one float32 operation, at most
TINY = 2.0**-100  # more than all that can be lost to numbers too small for float32, in one sum
SIGMOID_ERROR = 2.0**-20  # of a computed sigmoid, in [0, 1], at most; tests measure it
TIE = 2.0**-16  # scores that differ by more than this have different probabilities, in the same order
MISH_LOWEST = (-1.1925, -1.1924)  # Mish is lowest between these two,
MISH_LEAST = -0.30885  # and nowhere below this
MOST_TERMS = 2**17  # in one sum, that the slack is derived for


class Box(NamedTuple):
    """All values between two ends."""

    lower: Tensor  # [B, ...]
    upper: Tensor  # [B, ...], >= lower
    nonnegative: bool = False  # whether it is known that no value is below 0, which saves operations


class UnboundedLayerError(Exception):
    """A chain of layers holds one that bounds cannot be taken through. The message names it."""


def box_of(images: Tensor, eps: Tensor) -> Box:
    """Return all images in [0, 1] that differ from `images` [B, *shape] by at most `eps` [B] >= 0 in every pixel.

    Every float32 image within `eps` lies in it, although the ends are rounded: rounding keeps the order of numbers.
    """
    radius = eps.view(-1, *[1] * (images.dim() - 1))
    return Box((images - radius).clamp(min=0.0), (images + radius).clamp(max=1.0), nonnegative=True)


def margins(layers: Sequence[nn.Module], box: Box, labels: Tensor, *, slack: bool) -> Tensor:
    """Return lower bounds [B, classes] of how far the score of `labels` [B] is above each class's, all over the box.

    A label's bound against itself is 0. Where all others are positive, every image of the box gets this label. With
    `slack` this holds for scores, and for their softmax, as float32 computes them. Raises UnboundedLayerError.
    """
    found = leads(layers, box, slack=slack)
    found = found.gather(1, labels.view(-1, 1, 1).expand(-1, 1, found.shape[2])).squeeze(1)
    return found.masked_fill(F.one_hot(labels, found.shape[1]).bool(), 0.0)


def largest_margin(layers: Sequence[nn.Module], box: Box) -> Tensor:
    """Return [B]: of the classes, the largest of the smallest leads over all others, with slack.

    At most one class can have none but positive leads. So if this is positive, it is the margin of the one label that
    every image of the box gets, as float32 computes it. Raises UnboundedLayerError.
    """
    found = leads(layers, box, slack=True)
    return (found + torch.eye(found.shape[1]) * torch.finfo().max).amin(dim=2).amax(dim=1)


def leads(layers: Sequence[nn.Module], box: Box, *, slack: bool) -> Tensor:
    """Return lower bounds [B, classes, classes] of score a minus score b all over the box, at [:, a, b].

    Those of a class over itself mean nothing. Raises UnboundedLayerError.
    """
    *before, last = layers
    if isinstance(last, nn.Linear):
        return _differences(last, propagate(before, box, slack=slack), slack=slack)
    ends = propagate(layers, box, slack=slack)
    found = ends.lower.unsqueeze(2) - ends.upper.unsqueeze(1)
    return found - 4 * UNIT * found.abs() - TIE if slack else found


def propagate(layers: Sequence[nn.Module], box: Box, *, slack: bool) -> Box:
    """Return a box that holds what the chain of `layers` gives on every point of `box`. Raises UnboundedLayerError."""
    for layer in layers:
        rule = RULES.get(type(layer))
        if rule is None:
            raise UnboundedLayerError(
                f"bounds cannot be taken through {type(layer).__name__}; they can be through "
                f"{', '.join(sorted(known.__name__ for known in RULES))}"
            )
        box = rule(layer, box, slack)
    return box


def _doubled(box: Box, terms: int, *, slack: bool) -> tuple[Tensor, Tensor]:
    """Return twice the centre of a box, and twice its radius with what rounding may add in a sum of `terms` products.

    Whoever halves the weights instead, which is exact, saves two operations.
    """
    centre = box.lower + box.upper
    if not slack:
        return centre, box.upper - box.lower
    share = 2 * _share(terms)
    if box.nonnegative:  # its size is its upper end
        return centre, (1 + share) * box.upper - box.lower
    return centre, box.upper - box.lower + share * _size(box)


def _size(box: Box) -> Tensor:
    """Return the largest absolute value in a box. This does not round."""
    return box.upper if box.nonnegative else torch.maximum(-box.lower, box.upper)


def _share(terms: int) -> float:
    """Return how much of the sum of all absolute terms the roundings of a linear layer can amount to."""
    if terms > MOST_TERMS:
        raise UnboundedLayerError(f"bounds are proven for sums of up to {MOST_TERMS} terms, and a layer has {terms}")
    return (4 * terms + 32) * UNIT


def _ends(centre: Tensor, radius: Tensor) -> Box:
    return Box(centre - radius, centre + radius)


def _linear(layer: nn.Linear, box: Box, slack: bool) -> Box:
    terms = layer.in_features
    centre, radius = _doubled(box, terms, slack=slack)
    half = layer.weight / 2
    return _ends(
        F.linear(centre, half, layer.bias),
        F.linear(radius, half.abs(), _bias_slack(layer, terms) if slack else None),
    )


def _convolution(layer: nn.Conv2d, box: Box, slack: bool) -> Box:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnboundedLayerError("bounds are taken through convolutions that are padded with a number of zeros only")
    terms = prod(layer.weight.shape[1:])
    centre, radius = _doubled(box, terms, slack=slack)
    half = layer.weight / 2
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    bias = _bias_slack(layer, terms) if slack else None
    return _ends(F.conv2d(centre, half, layer.bias, **how), F.conv2d(radius, half.abs(), bias, **how))


def _bias_slack(layer: nn.Linear | nn.Conv2d, terms: int) -> Tensor:
    bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.abs()
    return _share(terms) * bias + TINY


def _differences(last: nn.Linear, box: Box, *, slack: bool) -> Tensor:
    """Return lower bounds [B, classes, classes] of score a minus score b, at [:, a, b]."""
    terms, classes = last.in_features, last.out_features
    bias = last.weight.new_zeros(classes) if last.bias is None else last.bias
    half = _of_all_pairs(torch.sub, last.weight) / 2
    centre, radius = _doubled(box, terms, slack=False)
    below = F.linear(centre, half, _of_all_pairs(torch.sub, bias)) - F.linear(radius, half.abs())
    if slack:
        # each score is rounded by itself, so the slack is that of both and not of their difference
        share = _share(terms)
        weight, bias = (share * _of_all_pairs(torch.add, part.abs()) for part in (last.weight, bias))
        below = below - F.linear(_size(box), weight, bias + TINY + TIE)
    return below.unflatten(1, (classes, classes))


def _of_all_pairs(combine: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    """Combine each row [classes, ...] with each: [classes * classes, ...], the second row's index moving faster."""
    return combine(rows.unsqueeze(1), rows.unsqueeze(0)).flatten(0, 1)


def _monotone(layer: nn.Module, box: Box, slack: bool) -> Box:
    """Take both ends through a layer that keeps their order, also when it is rounded."""
    kept = isinstance(layer, nn.Flatten | nn.MaxPool2d | nn.LeakyReLU) and box.nonnegative
    return Box(layer(box.lower), layer(box.upper), nonnegative=kept or isinstance(layer, nn.ReLU))


def _leaky(layer: nn.LeakyReLU, box: Box, slack: bool) -> Box:
    if layer.negative_slope < 0:
        raise UnboundedLayerError(f"bounds need a LeakyReLU whose slope is not below 0, not {layer.negative_slope}")
    return _monotone(layer, box, slack)


def _soft_thresholds(layer: SoftThresholds, box: Box, slack: bool) -> Box:
    ends = layer(box.lower), layer(box.upper)
    low, high = torch.minimum(*ends), torch.maximum(*ends)  # a steepness may be negative
    if slack:  # a computed sigmoid is not below 0
        low, high = (low - 2 * SIGMOID_ERROR).clamp(min=0.0), high + 2 * SIGMOID_ERROR
    return Box(low, high, nonnegative=True)


def _mish(layer: Mish, box: Box, slack: bool) -> Box:
    ends = layer(box.lower), layer(box.upper)
    low, high = torch.minimum(*ends), torch.maximum(*ends)  # it falls, then rises: highest at an end
    first, last = MISH_LOWEST
    low = torch.where((box.lower < last) & (box.upper > first), torch.full_like(low, MISH_LEAST), low)
    if slack:
        room = 16 * SIGMOID_ERROR * torch.maximum(box.lower.abs(), box.upper.abs()) + TINY
        low, high = low - room, high + room
    return Box(low, high)


RULES: dict[type[nn.Module], Callable[..., Box]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ReLU: _monotone,
    nn.LeakyReLU: _leaky,
    nn.MaxPool2d: _monotone,
    nn.Flatten: _monotone,
    Standardise: _monotone,
    SoftThresholds: _soft_thresholds,
    Mish: _mish,
}
