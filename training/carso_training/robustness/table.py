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


PROTOCOLS = ("adaptive", "certified", "strong", "controls", "blackbox")  # many attacks each, or all of them
KNOWING = ("adaptive", "strong")  # an image must withstand every attack of it
PROVEN = ("certified",)  # and here those that nobody thought of, too


@dataclass(frozen=True)
class Question:
    """One table, and the cells that belong into it."""

    title: str
    kinds: tuple[Kind, ...]
    protocols: tuple[str, ...] = ()  # names of attacks; empty: all that are no protocol

    def holds(self, cell: Cell) -> bool:
        """Whether a cell belongs here."""
        attack = cell.threat.attack
        mine = attack in self.protocols if self.protocols else attack not in (*KNOWING, *PROVEN)
        return mine and cell.kind in self.kinds


QUESTIONS = (
    Question(
        "An attacker who knows all of it: the share of images that withstand every attack",
        ("white-box", "adaptive"),
        protocols=KNOWING,
    ),
    Question("Proven: the share of images that are right, whatever an attacker does", ("white-box",), protocols=PROVEN),
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
    return [_shown(question, own) for question in QUESTIONS if (own := [c for c in cells if question.holds(c)])]


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
    by_place = {(_row(cell), cell.defence): cell for cell in cells}
    defences = dict.fromkeys(cell.defence for cell in cells)
    compared = {cell.defence for cell in cells if cell.published is not None}
    heads = ["attack"]
    for defence in defences:
        heads += [HEADS.get(defence, defence), *(["published"] if defence in compared else [])]
    rows = []
    names = dict.fromkeys(_row(cell) for cell in cells)
    for threat in sorted(names) if question.protocols else names:
        row = [threat]
        for defence in defences:
            cell = by_place.get((threat, defence))
            row.append("-" if cell is None else _figure(cell))
            if defence in compared:
                row.append("-" if cell is None or cell.published is None else f"{cell.published:.2f}")
        rows.append(row)
    return Shown(question.title, heads, rows)


def _row(cell: Cell) -> str:
    """The name of a row: of a protocol, its eps, so that all defences share the row."""
    return f"eps {cell.threat.eps:.2f}" if cell.threat.attack in (*KNOWING, *PROVEN) else cell.threat.name


def _figure(cell: Cell) -> str:
    low, high = wilson(cell.correct, cell.images)
    return f"{cell.accuracy:.2f} [{low:.2f}, {high:.2f}]"
