"""Which images are typical: thresholds set on validation images, and what they flag."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from carso.bundle import Bundle, Judged, Typical
from carso.inference.jobs import Typicality
from carso.inference.typical import typicalities
from carso_training.datasets.examples import Examples
from carso_training.robustness.system import system_of
from carso_training.robustness.typical import CHANGED, NOTHING, Typicalities, as_markdown, evading
from pydantic import ValidationError

from tests.bundles import SMALL, shared_bundle

pytestmark = pytest.mark.usefixtures("one_thread")

BOUNDS = Typical(eps=0.3, excess=0.02, contrast=0.5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shared_bundle(SMALL))


def examples(count: int, *, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, *SMALL.classifier.input_shape), generator=generator, dtype=torch.uint8)
    return Examples(images, torch.randint(SMALL.classifier.classes, (count,), generator=generator))


def test_the_excess_is_what_no_allowed_change_explains_and_the_contrast_the_range_of_values():
    images = np.array([[[[0.0, 1.0]]], [[[0.2, 0.2]]]], np.float32)
    purified = np.array([[[[0.3, 0.4]]], [[[0.2, 0.6]]]], np.float32)
    first, second = typicalities(images, purified, eps=0.3)
    assert first == Typicality(excess=0.15, contrast=1.0)  # (0 + 0.3) / 2
    assert second == Typicality(excess=0.05, contrast=0.0)


@pytest.mark.parametrize(
    ("excess", "contrast", "typical"),
    [(0.02, 0.5, True), (0.020001, 0.5, False), (0.02, 0.499999, False), (0.0, 1.0, True)],
)
def test_an_image_at_the_thresholds_is_typical_and_one_beyond_either_is_not(excess, contrast, typical):
    assert BOUNDS.admits(excess=excess, contrast=contrast) == typical


def test_more_images_cannot_be_flagged_and_missed_than_there_are():
    with pytest.raises(ValidationError, match="more than all 10"):
        Judged(kind="clean", images=10, untypical=8, missed=3)


def test_the_thresholds_leave_out_a_few_of_the_images_that_are_read_rightly(bundle):
    data = examples(200, seed=1)
    measuring = Typicalities(bundle, eps=0.3, seed=0, device=CPU)
    bounds = measuring.thresholds(data)
    assert bounds == Typicalities(bundle, eps=0.3, seed=0, device=CPU).thresholds(data)  # the seed decides
    (clean, *_) = measuring.table(bounds, data, {})
    assert (clean.kind, clean.images) == ("clean", 200)
    assert clean.untypical < 200
    assert 0 < bounds.excess < 1
    assert 0 < bounds.contrast <= 1


def test_where_nothing_is_read_rightly_everything_is_typical(bundle):
    data = examples(2, seed=1)
    answers = Typicalities(bundle, eps=0.3, seed=0, device=CPU)._judge(data.pixels(), BOUNDS).labels
    wrong = Examples(data.images, (torch.from_numpy(answers) + 1) % SMALL.classifier.classes)
    measuring = Typicalities(bundle, eps=1e-6, seed=0, device=CPU)  # attacks change nothing
    bounds = measuring.thresholds(wrong)
    assert all(row.untypical == 0 for row in measuring.table(bounds, wrong, {}))


def test_the_table_has_every_kind_of_image_once_and_says_what_is_missed_only_where_there_is_a_right_answer(bundle):
    measuring = Typicalities(bundle, eps=0.3, seed=0, device=CPU)
    table = measuring.table(BOUNDS, examples(12, seed=2), {"something else": examples(7, seed=3)})
    kinds = {row.kind: row for row in table}
    assert len(kinds) == len(table)
    assert kinds.keys() >= {"clean", "adaptive pgd-0.30", "aimed at this test 0.30", *CHANGED, *NOTHING}
    assert kinds["something else"].images == 7
    assert kinds["black"].untypical == 12  # no contrast
    for kind in (*NOTHING, "something else", "random values"):
        assert kinds[kind].missed is None
    for kind in ("clean", *CHANGED):
        assert kinds[kind].missed is not None
    assert "| black | 12 | 100.0 | - |" in as_markdown(BOUNDS.model_copy(update={"table": table}))


def test_an_attack_that_aims_at_the_test_stays_in_its_ball_and_pays_for_what_it_exceeds(bundle):
    system = system_of(bundle)
    data = examples(40, seed=4)
    images, labels = data.pixels(), data.labels
    tight = Typical(eps=0.3, excess=0.01, contrast=0)

    def made(price: float) -> torch.Tensor:
        return evading(
            system,
            images,
            labels,
            eps=0.2,
            bounds=tight,
            price=price,
            steps=20,
            generator=torch.Generator().manual_seed(0),
        )

    def excess(attacked: torch.Tensor) -> float:
        zeros = torch.zeros(len(images), system.latent)
        purified = system.decoder(system.encode(attacked)[1], torch.arange(len(images)), zeros)
        return ((purified - attacked).abs() - tight.eps).clamp(min=0).mean().item()

    free, dear = made(0.0), made(100.0)
    for attacked in (free, dear):
        assert (attacked - images).abs().max() <= 0.2 + 1e-6
        assert 0 <= attacked.min() <= attacked.max() <= 1
    assert excess(dear) < excess(free)


def test_a_bundle_keeps_its_thresholds_and_may_have_none(bundle, tmp_path: Path):
    fields = bundle.manifest.model_dump(exclude={"typical"})
    assert type(bundle.manifest).model_validate(fields).typical is None
    with_bounds = type(bundle.manifest).model_validate(fields | {"typical": BOUNDS.model_dump()})
    assert with_bounds.typical == BOUNDS
