"""Each attack against foolbox on the same classifier, and the promises that all of them make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import foolbox
import pytest
import torch
import torch.nn.functional as F
from carso_training.attacks import CLEAN, METHODS, Attack, attack_named, batches
from carso_training.attacks.deepfool import deepfool
from carso_training.attacks.fgsm import fgsm
from carso_training.attacks.linf import project
from carso_training.attacks.model import attacked_in_eval_mode
from carso_training.attacks.pgd import pgd
from carso_training.datasets import dataset
from carso_training.datasets.examples import Examples
from carso_training.networks.fcn import FcnClassifier
from carso_training.recipe import PRESETS
from carso_training.robustness.published import PUBLISHED_ATTACKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CONFIG = PRESETS["mnist-fcn"].classifier
ROUNDING = 1e-6  # of float32 in x + eps - x


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mnist() -> Examples:
    return dataset("mnist").load("test")


@pytest.fixture(scope="module")
def classifier(mnist) -> FcnClassifier:
    """Trained for seconds, on clean images only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = FcnClassifier(CONFIG)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
        for rows in torch.randperm(9000).repeat(8).split(256):
            optimizer.zero_grad()
            F.cross_entropy(classifier(mnist.pixels(rows)), mnist.labels[rows]).backward()
            optimizer.step()
    return classifier.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(mnist) -> Tensor:
    return mnist.pixels(slice(9000, 9200))


@pytest.fixture(scope="module")
def labels(mnist) -> Tensor:
    return mnist.labels[9000:9200]


def accuracy(classifier: FcnClassifier, images: Tensor, labels: Tensor) -> float:
    return (classifier(images).argmax(dim=1) == labels).float().mean().item()


def foolbox_deepfool(eps: float) -> Callable:
    attack = foolbox.attacks.LinfDeepFoolAttack(steps=50, overshoot=0.02)
    return lambda model, images, labels: project(attack(model, images, labels, epsilons=None)[0], images, eps)


def foolbox_descent(attack: foolbox.attacks.base.Attack, eps: float) -> Callable:
    return lambda model, images, labels: attack(model, images, labels, epsilons=eps)[1]


@dataclass(frozen=True)
class Case:
    """An attack of ours, and foolbox's of the same definition, from the same start."""

    ours: Attack
    theirs: Callable


FOOLBOX_PGD = foolbox.attacks.LinfPGD(abs_stepsize=0.01, steps=40, random_start=False)
CASES = {
    f"{kind} {eps}": Case(Attack(METHODS[kind], eps), theirs)
    for eps in (0.05, 0.15, 0.30, 0.50)
    for kind, theirs in (
        ("fgsm", foolbox_descent(foolbox.attacks.LinfFastGradientAttack(), eps)),
        ("pgd", foolbox_descent(FOOLBOX_PGD, eps)),
        ("deepfool", foolbox_deepfool(eps)),
    )
}


