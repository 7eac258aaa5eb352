"""Training a classifier for interval bounds, as a stage of a run."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from carso_training.attacks import CLEAN
from carso_training.datasets import dataset
from carso_training.fitting.certified import begin, certified_accuracy, train_certified
from carso_training.fitting.optimizers import optimizers_of, rate_of
from carso_training.networks import Classifier, build_classifier, classifier_config
from carso_training.recipe import PRESETS, Recipe, Schedule
from lightning_fabric import Fabric
from pydantic import ValidationError
from torch import nn

from tests.test_conv import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 6
RECIPE = Recipe.model_validate(
    TINY
    | {
        "name": "tiny-certified",
        "train_images": 1500,
        "validation_images": 200,
        "classifier": {"network": "conv", "channels": [4, 6], "hidden": 16, "steepness": 60.0},
        "robust_training": None,
        "certified_training": {"eps": 0.1},
        "adversarial": {"epochs": EPOCHS, "peak_lr": 5e-3, "batch_size": 50, "averaging": 0.9, "rate": "steps"},
        "hardening": None,
    }
)


@pytest.fixture(scope="module")
def trained(one_thread, tmp_path_factory) -> tuple[Classifier, list[dict[str, str]]]:
    """A classifier trained for bounds, and its metrics."""
    dataset("mnist").ensure()
    train, held_out = dataset("mnist").load("train").split(held_out=200, seed=0, train=1500)
    folder = tmp_path_factory.mktemp("certified")
    fabric = Fabric(accelerator="cpu", devices=1)
    classifier = train_certified(fabric, RECIPE, train=train, held_out=held_out, folder=folder)
    with (folder / "metrics.csv").open() as file:
        return classifier, list(csv.DictReader(file))


def test_the_bounds_are_learnt_and_logged_beside_the_clean_accuracy(trained):
    _, rows = trained
    assert [row["epoch"] for row in rows] == [str(epoch + 1) for epoch in range(EPOCHS)]
    assert {"loss", "loss_clean", "loss_bounds", CLEAN.name, "certified-0.15", "certified-0.30"} <= rows[0].keys()
    assert float(rows[-1][CLEAN.name]) > 0.6
    for row in rows:
        assert float(row[CLEAN.name]) >= float(row["certified-0.15"]) >= float(row["certified-0.30"])


def test_most_right_labels_are_proven_at_the_eps_that_was_trained_for(trained):
    classifier, _ = trained
    test = dataset("mnist").load("test")[slice(500)]
    clean, proven = (certified_accuracy(classifier, test.pixels(), test.labels, eps=eps) for eps in (0.0, 0.1))
    assert proven > 0.5 * clean > 0.25


def test_a_network_that_was_not_trained_for_bounds_has_next_to_none(trained):
    torch.manual_seed(0)
    test = dataset("mnist").load("test")[slice(200)]
    classifier = build_classifier(classifier_config({"network": "fcn"} | FACTS)).eval()
    assert certified_accuracy(classifier, test.pixels(), test.labels, eps=0.1) == 0.0


def test_the_rate_falls_in_two_steps():
    schedule = Schedule(epochs=1, peak_lr=1e-2, rate="steps")
    (optimizer,) = optimizers_of(nn.Linear(2, 2), schedule)
    rate, seen = rate_of(optimizer, schedule, steps=20), []
    for _ in range(20):
        seen.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    assert seen == pytest.approx([1e-2] * 14 + [2e-3] * 3 + [4e-4] * 3)


def test_the_weights_begin_small_enough_that_boxes_do_not_grow():
    torch.manual_seed(0)
    network = build_classifier(classifier_config({"network": "conv", "channels": (64, 64), "hidden": 64} | FACTS))
    begin(network)
    for layer in (network.first, network.second, network.hidden):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / layer.weight[0].numel(), rel=0.05)
        assert not layer.bias.any()


FACTS = {"input_shape": (1, 28, 28), "classes": 10, "mean": 0.1307, "std": 0.3081}


def test_a_network_that_cannot_be_trained_for_bounds_is_refused_by_name():
    given = TINY | {"robust_training": None, "certified_training": {}, "classifier": {}, "purifier": {}}
    with pytest.raises(ValidationError, match="the network fcn cannot be trained for bounds; use conv"):
        Recipe.model_validate(given)


def test_two_ways_to_train_the_classifier_are_refused():
    with pytest.raises(ValidationError, match="robust_training or certified_training, not both"):
        Recipe.model_validate(TINY | {"certified_training": {}})


def test_the_preset_is_trained_above_what_is_tested():
    preset = PRESETS["mnist-certified"]
    assert preset.certified_training is not None and preset.certified_training.eps > 0.30
    assert preset.classifier.network == "conv"
