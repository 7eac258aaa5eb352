"""Interval bounds hold for what float32 computes: against exact arithmetic, points in the box, and planted mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from carso_training.attacks.linf import climb, random_start
from carso_training.networks import bounds, build_classifier, classifier_config
from carso_training.networks.bounds import Box, UnboundedLayerError, box_of, largest_margin, margins, propagate
from carso_training.networks.layers import Mish, SoftThresholds, Standardise
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

Exact = list[Fraction]


def line(*widths: int, scale: float = 1.0, between: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    """Linear layers of these widths with an activation between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), between()]
        nn.init.normal_(layers[-2].weight, std=scale)
        nn.init.normal_(layers[-2].bias, std=scale)
    return layers[:-1]


def exact(layer: nn.Linear, point: Exact) -> Exact:
    """What a linear layer gives in rational arithmetic, which does not round."""
    rows = [[Fraction(w) for w in row] for row in layer.weight.tolist()]
    return [
        sum((w * x for w, x in zip(row, point, strict=True)), Fraction(b))
        for row, b in zip(rows, layer.bias.tolist(), strict=True)
    ]


def exact_scores(layers: Sequence[nn.Module], point: Exact) -> Exact:
    """What a chain of Linear and ReLU gives in rational arithmetic."""
    for layer in layers:
        point = exact(layer, point) if isinstance(layer, nn.Linear) else [max(x, Fraction(0)) for x in point]
    return point