@pytest.fixture
def no_noise(monkeypatch):
    """The middle of the eps-ball as the random start of PGD."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 0.5))


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("name", CASES)
def test_an_attack_makes_the_images_that_foolbox_makes(classifier, images, labels, name):
    """All but a few pixels, where a gradient of all but zero has another sign in another order of summation."""
    case = CASES[name]
    ours = case.ours.images(classifier, images, labels)
    theirs = case.theirs(foolbox.PyTorchModel(classifier, bounds=(0, 1)), images, labels)
    assert ((ours - theirs).abs() > 1e-4).float().mean() < 1e-3
    assert accuracy(classifier, ours, labels) == pytest.approx(accuracy(classifier, theirs, labels), abs=0.011)


def test_a_random_start_is_as_strong_as_that_of_foolbox(classifier, images, labels):
    ours = pgd(classifier, images, labels, eps=0.05, generator=torch.Generator().manual_seed(0))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.01, steps=40, random_start=True)
    theirs = attack(foolbox.PyTorchModel(classifier, bounds=(0, 1)), images, labels, epsilons=0.05)[1]
    assert accuracy(classifier, ours, labels) == pytest.approx(accuracy(classifier, theirs, labels), abs=0.05)


@pytest.mark.parametrize("attack", PUBLISHED_ATTACKS, ids=lambda attack: attack.name)
def test_an_attacked_image_is_in_the_eps_ball_and_in_the_pixel_range(classifier, images, labels, attack):
    clean = images.clone()
    attacked = attack.images(classifier, images, labels)
    assert attacked.shape == images.shape
    assert attacked.dtype == torch.float32
    assert not attacked.requires_grad
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - images).abs().max() <= attack.eps + ROUNDING
    assert torch.equal(images, clean)  # the caller's images are left as they were


@pytest.mark.parametrize("attack", PUBLISHED_ATTACKS[1:], ids=lambda attack: attack.name)
def test_every_attack_of_the_table_fools_an_undefended_classifier(classifier, images, labels, attack):
    assert accuracy(classifier, images, labels) > 0.9
    assert accuracy(classifier, attack.images(classifier, images, labels), labels) < 0.3


def test_pgd_is_stronger_than_fgsm(classifier, images, labels):
    by_fgsm, by_pgd = (
        accuracy(classifier, Attack(METHODS[kind], 0.05).images(classifier, images, labels), labels)
        for kind in ("fgsm", "pgd")
    )
    assert by_pgd < by_fgsm


def test_deepfool_moves_less_than_fgsm_for_the_same_end(classifier, images, labels):
    distance = (deepfool(classifier, images, labels) - images).abs().flatten(1).amax(dim=1)
    assert distance.median() < 0.15


def test_deepfool_leaves_alone_what_is_misclassified_already(classifier, images, labels):
    predicted = classifier(images).argmax(dim=1)
    wrong = (torch.arange(len(images)) % 3 == 0) | (predicted != labels)
    claimed = torch.where(wrong & (predicted == labels), (labels + 1) % 10, labels)
    attacked = deepfool(classifier, images, claimed)
    assert torch.equal(attacked[wrong], images[wrong])
    moved = (attacked - images)[~wrong].abs().flatten(1).amax(dim=1)
    assert (moved > 0).all()


def test_deepfool_of_nothing_but_misclassified_images_returns_them(classifier, images):
    predicted = classifier(images).argmax(dim=1)
    assert torch.equal(deepfool(classifier, images, (predicted + 1) % 10), images)


def test_an_image_is_attacked_the_same_way_whatever_is_in_its_batch(classifier, images, labels):
    for attack in (attack_named("fgsm-0.30"), attack_named("deepfool-0.30")):
        together = attack.images(classifier, images[:20], labels[:20])
        parts = [attack.images(classifier, images[i : i + 1], labels[i : i + 1]) for i in range(20)]
        assert ((together - torch.cat(parts)).abs() > 1e-4).float().mean() < 1e-3


def test_one_call_with_an_eps_per_row_equals_two_calls(classifier, images, labels):
    eps = torch.tensor([0.15, 0.30]).repeat_interleave(len(images)).view(-1, 1, 1, 1)
    both = fgsm(classifier, images.repeat(2, 1, 1, 1), labels.repeat(2), eps=eps)
    one, other = (fgsm(classifier, images, labels, eps=value) for value in (0.15, 0.30))
    assert ((both - torch.cat([one, other])).abs() > ROUNDING).float().mean() < 1e-3


@pytest.mark.usefixtures("no_noise")
def test_one_call_of_pgd_with_an_eps_and_a_step_per_row_equals_two_calls(classifier, images, labels):
    eps = torch.tensor([0.15, 0.30]).repeat_interleave(len(images)).view(-1, 1, 1, 1)
    twice = images.repeat(2, 1, 1, 1)
    both = pgd(classifier, twice, labels.repeat(2), eps=eps, steps=5, step_size=eps / 2)
    one, other = (pgd(classifier, images, labels, eps=e, steps=5, step_size=e / 2) for e in (0.15, 0.30))
    assert ((both - torch.cat([one, other])).abs() > 1e-4).float().mean() < 1e-2


def test_a_generator_decides_the_start_of_pgd(classifier, images, labels):
    one, same, other = (
        pgd(classifier, images, labels, eps=0.1, steps=1, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@given(
    eps=st.floats(0, 1, width=32),
    image=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    moved=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
)
@settings(max_examples=200)
def test_a_projection_is_the_nearest_image_of_ball_and_range(eps, image, moved):
    image, moved = torch.tensor(image), torch.tensor(moved)
    nearest = project(moved, image, eps)
    allowed = [torch.tensor(sorted({max(x - eps, 0.0), min(x + eps, 1.0)})) for x in image.tolist()]
    for point, value, bounds in zip(moved.tolist(), nearest.tolist(), allowed, strict=True):
        expected = min(max(point, bounds.min().item()), bounds.max().item())
        assert value == pytest.approx(expected, abs=ROUNDING)
    assert torch.equal(project(nearest, image, eps), nearest)


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "deepfool"])
@pytest.mark.parametrize("training", [True, False])
def test_making_attacks_changes_nothing_of_the_model(mnist, kind, training):
    torch.manual_seed(0)
    model = FcnClassifier(CONFIG).train(training)
    model.hidden[0].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    required = [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with attacked_in_eval_mode(model) as attacked:
        assert not attacked.training
        assert not any(p.requires_grad for p in attacked.parameters())
        Attack(METHODS[kind], 0.3).images(attacked, mnist.pixels(slice(32)), mnist.labels[:32])

    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_model_comes_back_as_it_was_after_an_error_too():
    model = FcnClassifier(CONFIG).train()
    with pytest.raises(RuntimeError, match="out of memory"), attacked_in_eval_mode(model):
        raise RuntimeError("out of memory")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_rows_of_the_published_table_have_names_of_their_own():
    names = [attack.name for attack in PUBLISHED_ATTACKS]
    assert names[0] == "clean"
    assert "pgd-0.30" in names
    assert len(set(names)) == len(names) == 10


@given(method=st.sampled_from(sorted(METHODS)), eps=st.floats(1e-4, 1))
def test_a_name_reads_back_to_the_attack_that_has_it(method, eps):
    attack = Attack(METHODS[method], 0.0 if method == "none" else float(f"{eps:.3g}"))
    assert attack_named(attack.name) == attack


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pgd", "there is no attack 'pgd'"),
        ("foo-0.30", "one of .*fgsm.*as in fgsm-0.15"),
        ("none-0.30", "there is no attack"),
        ("pgd-much", "ends in 'much', which is not an eps"),
        ("pgd-0.00", "ends in '0.00'; an eps is a positive number"),
        ("pgd-nan", "an eps is a positive number"),
        ("pgd-0.3", "is written 'pgd-0.30'"),
        ("", "there is no attack ''"),
    ],
)
def test_a_name_of_no_attack_is_refused_with_what_is_wrong(name, reason):
    with pytest.raises(ValueError, match=reason):
        attack_named(name)


def test_a_threat_records_how_strong_the_attack_was():
    threat = attack_named("pgd-0.30").threat("classifier")
    assert (threat.attack, threat.norm, threat.eps, threat.sees) == ("pgd", "linf", 0.30, "classifier")
    assert threat.settings == {"steps": 40, "step_size": 0.01}
    assert CLEAN.threat("classifier").sees == "nothing"


def test_batches_come_in_the_order_of_the_data_and_a_seed_decides_them(classifier, mnist, monkeypatch):
    monkeypatch.setattr(batches, "BATCH", 30)
    data = mnist[slice(70)]
    one, same, other = (
        torch.cat([*batches.attacked_batches(classifier, Attack(METHODS["pgd"], 0.01), data, seed=seed, quiet=True)])
        for seed in (1, 1, 2)
    )
    assert (one - data.pixels()).abs().max() <= 0.01 + ROUNDING
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
