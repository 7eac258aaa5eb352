"""The published table, intervals, and how measured cells are shown."""

from __future__ import annotations

import pytest
from carso.bundle import Cell, Threat
from carso.client.results import Info
from carso.client.tables import facts
from carso_training.recipe import PRESETS
from carso_training.robustness.card import model_card
from carso_training.robustness.published import DEFENCES, PUBLISHED_ACCURACIES
from carso_training.robustness.table import as_markdown, tables, wilson

CLEAN = Threat(attack="none", norm="linf", eps=0.0, sees="nothing")
PGD = Threat(attack="pgd", norm="linf", eps=0.3, sees="classifier")
ADAPTIVE = Threat(attack="apgd-ce", norm="linf", eps=0.3, sees="system", settings={"latents": 8})


def cell(defence: str, threat: Threat, published: float | None = None, *, correct: int = 97) -> Cell:
    return Cell(defence=defence, threat=threat, correct=correct, images=100, published=published)


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [(95, 100, 88.82, 97.85), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (9672, 10_000, 96.35, 97.05)],
)
def test_wilson_intervals_agree_with_tabulated_ones(correct: int, images: int, low: float, high: float) -> None:
    assert wilson(correct, images) == pytest.approx((low, high), abs=0.01)


def test_every_published_attack_has_a_figure_for_each_defence() -> None:
    assert {len(figures) for figures in PUBLISHED_ACCURACIES.values()} == {len(DEFENCES)}
    assert PUBLISHED_ACCURACIES["pgd-0.30"] == (6.85, 71.26, 86.27)


def test_the_table_shows_each_figure_with_its_interval_beside_the_published_one() -> None:
    cells = [cell(defence, CLEAN, published) for defence, published in zip(DEFENCES, (98.4, 97.17, None), strict=True)]
    head, _, row = as_markdown(cells).splitlines()
    figure = "97.00 [91.55, 98.97]"
    assert head == "| attack | none | published | IAT | published | CARSO |"
    assert row == f"| clean | {figure} | 98.40 | {figure} | 97.17 | {figure} |"


def test_a_cell_that_was_not_measured_is_a_dash() -> None:
    cells = [cell("classifier", CLEAN, 97.17), cell("carso", CLEAN), cell("carso", PGD, correct=50)]
    assert tables(cells)[0].rows[1] == ["pgd-0.30", "-", "-", "50.00 [40.38, 59.62]"]


def test_adaptive_accuracy_never_stands_in_the_table_of_transfer_accuracy() -> None:
    transfer, adaptive = tables([cell("carso", PGD), cell("carso", ADAPTIVE, correct=20), cell("carso", CLEAN)])
    assert [row[0] for row in transfer.rows] == ["pgd-0.30", "clean"]
    assert adaptive.title == "Attacks that see the whole defence"
    assert adaptive.rows == [["apgd-ce-0.30", "20.00 [13.34, 28.88]"]]


def test_the_model_card_explains_the_kinds_of_accuracy_that_it_shows_and_no_others() -> None:
    recipe = PRESETS["mnist-fcn"]
    transfer = model_card(recipe, [cell("carso", PGD)], risk=1e-6)
    assert "transfer accuracy" in transfer
    assert "Adaptive accuracy" not in transfer
    both = model_card(recipe, [cell("carso", PGD), cell("carso", ADAPTIVE)], risk=1e-6)
    assert "transfer accuracy" in both and "Adaptive accuracy" in both


def test_carso_info_leads_with_the_accuracy_under_adaptive_attack() -> None:
    measured = Threat(attack="adaptive", norm="linf", eps=0.3, sees="system", settings={"effort": "thorough"})
    table = [cell("carso", measured, correct=61), cell("classifier", measured), cell("carso", PGD)]
    bundle = {"name": "b", "version": "1", "checksum": "0" * 64, "dataset": "mnist", "classes": ["0"], "samples": 9}
    limits = dict.fromkeys(("max_samples", "max_images", "max_body_bytes", "max_pixels"), 1)
    answer = {
        "version": "1",
        "bundle": bundle | {"input": {"shape": [1, 28, 28], "low": 0, "high": 1}},
        "device": {"asked": "cpu", "provider": "CPU", "precision": "float32"},
        "limits": limits | {"allow_seed": False, "evidence": "full"},
        "risk": 0.001,
        "media_types": [],
    }
    assert ("under adaptive attack", "not measured") in facts(Info.model_validate(answer))
    answer["bundle"]["table"] = [each.model_dump() for each in table]
    assert ("under adaptive attack", "61.0 % of 100 at eps 0.30") in facts(Info.model_validate(answer))
