"""The published table, and how a measured one is shown beside it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from carso.bundle import Cell
from rich.table import Table

COLUMNS = ("none", "IAT", "CARSO")
WIDTH = 120

# Accuracy in percent on the whole MNIST test set: E. Ballarin, "Counteradversarial Recall of Synthetic
# Observations" (2022). The slides print some attacks' norm as L2; the numbers are those of L-infinity attacks.
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "clean": (98.40, 97.17, 96.72),
    "fgsm-0.15": (12.09, 91.89, 93.62),
    "fgsm-0.30": (1.21, 76.94, 86.43),
    "fgsm-0.50": (1.00, 12.29, 13.59),
    "pgd-0.15": (1.60, 90.54, 93.44),
    "pgd-0.30": (6.85, 71.26, 86.27),
    "pgd-0.50": (20.66, 11.67, 38.38),
    "deepfool-0.15": (0.66, 90.25, 95.06),
    "deepfool-0.30": (0.00, 60.54, 93.31),
    "deepfool-0.50": (0.00, 0.78, 71.34),
}


def wilson(correct: int, images: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, in percent; z = 1.96 gives 95 % (Wilson, JASA 22, 1927)."""
    p = correct / images
    centre = p + z * z / (2 * images)
    spread = z * sqrt(p * (1 - p) / images + z * z / (4 * images * images))
    scale = 100 / (1 + z * z / images)
    return max(0.0, (centre - spread) * scale), min(100.0, (centre + spread) * scale)


def _rows(cells: Sequence[Cell]) -> list[list[str]]:
    by_place = {(cell.attack, cell.column): cell for cell in cells}
    rows = []
    for attack in dict.fromkeys(cell.attack for cell in cells):
        row = [attack]
        for column in COLUMNS:
            cell = by_place[attack, column]
            low, high = wilson(cell.correct, cell.images)
            row += [f"{cell.accuracy:.2f} [{low:.2f}, {high:.2f}]"]
            row += ["-" if cell.published is None else f"{cell.published:.2f}"]
        rows.append(row)
    return rows


def _heads() -> list[str]:
    return ["attack", *(head for column in COLUMNS for head in (column, "published"))]


def as_rich(cells: Sequence[Cell]) -> Table:
    """For a console of at least WIDTH columns."""
    table = Table(title="accuracy, %, with 95 % intervals")
    for place, head in enumerate(_heads()):
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in _rows(cells):
        table.add_row(*row)
    return table


def as_markdown(cells: Sequence[Cell]) -> str:
    lines = ["| " + " | ".join(_heads()) + " |", "| --- |" + " ---: |" * (2 * len(COLUMNS))]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in _rows(cells)])
