"""The published table, and intervals."""

from __future__ import annotations

import pytest
from carso.bundle import Cell
from carso_training import attacks
from carso_training.table import COLUMNS, PUBLISHED, as_markdown, wilson


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [(95, 100, 88.82, 97.85), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (9672, 10_000, 96.35, 97.05)],
)
def test_wilson_intervals_agree_with_tabulated_ones(correct: int, images: int, low: float, high: float) -> None:
    assert wilson(correct, images) == pytest.approx((low, high), abs=0.01)


def test_every_published_attack_has_a_published_number() -> None:
    assert tuple(PUBLISHED) == tuple(attack.name for attack in attacks.PUBLISHED)


def test_the_table_shows_each_figure_with_its_interval_beside_the_published_one() -> None:
    cells = [
        Cell(attack="clean", column=column, kind="white-box", correct=97, images=100, published=published)
        for column, published in zip(COLUMNS, (98.4, 97.17, None), strict=True)
    ]
    row = as_markdown(cells).splitlines()[-1]
    assert row == "| clean " + "| 97.00 [91.55, 98.97] | 98.40 " + "| 97.00 [91.55, 98.97] | 97.17 " + (
        "| 97.00 [91.55, 98.97] | - |"
    )
