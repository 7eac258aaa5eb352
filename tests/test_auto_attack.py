"""APGD and Square against the code of their authors (pyautoattack), on the published classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from carso.bundle import Bundle
from carso_training.attacks import METHODS
from carso_training.attacks.apgd import apgd_ce, apgd_t, ascend, cross_entropy, likeliest_others, targeted_dlr
from carso_training.attacks.square import margin, random_search, square
from carso_training.datasets import dataset
from carso_training.export import weights
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.square import SquareAttack
from torch import Tensor

PUBLISHED = Path(__file__).parents[1] / "models" / "mnist-fcn-published"
ROUNDING = 1e-6  # of float32 in x + eps - x


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    return weights.classifier_of(Bundle.load(PUBLISHED)).requires_grad_(False)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    examples = dataset("mnist").load("test")
    return examples.pixels(slice(300)), examples.labels[:300]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """An attack of ours, and the authors' of the same budget."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    disagree: float  # share of the images on which one is fooled and the other not, at most


def case_ce(*, eps: float, steps: int) -> Case:
    return Case(
        lambda c, x, y: apgd_ce(c, x, y, eps=eps, steps=steps, generator=seeded()),
        lambda c, x, y: APGDAttack(c, n_iter=steps, eps=eps, seed=0, loss="ce").perturb(x, y),
        disagree=0.03,
    )


def case_t(*, eps: float, steps: int, targets: int) -> Case:
    return Case(
        lambda c, x, y: apgd_t(c, x, y, eps=eps, steps=steps, targets=targets, generator=seeded()),
        lambda c, x, y: APGDAttack_targeted(c, n_iter=steps, eps=eps, seed=0, n_target_classes=targets).perturb(x, y),
        disagree=0.04,
    )


def case_square(*, eps: float, queries: int) -> Case:
    """Theirs draws one square for a whole batch, and never one that touches the lower or the right edge."""
    return Case(
        lambda c, x, y: square(c, x, y, eps=eps, queries=queries, generator=seeded()),
        lambda c, x, y: SquareAttack(c, n_queries=queries, eps=eps, seed=0, resc_schedule=True).perturb(x, y),
        disagree=0.12,
    )


QUICK = {
    "apgd-ce 0.30": case_ce(eps=0.30, steps=30),
    "apgd-t 0.30": case_t(eps=0.30, steps=30, targets=2),
    "square 0.30": case_square(eps=0.30, queries=200),
}
WHOLE = {
    f"{name} {eps}": case
    for eps in (0.10, 0.15, 0.30, 0.40)
    for name, case in (
        ("apgd-ce", case_ce(eps=eps, steps=100)),
        ("apgd-t", case_t(eps=eps, steps=100, targets=9)),
        ("square", case_square(eps=eps, queries=5000)),
    )
}


def compare(case: Case, classifier: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    """Both leave the same images standing, but for a few."""
    ours, theirs = (
        classifier(make(classifier, images, labels)).argmax(dim=1) == labels for make in (case.ours, case.theirs)
    )
    assert (ours != theirs).float().mean() <= case.disagree


@pytest.mark.parametrize("name", QUICK)
def test_an_attack_fools_the_images_that_the_authors_code_fools(classifier, digits, name):
    images, labels = (part[:100] for part in digits)
    compare(QUICK[name], classifier, images, labels)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_an_attack_is_as_strong_as_the_authors_code_at_its_full_budget(classifier, digits, name):
    compare(WHOLE[name], classifier, *digits)


ALL = {
    "apgd-ce": lambda c, x, y, eps, g: apgd_ce(c, x, y, eps=eps, steps=5, generator=g),
    "apgd-t": lambda c, x, y, eps, g: apgd_t(c, x, y, eps=eps, steps=5, targets=2, generator=g),
    "square": lambda c, x, y, eps, g: square(c, x, y, eps=eps, queries=30, generator=g),
    "random-search": lambda c, x, y, eps, g: random_search(c, x, y, eps=eps, queries=5, generator=g),
}


@pytest.mark.parametrize("name", ALL)
def test_an_attack_stays_in_the_ball_and_in_the_range_and_leaves_its_inputs_alone(classifier, digits, name):
    images, labels = (part[:20] for part in digits)
    before = images.clone()
    attacked = ALL[name](classifier, images, labels, 0.2, seeded())
    assert attacked.shape == images.shape
    assert attacked.dtype == torch.float32
    assert not attacked.requires_grad
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - images).abs().max() <= 0.2 + ROUNDING
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ALL)
def test_a_generator_decides_everything(classifier, digits, name):
    images, labels = (part[:20] for part in digits)
    one, same, other = (ALL[name](classifier, images, labels, 0.2, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_the_strength_may_differ_from_image_to_image(classifier, digits, name):
    images, labels = (part[:20] for part in digits)
    eps = torch.linspace(0.01, 0.3, 20).view(-1, 1, 1, 1)
    attacked = ALL[name](classifier, images, labels, eps, seeded())
    moved = (attacked - images).abs().flatten(1).amax(dim=1)
    assert (moved <= eps.flatten() + ROUNDING).all()
    assert (moved[-5:] > 0.1).all()


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "square", "random-search"])
def test_the_attacks_are_in_the_table_of_methods_with_the_settings_of_the_papers(name):
    assert METHODS[name].norm == "linf"
    assert METHODS[name].settings in ({"steps": 100}, {"steps": 100, "targets": 9}, {"queries": 5000})


