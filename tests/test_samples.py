"""The samples that a bundle ships: the first images, attacked, with the answers that they really get."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from carso.bundle import Bundle
from carso.samples import Sample
from carso.settings import REFERENCE_BUNDLE
from carso_training import command
from carso_training.datasets import dataset
from carso_training.robustness import samples
from carso_training.robustness.effort import Effort
from carso_training.robustness.published import RISK
from carso_training.robustness.voting import pipeline_of, robust_answers
from PIL import Image

from tests.bundles import copy_of

TINY = Effort(
    name="tiny", steps=5, targets=1, restarts=1, pgd_steps=5, queries=5, latents=2, latents_of_square=2, draws=1
)
STRENGTHS = (0.1, 0.3)

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(bundle: Bundle, sample: Sample) -> np.ndarray:
    """[1, 28, 28] integers from 0 to 255."""
    with Image.open(io.BytesIO(bundle.sample_files[sample.file])) as image:
        return np.asarray(image, np.int64)[None]


@pytest.fixture(scope="module")
def bundle(one_thread, tmp_path_factory) -> Bundle:
    """The shipped bundle with samples that were made with little effort."""
    folder = copy_of(REFERENCE_BUNDLE, tmp_path_factory.mktemp("samples") / "bundle")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(command.EFFORTS, "quick", TINY)
        strengths = [part for eps in STRENGTHS for part in ("--eps", str(eps))]
        patched.setattr(sys, "argv", ["carso-train", "samples", str(folder), "--images", "4", *strengths])
        with pytest.raises(SystemExit) as ended:
            command.main()
    assert ended.value.code in (0, None)
    return Bundle.load(folder)


def test_the_samples_are_the_first_images_of_the_split_clean_and_under_both_attacks_at_each_strength(bundle):
    test = dataset("mnist").load("test")
    found = bundle.samples.images
    versions = [("none", 0.0), *((kind, eps) for eps in STRENGTHS for kind in ("transfer", "adaptive"))]
    expected = [(n, *version) for n in range(4) for version in versions]
    assert [(each.index, each.kind, each.eps) for each in found] == expected
    for sample in found:
        assert sample.label == test.labels[sample.index]
        change = np.abs(pixels(bundle, sample) - test.images[sample.index].numpy())
        assert change.max() <= 255 * sample.eps
        assert (change.max() > 200 * sample.eps) == (sample.kind != "none")


def test_the_answers_beside_the_samples_are_those_of_the_pipeline_that_ships(bundle):
    found = bundle.samples.images
    images = np.stack([pixels(bundle, sample) for sample in found]).astype(np.float32) / 255
    pipeline, votes = pipeline_of(bundle), bundle.manifest.samples
    fast = pipeline.sessions.first_pass(images).probabilities.argmax(axis=1)
    seeds = np.array([sample.seed for sample in found])
    robust = robust_answers(pipeline, images, samples=votes, risk=RISK, seeds=seeds)
    assert [(each.fast_label, each.robust_label) for each in found] == list(zip(fast, robust, strict=True))


def test_an_image_is_attacked_until_it_is_misread_and_else_stays_as_the_first_attack_left_it():
    data = dataset("mnist").load("test")[slice(3)]

    def trial(name: str, value: float) -> samples.Trial:
        return samples.Trial(name=name, make=lambda images, labels, generator: torch.full_like(images, value))

    def answer(images: np.ndarray) -> np.ndarray:
        """Right, but for the second image under the second attack."""
        found = data.labels.numpy().copy()
        found[1] += images[1].max() == 1.0
        return found

    images, names = samples._attacked([trial("a", 0.5), trial("b", 1.0)], data, eps=1.0, answer=answer, seed=0)
    assert names == ["a", "b", "a"]
    assert [image.float().mean().item() for image in images] == [128, 255, 128]