def exact_box(layers: Sequence[nn.Module], low: Exact, high: Exact) -> tuple[Exact, Exact]:
    """The interval bounds of a chain of Linear and ReLU in rational arithmetic."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            rows = [[Fraction(w) for w in row] for row in layer.weight.tolist()]
            biases = [Fraction(b) for b in layer.bias.tolist()]
            ends = [[min(w * a, w * b) for w, a, b in zip(row, low, high, strict=True)] for row in rows]
            other = [[max(w * a, w * b) for w, a, b in zip(row, low, high, strict=True)] for row in rows]
            low = [sum(row, b) for row, b in zip(ends, biases, strict=True)]
            high = [sum(row, b) for row, b in zip(other, biases, strict=True)]
        else:
            low, high = ([max(x, Fraction(0)) for x in end] for end in (low, high))
    return low, high


def fractions(values: Tensor) -> Exact:
    return [Fraction(value) for value in values.flatten().tolist()]


def check_against_exact_arithmetic(*, networks: int) -> None:
    """The exact bounds of small random networks lie inside the computed ones, and so do exact points; else it fails."""
    for seed in range(networks):
        torch.manual_seed(seed)
        layers = line(6, 9, 8, 4, scale=10.0 ** (seed % 3 - 1))
        image = torch.rand(1, 6)
        eps = torch.tensor([0.0, 1e-3, 0.2][seed % 3]).view(1)
        with torch.no_grad():
            box = box_of(image, eps)
            found = propagate(layers, box, slack=True)
            label = found.lower.argmax(dim=1)
            lead = margins(layers, box, label, slack=True)
        low, high = exact_box(layers, fractions(box.lower), fractions(box.upper))
        assert all(a <= b for a, b in zip(fractions(found.lower), low, strict=True)), f"network {seed}, lower"
        assert all(a >= b for a, b in zip(fractions(found.upper), high, strict=True)), f"network {seed}, upper"
        for corner in (box.lower, box.upper, image):
            scores = exact_scores(layers, fractions(corner))
            exact_lead = [scores[int(label)] - score for score in scores]
            assert all(a <= b for a, b in zip(fractions(lead), exact_lead, strict=True)), f"network {seed}, margin"


def test_the_bounds_contain_those_of_exact_arithmetic():
    with torch.no_grad():
        check_against_exact_arithmetic(networks=60)


def test_a_planted_radius_without_absolute_weights_is_caught(monkeypatch):
    def wrong(layer: nn.Linear, box: Box, slack: bool) -> Box:
        centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        centre, radius = layer(centre), F.linear(radius, layer.weight)
        return Box(centre - radius.abs(), centre + radius.abs())

    monkeypatch.setitem(bounds.RULES, nn.Linear, wrong)
    with pytest.raises(AssertionError), torch.no_grad():
        check_against_exact_arithmetic(networks=60)


@pytest.mark.parametrize("share", [lambda terms: 0.0, lambda terms: -4 * terms * bounds.UNIT])
def test_a_planted_slack_that_is_left_out_or_points_inward_is_caught(monkeypatch, share):
    monkeypatch.setattr(bounds, "_share", share)
    monkeypatch.setattr(bounds, "TINY", 0.0)
    with pytest.raises(AssertionError), torch.no_grad():
        check_against_exact_arithmetic(networks=60)


def small_convolutional() -> list[nn.Module]:
    """Every layer that bounds can be taken through."""
    torch.manual_seed(3)
    return [
        SoftThresholds(1, 2, steepness=20.0),
        nn.Conv2d(2, 6, 4, stride=2, padding=1),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        Mish(),
        nn.Flatten(),
        nn.Linear(8 * 9, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ]


def fully_connected() -> list[nn.Module]:
    """Standardised images, and an activation at the end."""
    torch.manual_seed(4)
    return [Standardise(mean=0.13, std=0.3), nn.Flatten(), *line(144, 30, 5, scale=0.2, between=Mish), Mish()]


NETWORKS = {"convolutional": small_convolutional, "fully connected": fully_connected}


def run(layers: Sequence[nn.Module], images: Tensor) -> Tensor:
    for layer in layers:
        images = layer(images)
    return images


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.02, 0.3])
def test_what_float32_computes_on_points_of_the_box_lies_within_the_bounds(name, eps):
    layers, generator = NETWORKS[name](), torch.Generator().manual_seed(5)
    image = torch.rand(1, 1, 12, 12, generator=generator)
    with torch.no_grad():
        box = box_of(image, torch.tensor([eps]))
        inside = random_start(image.repeat(400, 1, 1, 1), torch.tensor(eps), generator=generator)
        corners = torch.where(torch.rand(inside.shape, generator=generator) < 0.5, box.lower, box.upper)
        points = torch.cat([image, box.lower, box.upper, inside, corners]).clamp(box.lower, box.upper)
        for depth in range(1, len(layers) + 1):
            found = propagate(layers[:depth], box, slack=True)
            seen = run(layers[:depth], points)
            assert (found.lower <= seen).all() and (seen <= found.upper).all(), layers[depth - 1]
            # one image at a time: other sums, which round otherwise
            alone = torch.cat([run(layers[:depth], point.unsqueeze(0)) for point in points[:20]])
            assert (found.lower <= alone).all() and (alone <= found.upper).all(), layers[depth - 1]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_attack_goes_below_a_margin(name):
    layers, generator = NETWORKS[name](), torch.Generator().manual_seed(6)
    images = torch.rand(40, 1, 12, 12, generator=generator)
    eps = torch.full((40,), 0.03)
    with torch.no_grad():
        labels = run(layers, images).argmax(dim=1)
        proven = margins(layers, box_of(images, eps), labels, slack=True)

    def lead(x: Tensor) -> Tensor:
        scores = run(layers, x)
        return scores.gather(1, labels.unsqueeze(1)) - scores

    for other in range(5):
        attacked = climb(
            lambda x, other=other: -lead(x)[:, other],
            images,
            images,
            eps=eps.view(-1, 1, 1, 1),
            steps=20,
            step_size=eps.view(-1, 1, 1, 1) / 8,
        )
        box = box_of(images, eps)
        with torch.no_grad():
            assert (lead(attacked.clamp(box.lower, box.upper))[:, other] >= proven[:, other]).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_largest_margin_is_that_of_the_one_label_that_can_be_proven(name):
    layers, generator = NETWORKS[name](), torch.Generator().manual_seed(7)
    images = torch.rand(60, 1, 12, 12, generator=generator)
    proven = 0
    for eps in (0.0, 1e-3, 0.01):
        with torch.no_grad():
            box = box_of(images, torch.full((60,), eps))
            found = largest_margin(layers, box)
            by_class = torch.stack(
                [margins(layers, box, torch.full((60,), label), slack=True) for label in range(5)], 1
            )
            by_class += torch.eye(5) * 1e9
            labels = run(layers, images).argmax(dim=1)
        smallest = by_class.amin(dim=2)
        torch.testing.assert_close(found, smallest.amax(dim=1), rtol=0, atol=0)
        is_proven = found > 0
        assert torch.equal(smallest[is_proven].argmax(dim=1), labels[is_proven])
        assert ((smallest > 0).sum(dim=1) == is_proven).all()
        proven += int(is_proven.sum())
    assert 20 < proven < 180


def test_the_slack_is_small_beside_the_margins_of_real_numbers():
    layers = small_convolutional()
    images, labels = torch.rand(20, 1, 12, 12), torch.zeros(20, dtype=torch.int64)
    with torch.no_grad():
        box = box_of(images, torch.full((20,), 0.1))
        real, computed = (margins(layers, box, labels, slack=slack) for slack in (False, True))
    other = [1, 2, 3, 4]
    assert (computed[:, other] < real[:, other]).all()
    torch.testing.assert_close(computed, real, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("steepness", [-30.0, 30.0])
def test_a_soft_threshold_may_fall_instead_of_rise(steepness):
    layer = SoftThresholds(1, 2, steepness=steepness)
    lower, upper, _ = propagate([layer], box_of(torch.full((1, 1, 1, 1), 0.5), torch.tensor([0.1])), slack=False)
    assert (lower < upper).all()


def test_mish_is_at_its_lowest_inside_a_box_that_holds_the_lowest_point():
    ends = Box(torch.tensor([[-3.0, -3.0, -1.0, -1.3]]), torch.tensor([[2.0, -1.5, 4.0, -1.1]]))
    lower, upper, _ = propagate([Mish()], ends, slack=False)
    grid = torch.linspace(0, 1, 10001).unsqueeze(1)
    seen = Mish()(ends.lower + grid * (ends.upper - ends.lower))
    torch.testing.assert_close(lower[0], seen.min(dim=0).values, atol=2e-5, rtol=0)
    torch.testing.assert_close(upper[0], seen.max(dim=0).values, atol=1e-5, rtol=0)
    assert (lower[0] <= seen.min(dim=0).values).all()


def test_the_box_of_an_image_ends_at_black_and_white():
    lower, upper, _ = box_of(torch.tensor([[0.0, 0.1, 0.95]]), torch.tensor([0.2]))
    np.testing.assert_allclose(lower, [[0.0, 0.0, 0.75]])
    np.testing.assert_allclose(upper, [[0.2, 0.3, 1.0]])


def test_pytorchs_sigmoid_is_as_near_to_the_exact_one_as_the_proof_needs():
    x = torch.linspace(-90, 90, 3_000_001)
    assert (torch.sigmoid(x).double() - torch.sigmoid(x.double())).abs().max() <= 2.0**-21


def test_both_architectures_give_a_chain_that_computes_their_scores():
    facts = {"input_shape": (1, 28, 28), "classes": 10, "mean": 0.1307, "std": 0.3081}
    images = torch.rand(4, 1, 28, 28)
    for network in ({"network": "fcn"}, {"network": "conv"}, {"network": "conv", "thresholds": 0}):
        classifier = build_classifier(classifier_config(network | facts)).eval()
        with torch.no_grad():
            torch.testing.assert_close(F.log_softmax(run(classifier.chain(), images), dim=1), classifier(images))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Tanh(), "bounds cannot be taken through Tanh; they can be through Conv2d, Flatten"),
        (nn.LeakyReLU(-0.1), "whose slope is not below 0, not -0.1"),
        (nn.Conv2d(1, 1, 3, padding="same"), "padded with a number of zeros"),
        (nn.Conv2d(1, 1, 3, padding_mode="circular"), "padded with a number of zeros"),
        (nn.Linear(2**17 + 1, 1), "sums of up to 131072 terms, and a layer has 131073"),
    ],
)
def test_a_layer_without_bounds_is_refused_by_name(layer, why):
    shape = (1, layer.in_features) if isinstance(layer, nn.Linear) else (1, 1, 6, 6)
    with pytest.raises(UnboundedLayerError, match=why):
        propagate([layer], box_of(torch.rand(shape), torch.tensor([0.1])), slack=True)