def test_a_start_is_never_made_worse(classifier, digits):
    images, labels = (part[:20] for part in digits)
    start = square(classifier, images, labels, eps=0.3, queries=50, generator=seeded())
    result = ascend(classifier, images, labels, loss=cross_entropy, eps=0.3, steps=3, start=start, generator=seeded())
    before, after = (classifier(x).argmax(dim=1) == labels for x in (start, result))
    assert not (after & ~before).any()


def test_a_misclassified_image_of_lower_loss_is_kept_before_a_correct_one_of_higher():
    """Of two iterates the one that fools wins: the loss alone does not tell."""
    seen = []

    def scores(images: Tensor) -> Tensor:
        seen.append(images.detach())
        wrong = len(seen) == 1
        return torch.stack([images.sum((1, 2, 3)) * 0 + (0.0 if wrong else 1.0), images.sum((1, 2, 3))], dim=1)

    def loss(found: Tensor, labels: Tensor) -> Tensor:
        return found[:, 1] + (0.0 if len(seen) == 1 else 100.0)

    images = torch.full((1, 1, 2, 2), 0.1)
    result = ascend(scores, images, torch.zeros(1).long(), loss=loss, eps=0.05, steps=3, generator=seeded())
    assert torch.equal(result, seen[0])


def test_the_targeted_loss_is_that_of_the_paper_and_blind_to_shift_and_scale():
    scores = torch.tensor([[3.0, 1.0, 0.5, -1.0, -2.0]])
    label, target = torch.tensor([0]), torch.tensor([2])
    value = targeted_dlr(target)(scores, label)
    assert value.item() == pytest.approx(-(3.0 - 0.5) / (3.0 - (0.5 - 1.0) / 2))
    assert targeted_dlr(target)(7 * scores - 4, label).item() == pytest.approx(value.item())


def test_with_three_classes_the_targeted_loss_is_finite():
    value = targeted_dlr(torch.tensor([1]))(torch.tensor([[0.3, 0.2, 0.1]]), torch.tensor([0]))
    assert value.isfinite().all()


def test_targets_are_the_likeliest_other_classes():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.9, 0.1, 0.2, 0.3]])
    assert likeliest_others(scores, torch.tensor([1, 1]), count=2).tolist() == [[2, 3], [0, 3]]
    assert likeliest_others(scores, torch.tensor([1, 1]), count=9).shape == (2, 3)


def test_a_margin_is_negative_for_a_misclassified_image():
    scores = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    assert margin(scores, torch.tensor([1, 1])).tolist() == pytest.approx([0.8, -0.8])


def test_square_leaves_an_image_alone_once_its_goal_is_reached(classifier, digits):
    images, labels = (part[:20] for part in digits)
    asked = []

    def counting(x: Tensor) -> Tensor:
        asked.append(len(x))
        return classifier(x)

    square(counting, images, labels, eps=0.5, queries=300, goal=0.0, generator=seeded())
    assert asked[0] == 20
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] < 20
