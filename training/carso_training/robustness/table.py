"""How measured cells are shown: a table per question, published figures beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from carso.bundle import Cell, Kind
from rich.table import Table

WIDTH = 120

# The heads of the published table's columns; another defence is shown under its own name
HEADS = {"undefended": "none", "classifier": "IAT", "carso": "CARSO"}


@dataclass(frozen=True)
class Question:
    """One table, and the kinds of cells that belong into it."""

    title: str
    kinds: tuple[Kind, ...]


QUESTIONS = (
    Question("Attacks that see a classifier only", ("clean", "white-box", "transfer")),
    Question("Attacks that see the whole defence", ("adaptive",)),
    Question("Attacks that see answers only", ("black-box",)),
)


@dataclass(frozen=True)
class Shown:
    """One table as text."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def wilson(correct: int, images: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of an accuracy, in percent; z = 1.96 gives 95 % (Wilson, JASA 22, 1927)."""
    p = correct / images
    centre = p + z * z / (2 * images)
    spread = z * sqrt(p * (1 - p) / images + z * z / (4 * images * images))
    scale = 100 / (1 + z * z / images)
    return max(0.0, (centre - spread) * scale), min(100.0, (centre + spread) * scale)


def tables(cells: Sequence[Cell]) -> list[Shown]:
    """Arrange cells in tables: one per question that has any, a row per threat, a column per defence."""
    return [_shown(question, own) for question in QUESTIONS if (own := [c for c in cells if c.kind in question.kinds])]


def as_rich(cells: Sequence[Cell]) -> list[Table]:
    """Return the tables for a console of at least WIDTH columns."""
    shown = []
    for table in tables(cells):
        shown.append(Table(title=f"{table.title}: accuracy, %, with 95 % intervals"))
        for place, head in enumerate(table.heads):
            shown[-1].add_column(head, justify="right" if place else "left", no_wrap=True)
        for row in table.rows:
            shown[-1].add_row(*row)
    return shown


def as_markdown(cells: Sequence[Cell]) -> str:
    """Return the tables in Markdown, each under its title if there are several."""
    found = tables(cells)
    parts = []
    for table in found:
        lines = ["| " + " | ".join(table.heads) + " |", "| --- |" + " ---: |" * (len(table.heads) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        parts.append("\n".join(([f"**{table.title}**", ""] if len(found) > 1 else []) + lines))
    return "\n\n".join(parts)


def _shown(question: Question, cells: Sequence[Cell]) -> Shown:
    by_place = {(cell.threat.name, cell.defence): cell for cell in cells}
    defences = dict.fromkeys(cell.defence for cell in cells)
    compared = {cell.defence for cell in cells if cell.published is not None}
    heads = ["attack"]
    for defence in defences:
        heads += [HEADS.get(defence, defence), *(["published"] if defence in compared else [])]
    rows = []
    for threat in dict.fromkeys(cell.threat.name for cell in cells):
        row = [threat]
        for defence in defences:
            cell = by_place.get((threat, defence))
            row.append("-" if cell is None else _figure(cell))
            if defence in compared:
                row.append("-" if cell is None or cell.published is None else f"{cell.published:.2f}")
        rows.append(row)
    return Shown(question.title, heads, rows)


def _figure(cell: Cell) -> str:
    low, high = wilson(cell.correct, cell.images)
    return f"{cell.accuracy:.2f} [{low:.2f}, {high:.2f}]"
