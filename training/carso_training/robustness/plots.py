"""Plots of measured figures, as SVG: the same figures give the same file, and text stays text."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from carso_training import durable
from carso_training.robustness import figures
from carso_training.robustness.figures import Figure
from carso_training.robustness.table import wilson

PLOTTED = {"adaptive": "CARSO, adaptive", "strong": "its classifier alone", "blackbox": "CARSO, through its HTTP API"}
STYLES = {"adaptive": "-", "strong": "--", "blackbox": ":"}
COST_AT = 0.30  # eps of the plot of cost


def write(root: Path) -> list[Path]:
    """Write the plots of all folders of figures in `root` there; return their files, those that there is data for.

    Raises RunError if a figure cannot be read, and OSError.
    """
    systems = {folder.name: figures.read(folder)[0] for folder in sorted(root.iterdir()) if folder.is_dir()}
    drawn: Mapping[str, Callable[[Mapping[str, Sequence[Figure]]], str | None]] = {
        "accuracy.svg": accuracy,
        "cost.svg": cost,
    }
    written = []
    for name, draw in drawn.items():
        if (content := draw(systems)) is not None:
            durable.write(root / name, content)
            written.append(root / name)
    return written


def accuracy(systems: Mapping[str, Sequence[Figure]]) -> str | None:
    """Draw accuracy against eps, a line for each system and protocol with 95 % intervals. None: there is nothing."""
    lines = []
    for place, (name, found) in enumerate(systems.items()):
        for protocol, label in PLOTTED.items():
            mine = [figure for figure in found if figure.protocol == protocol]
            if mine:
                points = [(0.0, mine[0].clean, mine[0].cell.images)]
                points += [(f.cell.threat.eps, f.cell.correct, f.cell.images) for f in mine]
                lines.append((f"{name}: {label}", f"C{place}", STYLES[protocol], points))
    if not lines:
        return None
    with _Drawing("eps (L-infinity)", "images that withstand every attack, %") as drawing:
        for label, colour, style, points in lines:
            x, y, spread = _with_intervals(points)
            drawing.axes.errorbar(x, y, yerr=spread, label=label, color=colour, linestyle=style, marker=".", capsize=2)
    return drawing.content


def cost(systems: Mapping[str, Sequence[Figure]]) -> str | None:
    """Draw adaptive accuracy at eps COST_AT against the multiply-adds of a vote. None: there is nothing."""
    points = [
        (name, figure.measured.multiply_adds["vote"] / 1e6, figure.cell.correct, figure.cell.images)
        for name, found in systems.items()
        for figure in found
        if figure.protocol == "adaptive" and figure.cell.threat.eps == COST_AT and figure.measured.multiply_adds
    ]
    if not points:
        return None
    with _Drawing("multiply-adds of a vote, millions", f"adaptive accuracy at eps {COST_AT:.2f}, %") as drawing:
        for name, *point in points:
            x, y, spread = _with_intervals([point])
            drawing.axes.errorbar(x, y, yerr=spread, label=name, marker="o", linestyle="none", capsize=3)
        drawing.axes.set_xlim(left=0)
    return drawing.content


def _with_intervals(
    points: Sequence[Sequence[float]],
) -> tuple[list[float], list[float], list[list[float]]]:
    """(x, correct, images) -> x, percent, and how far their intervals reach down and up."""
    x = [float(point[0]) for point in points]
    y = [100 * point[1] / point[2] for point in points]
    intervals = [wilson(int(point[1]), int(point[2])) for point in points]
    low = [max(0.0, share - interval[0]) for share, interval in zip(y, intervals, strict=True)]
    high = [max(0.0, interval[1] - share) for share, interval in zip(y, intervals, strict=True)]
    return x, y, [low, high]


class _Drawing:
    """One pair of axes, and its SVG when the block ends."""

    content: str

    def __init__(self, x: str, y: str) -> None:
        import matplotlib
        from matplotlib.figure import Figure as Canvas  # no window, and no state outside this object

        self._style = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "carso", "font.size": 9})
        self._canvas, self._x, self._y = Canvas, x, y

    def __enter__(self) -> Self:
        self._style.__enter__()
        self._figure = self._canvas(figsize=(6.4, 4.0), layout="constrained")
        self.axes = self._figure.subplots()
        self.axes.set(xlabel=self._x, ylabel=self._y, ylim=(0, 101))
        self.axes.grid(alpha=0.3)
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            if failure[0] is None:
                self.axes.legend(fontsize=8)
                file = io.StringIO()
                self._figure.savefig(file, format="svg", metadata={"Date": None})
                lines = [line.rstrip() for line in file.getvalue().splitlines()]
                self.content = "\n".join(lines) + "\n"
        finally:
            self._style.__exit__(None, None, None)
