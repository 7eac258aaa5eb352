"""The last stage of a hardened recipe: all networks trained together, on real MNIST."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from carso.bundle import Bundle, Cell, Threat, sealed
from carso.inference.sessions import Sessions
from carso_training.datasets import dataset
from carso_training.datasets.examples import Examples
from carso_training.export import weights
from carso_training.export.files import export
from carso_training.fitting import hardened
from carso_training.fitting.hardened import Hardened, attacked_images, harden
from carso_training.fitting.optimizers import optimizers_of
from carso_training.networks import build_classifier, build_purifier
from carso_training.recipe import PRESETS, Recipe, Schedule
from carso_training.robustness.card import model_card
from carso_training.robustness.system import system_of
from carso_training.run import Run
from lightning_fabric import Fabric
from pydantic import ValidationError
from torch import Tensor

from tests.recipes import SMALL_NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"epochs": 1, "peak_lr": 0.01, "batch_size": 64, "averaging": 0.9}
TINY = {
    "name": "tiny-hardened",
    "train_images": 300,
    "validation_images": 60,
    "test_images": 12,
    **SMALL_NETWORKS,
    "undefended": SHORT,
    "adversarial": SHORT,
    "foreseen": {"clean": 1.0, "fgsm-0.15": 1.0},
    "purification": SHORT,
    "hardening": {
        "schedule": SHORT | {"epochs": 2, "batch_size": 100, "peak_lr": 0.003, "optimizer": "muon"},
        "first_pass_images": 30,
        "steps": 2,
    },
    "samples": 20,
}
RECIPE = Recipe.model_validate(TINY)
SMALLER = {"network": "fcn", "hidden": [7]}  # a second pass
EPOCHS, STEPS = 2, 3  # 300 images in batches of 100
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def opened(one_thread, tmp_path_factory) -> Run:
    """A run whose networks are trained and whose bundle is exported."""
    folder = tmp_path_factory.mktemp("hardened")
    dataset("mnist").ensure()
    train, test = (dataset("mnist").load(split) for split in ("train", "test"))
    run = Run(RECIPE, folder, Fabric(accelerator="cpu", devices=1), train=train, test=test)
    run.export(run.train())
    return run


@pytest.fixture(scope="module")
def bundle(opened) -> Bundle:
    return Bundle.load(opened.folder.bundle)


@pytest.fixture
def networks(opened) -> dict[str, torch.nn.Module]:
    """The classifier and the purifier that the hardening starts from."""
    return {"classifier": opened._classifier("adversarial"), "purifier": opened._purifier()}


def hardened_again(opened: Run, networks: dict, folder: Path) -> bytes:
    images = {"train": opened.training, "held_out": opened.validation}
    harden(opened.fabric, RECIPE, **networks, **images, folder=folder)
    return (folder / "weights.safetensors").read_bytes()


def rows_of(images: Tensor) -> set[bytes]:
    return {(image * 255).round().to(torch.uint8).numpy().tobytes() for image in images}


@pytest.mark.parametrize("moment", [2, 2 * STEPS + 2, 4 * STEPS])
def test_a_hardening_that_was_cut_off_ends_in_the_same_weights(opened, networks, tmp_path, monkeypatch, moment):
    left = moment  # batches of attacks: two a step, and those of the figures of each epoch

    def cut(*arguments, **settings):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return attacked_images(*arguments, **settings)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(hardened, "attacked_images", cut)
        hardened_again(opened, networks, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()
    assert hardened_again(opened, networks, tmp_path) == opened.folder.weights("hardening").read_bytes()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + EPOCHS


def test_a_finished_hardening_is_not_done_again(opened, monkeypatch):
    monkeypatch.setattr(hardened, "attacked_images", None)
    opened.train()


def test_held_out_images_are_never_in_a_batch(opened, networks, tmp_path, monkeypatch):
    seen: list[Tensor] = []
    forward = Hardened.forward

    def spying(self, images: Tensor, latents: Tensor):
        assert self.training
        seen.append(images)
        return forward(self, images, latents)

    monkeypatch.setattr(Hardened, "forward", spying)
    hardened_again(opened, networks, tmp_path)
    batches = set().union(*map(rows_of, seen))
    held_out, training = rows_of(opened.validation.pixels()), rows_of(opened.training.pixels())
    assert len(seen) == EPOCHS * STEPS
    assert not batches & held_out
    assert training <= batches
    assert len(batches) > 2 * len(training)  # clean, and attacked


def test_what_is_used_online_is_trained_and_the_rest_stays_as_it_was(opened, networks):
    trained = opened._trained()
    before, after = networks["purifier"].state_dict(), trained.purifier.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"code_encoder", "decoder"}
    first, second = trained.classifier.state_dict(), trained.second_pass.state_dict()
    for name, start in networks["classifier"].named_parameters():
        assert not torch.equal(first[name], start) and not torch.equal(second[name], start)


def test_the_second_pass_of_the_bundle_is_a_classifier_of_its_own_and_the_service_starts_with_it(bundle):
    assert weights.SECOND_PASS in bundle.manifest.files
    Sessions(bundle, device="cpu", threads=1)  # raises if the graphs do not give the known answers
    system = system_of(bundle)
    images = torch.from_numpy(bundle.self_test.images)
    first, second = (part(images)[0] for part in (system.first_pass, system.second_pass))
    assert (first - second).abs().max() > 0.01
    _, votes = system.vote(
        system.encode(images)[1][torch.from_numpy(bundle.self_test.code_index)],
        torch.from_numpy(bundle.self_test.latents),
    )
    assert np.mean(votes[0].argmax(dim=1).numpy() == bundle.self_test.votes) > 0.98


def test_a_smaller_second_pass_is_trained_from_fresh_weights_and_votes(opened, tmp_path):
    smaller = Recipe.model_validate(TINY | {"second_pass": SMALLER})
    train, test = (dataset("mnist").load(split) for split in ("train", "test"))
    run = Run(smaller, tmp_path / "run", opened.fabric, train=train, test=test)
    for stage in ("undefended", "adversarial", "purifier"):
        shutil.copytree(opened.folder.stage(stage), run.folder.stage(stage))
    second_pass = run.train().second_pass
    found, start = second_pass.state_dict(), hardened.begun_second_pass(smaller, second_pass).state_dict()
    assert [tuple(found[name].shape) for name in ("hidden.0.weight", "last.weight")] == [(7, 784), (10, 7)]
    assert not torch.equal(found["last.weight"], start["last.weight"])

    trained = run.train()  # reads what is there
    pixels = opened.validation.pixels(slice(8))
    parts = {"classifier": trained.classifier, "purifier": trained.purifier, "second_pass": trained.second_pass}
    export(**parts, images=pixels, folder=tmp_path / "bundle")
    others = Bundle.load(opened.folder.bundle).manifest.model_dump(exclude={"schema_version", "files"})
    sealed(tmp_path / "bundle", others | {"recipe": smaller.model_dump(mode="json")})
    bundle = Bundle.load(tmp_path / "bundle")
    Sessions(bundle, device="cpu", threads=1)  # raises if the graphs do not give the known answers
    torch.testing.assert_close(weights.second_pass_of(bundle)(pixels), second_pass(pixels))
    torch.testing.assert_close(weights.classifier_of(bundle)(pixels), trained.classifier(pixels))


def test_the_bundle_says_how_it_was_trained_and_its_table_is_of_the_hardened_networks(opened, bundle):
    assert Recipe.model_validate(bundle.manifest.recipe) == RECIPE
    card = (opened.folder.bundle / "MODEL_CARD.md").read_text()
    assert "*hardened*" in card and "eps 0.15 or 0.34" in card and "*IAT* is the hardened first pass" in card
    clean = next(c for c in bundle.manifest.table if c.defence == "classifier" and c.threat.name == "clean")
    classifier = opened._trained().classifier
    right = classifier(opened.test.pixels()).argmax(dim=1) == opened.test.labels
    assert clean.correct == right.sum().item()


def test_the_card_of_a_published_system_does_not_speak_of_hardening(bundle):
    published = RECIPE.model_copy(update={"hardening": None})
    assert "*hardened*" not in model_card(published, bundle.manifest.table, risk=1e-6)


def test_the_card_says_how_a_first_pass_was_trained_that_stays_as_it_is(bundle):
    for preset, how in (
        ("mnist-conv", "by strong attacks alone"),
        ("mnist-certified", "for interval bounds up to eps 0.40"),
    ):
        card = model_card(PRESETS[preset], bundle.manifest.table, risk=1e-6)
        assert f"The classifier of the first pass was trained {how}" in card


def test_the_card_says_what_is_proven(bundle):
    threat = Threat(attack="certified", norm="linf", eps=0.30, sees="classifier")
    proven = Cell(defence="classifier", threat=threat, correct=884, images=1000, published=None)
    assert "| eps 0.30 | 88.40 [86.27, 90.24] |" in model_card(PRESETS["mnist-certified"], [proven], risk=1e-6)
    assert "*proven*" not in model_card(PRESETS["mnist-certified"], bundle.manifest.table, risk=1e-6)


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def some(opened) -> Examples:
    return opened.validation[slice(40)]


def attack(network: Hardened, data: Examples, *, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    eps = hardened.strengths(((0.1, 0.5), (0.3, 0.5)), len(data), generator)
    scores = hardened._one_vote(network.system().to(dtype), len(data), generator)
    made = attacked_images(scores, data.pixels(), data.labels, eps=eps, steps=steps, generator=generator)
    return scores, eps, made


def fresh(seed: int = 0) -> Hardened:
    torch.manual_seed(seed)
    classifier = build_classifier(RECIPE.classifier)
    second_pass = hardened.begun_second_pass(RECIPE, classifier)
    return hardened._prepared(classifier, build_purifier(RECIPE.purifier), second_pass, first_pass=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attacks_stay_in_their_balls_and_in_range(some, dtype):
    _, eps, made = attack(fresh(), some, steps=3, dtype=dtype)
    assert sorted(set(eps.flatten().tolist())) == pytest.approx([0.1, 0.3])
    assert made.shape == some.pixels().shape and made.dtype == torch.float32
    assert made.min() >= 0 and made.max() <= 1
    assert ((made - some.pixels()).abs() <= eps + ROUNDING).all()
    assert ((made - some.pixels()).abs().amax(dim=(1, 2, 3)) > 0.9 * eps.flatten()).all()


def test_attacks_raise_the_loss_and_a_seed_decides_them(some):
    shipped = Bundle.load(Path(__file__).parents[1] / "models" / "mnist-fcn")
    classifier = weights.classifier_of(shipped)
    network = Hardened(classifier=classifier, purifier=weights.purifier_of(shipped), second_pass=classifier)
    scores, _, made = attack(network, some, steps=7)
    _, _, same = attack(network, some, steps=7)
    _, _, other = attack(network, some, steps=7, seed=1)
    clean, attacked = (F.cross_entropy(scores(x), some.labels).item() for x in (some.pixels(), made))
    assert attacked > 5 * clean
    assert torch.equal(made, same) and not torch.equal(made, other)


def test_an_attack_leaves_the_networks_as_they_are_and_ready_to_train(some):
    network = fresh().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    attack(network, some, steps=2, dtype=torch.bfloat16)
    after = network.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    assert network.training and network.purifier.decoder[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_hardened_preset_is_the_published_one_and_one_stage_more():
    published, preset = PRESETS["mnist-fcn-published"], PRESETS["mnist-fcn"]
    assert preset.model_copy(update={"name": published.name, "hardening": None}) == published
    assert published.hardening is None


MISTAKES = {
    "no strength": ({"eps": []}, "hardening.eps"),
    "shares of nothing": ({"eps": [[0.1, 0]]}, "the shares add up to 0"),
    "too strong": ({"first_pass_eps": [[1.5, 1]]}, "hardening.first_pass_eps"),
    "no steps": ({"steps": 0}, "hardening.steps"),
    "an unknown optimizer": ({"schedule": SHORT | {"optimizer": "sgd"}}, "hardening.schedule.optimizer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_hardening_is_named(mistake):
    change, reason = MISTAKES[mistake]
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(TINY | {"hardening": TINY["hardening"] | change})


SECOND_PASSES = {
    "without a hardening": ({"second_pass": SMALLER, "hardening": None}, "second_pass is trained by hardening only"),
    "of another shape": ({"second_pass": SMALLER | {"input_shape": [1, 8, 8]}}, "second_pass.input_shape is"),
    "of other classes": ({"second_pass": SMALLER | {"classes": 3}}, "second_pass.classes is 3; it must be 10"),
    "of an unknown network": ({"second_pass": {"network": "tree"}}, "there is no network 'tree'"),
}


@pytest.mark.parametrize("mistake", SECOND_PASSES)
def test_a_mistake_in_a_second_pass_is_named(mistake):
    change, reason = SECOND_PASSES[mistake]
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(TINY | change)


@pytest.mark.parametrize("optimizer", ["radam", "adamw", "muon"])
def test_each_trained_parameter_has_one_optimizer_and_the_others_have_none(optimizer):
    network = fresh()
    schedule = Schedule(epochs=1, peak_lr=0.1, optimizer=optimizer)
    found = [p for part in optimizers_of(network, schedule) for group in part.param_groups for p in group["params"]]
    wanted = [p for p in network.parameters() if p.requires_grad]
    assert sorted(map(id, found)) == sorted(map(id, wanted))
    assert 0 < len(wanted) < len([*network.parameters()])
