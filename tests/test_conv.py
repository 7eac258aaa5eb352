"""The convolutional networks, and the recipe's other ways to train: by strong attacks, and with a frozen first pass."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from carso.bundle import Bundle
from carso.inference.sessions import Sessions
from carso_training.datasets import dataset
from carso_training.export import weights
from carso_training.fitting.checkpoints import load_weights
from carso_training.networks import build_classifier, build_purifier, classifier_config, purifier_config
from carso_training.networks.conv import ConvClassifier
from carso_training.networks.layers import SoftThresholds
from carso_training.recipe import PRESETS, Recipe
from carso_training.robustness.system import system_of
from carso_training.run import Run
from lightning_fabric import Fabric
from pydantic import ValidationError

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"epochs": 1, "peak_lr": 2e-3, "batch_size": 64, "averaging": 0.9, "optimizer": "adamw"}
TINY = {
    "name": "tiny-conv",
    "train_images": 192,
    "validation_images": 40,
    "test_images": 8,
    "classifier": {"network": "conv", "channels": [8, 12], "hidden": 20},
    "purifier": {"network": "conv", "latent": 6, "code_encoder": [20, 8], "channels": [8, 6]},
    "undefended": SHORT,
    "adversarial": SHORT | {"epochs": 2},
    "robust_training": {"eps": [[0.1, 0.5], [0.2, 0.5]], "steps": 2, "rise": 0.5},
    "foreseen": {"clean": 1.0, "fgsm-0.30": 1.0},
    "purification": SHORT,
    "hardening": {"schedule": SHORT, "first_pass_images": 8, "steps": 2, "train_first_pass": False},
    "samples": 20,
}
RECIPE = Recipe.model_validate(TINY)
FACTS = {"input_shape": (1, 28, 28), "classes": 10, "mean": 0.1307, "std": 0.3081}


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory) -> Run:
    """A run whose networks are trained and whose bundle is exported."""
    dataset("mnist").ensure()
    train, test = (dataset("mnist").load(split) for split in ("train", "test"))
    run = Run(RECIPE, tmp_path_factory.mktemp("conv"), Fabric(accelerator="cpu", devices=1), train=train, test=test)
    run.export(run.train())
    return run


def metrics(run: Run, stage: str) -> list[dict[str, str]]:
    with (run.folder.stage(stage) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_white_pixel_keeps_its_gradient_in_bfloat16():
    thresholds = SoftThresholds(channels=1, count=2).bfloat16()
    torch.nn.init.constant_(thresholds.steepness, 20.0)  # training makes them steeper
    images = torch.ones(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    thresholds(images).sum().backward()
    assert (images.grad > 0).all()


@pytest.mark.slow
def test_a_bundle_of_convolutional_networks_computes_what_the_networks_do(run):
    bundle = Bundle.load(run.folder.bundle)
    sessions = Sessions(bundle, device="cpu", threads=1)
    trained = run._trained()
    images = run.test.pixels()
    latents = torch.randn(40, bundle.manifest.latent, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(40) % len(images)
    with torch.no_grad():
        first = trained.classifier.represent(images)
        codes = trained.purifier.encode(first.representation)
        expected = trained.second_pass(trained.purifier.decode(codes[rows], latents)).argmax(dim=1)
    found = sessions.first_pass(images.numpy())
    np.testing.assert_allclose(found.probabilities, first.log_probs.exp(), atol=1e-5)
    np.testing.assert_allclose(found.codes, codes, atol=1e-5)
    assert (sessions.vote(found.codes, rows.numpy(), latents.numpy()) == expected.numpy()).mean() > 0.95


@pytest.mark.slow
def test_the_attackers_copy_of_a_convolutional_system_votes_as_its_graphs_do(run):
    bundle = Bundle.load(run.folder.bundle)
    images = run.test.pixels()
    raw, codes = system_of(bundle).encode(images)
    found = Sessions(bundle, device="cpu", threads=1).first_pass(images.numpy())
    np.testing.assert_allclose(found.codes, codes, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, raw.softmax(dim=1), atol=1e-5)


@pytest.mark.slow
def test_a_first_pass_that_is_not_trained_stays_as_it_is_while_the_second_one_learns(run):
    before = build_classifier(RECIPE.classifier)
    load_weights(before, run.folder.weights("adversarial"))
    bundle = Bundle.load(run.folder.bundle)
    first, second = weights.classifier_of(bundle).state_dict(), weights.second_pass_of(bundle).state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in before.state_dict().items())
    assert not torch.equal(first["last.weight"], second["last.weight"])


@pytest.mark.slow
def test_training_by_strong_attacks_logs_both_losses_and_its_own_quick_attacks(run):
    rows = metrics(run, "adversarial")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"loss_clean", "loss_attacked", "clean", "pgd-0.15", "pgd-0.30"} <= rows[0].keys()


def test_soft_thresholds_start_steep_and_spread_over_the_middle_of_the_range():
    classifier = build_classifier(classifier_config({"network": "conv", "thresholds": 3, **FACTS}))
    assert isinstance(classifier, ConvClassifier)
    centres = classifier.thresholds.centres.flatten()
    assert torch.allclose(centres, torch.tensor([0.425, 0.5, 0.575]))
    seen = classifier.thresholds(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2))
    assert seen.shape == (1, 3, 1, 2) and seen[..., 0].max() < 0.01 and seen[..., 1].min() > 0.99


def test_without_thresholds_images_are_standardised():
    classifier = build_classifier(classifier_config({"network": "conv", "thresholds": 0, **FACTS})).eval()
    grey = torch.full((1, 1, 28, 28), FACTS["mean"])
    bias_only = torch.relu(classifier.first.bias).view(1, -1, 1, 1).expand(1, -1, 14, 14)
    torch.testing.assert_close(torch.relu(classifier.first((grey - 0.1307) / 0.3081)), bias_only)
    assert torch.isfinite(classifier(grey)).all()


def test_colour_images_that_are_not_square_are_purified_to_their_shape():
    facts = {"input_shape": (3, 12, 8), "mean": 0.5, "std": 0.25}
    classifier = build_classifier(classifier_config({"network": "conv", "classes": 4, **facts}))
    config = purifier_config(
        {"network": "conv", "input_shape": (3, 12, 8), "representation": classifier.config.representation}
    )
    purifier, images = build_purifier(config), torch.rand(5, 3, 12, 8)
    codes = purifier.encode(classifier.represent(images).representation)
    purified = purifier.decode(codes, torch.randn(5, config.latent))
    assert codes.shape == (5, config.code) and purified.shape == images.shape
    assert purified.min() >= 0 and purified.max() <= 1


@pytest.mark.parametrize("network", ["classifier", "purifier"])
def test_sides_that_cannot_be_halved_twice_are_refused_by_name(network):
    shape = {"network": "conv", "input_shape": (1, 28, 30)}
    with pytest.raises(ValidationError, match="28 x 30 pixels: both must be multiples of 4"):
        if network == "classifier":
            classifier_config(FACTS | shape)
        else:
            purifier_config(shape | {"representation": 10})


def test_the_preset_is_convolutional_and_attacks_it_above_what_is_tested():
    preset = PRESETS["mnist-conv"]
    assert preset.classifier.network == "conv"
    assert max(eps for eps, _ in preset.robust_training.eps) > 0.30
    assert max(eps for eps, _ in preset.hardening.eps) > 0.30


def test_thresholds_of_a_network_in_float64_are_in_float64():
    layer = SoftThresholds(1, 2).double()
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.sigmoid(layer.steepness * (images - layer.centres))
    assert torch.equal(layer(images), expected)
