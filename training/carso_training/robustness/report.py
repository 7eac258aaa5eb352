"""Pages of measured figures: tables in Markdown, made from the figures' files and never typed.

A page has its tables between two lines, which this keeps:

    <!-- measured: mnist-fcn -->
    <!-- end -->

The name is that of a folder of figures; these folders lie in one that is named after the page, without its suffix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from carso_training import durable
from carso_training.errors import RunError
from carso_training.robustness import figures
from carso_training.robustness.figures import Figure, Measured, Sanity
from carso_training.robustness.table import wilson

PLACE = re.compile(r"(?P<head><!-- measured: (?P<name>[\w./-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
TITLES = {
    ("strong", "classifier"): "the classifier alone, strong attacks",
    ("adaptive", "carso"): "CARSO, adaptive attacks",
}


def updated(path: Path) -> str:
    """Return the page at `path` with every measured part made again from its figures.

    Raises RunError if there are none or one cannot be read, and OSError if the page cannot.
    """
    root = path.with_suffix("")
    return PLACE.sub(lambda m: f"{m['head']}\n{as_markdown(root / m['name'])}\n\n{m['end']}", path.read_text())


def update(path: Path) -> bool:
    """Write the page at `path` again; return whether it changed. Raises RunError and OSError."""
    after = updated(path)
    changed = after != path.read_text()
    if changed:
        durable.write(path, after)
    return changed


def as_markdown(folder: Path) -> str:
    """Return the tables of one folder of figures. Raises RunError if it holds none."""
    found, sanity = figures.read(folder)
    if not found and sanity is None:
        raise RunError(f"{folder} holds no figures. Make them with: carso-train evaluate BUNDLE --out {folder}")
    parts = []
    if found:
        parts += [accuracies(found), "**Which attack breaks what**", *(attacks(figure) for figure in found)]
    if sanity:
        parts.append(checks(sanity))
    parts += dict.fromkeys(origin(each) for each in _origins(found, sanity))
    return "\n\n".join(parts)


def accuracies(found: Sequence[Figure]) -> str:
    """The accuracies of all figures: a row per eps, a column per defence."""
    kinds = list(dict.fromkeys((figure.protocol, figure.cell.defence) for figure in found))
    strengths = sorted({figure.cell.threat.eps for figure in found})
    by_place = {(figure.protocol, figure.cell.defence, figure.cell.threat.eps): figure for figure in found}
    rows = [["clean", *(_clean(found, kind) for kind in kinds)]]
    for eps in strengths:
        shown = [by_place.get((*kind, eps)) for kind in kinds]
        rows.append([f"eps {eps:.2f}", *("-" if f is None else _share(f.cell.correct, f.cell.images) for f in shown)])
    heads = ["accuracy, %, with 95 % intervals", *(TITLES.get(kind, " ".join(kind)) for kind in kinds)]
    return _table(heads, rows)


def attacks(figure: Figure) -> str:
    """What every attack of a figure broke, in their order: each was made on what the others had left."""
    cell = figure.cell
    heads = ["attack", "settings", "made on", "broke", "left, %"]
    rows = []
    for tried in figure.trials:
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in tried.settings.items())
        left = 100 * (tried.attacked - tried.broken) / cell.images
        rows.append([tried.attack, settings or "-", str(tried.attacked), str(tried.broken), f"{left:.1f}"])
    title = f"{TITLES.get((figure.protocol, cell.defence), cell.defence)}, eps {cell.threat.eps:.2f}"
    return (
        f"<details><summary>{title}: {_share(cell.correct, cell.images)} % in {_duration(figure.seconds)}</summary>\n\n"
        f"{_table(heads, rows)}\n\n</details>"
    )


def checks(sanity: Sanity) -> str:
    """The sanity checks, those that failed in bold."""
    failed = sum(not check.passed for check in sanity.checks)
    rows = [[check.name, "pass" if check.passed else "**FAIL**", check.evidence, check.rule] for check in sanity.checks]
    settings = ", ".join(f"{name} {value}" for name, value in sanity.settings.items())
    return (
        f"**Sanity checks**: {len(sanity.checks) - failed} of {len(sanity.checks)} pass. Measured at eps "
        f"{sanity.eps:.2f} on {sanity.images} images with {settings}, in {_duration(sanity.seconds)}.\n\n"
        + _table(["check", "result", "measured", "passes with"], rows)
    )


def origin(measured: Measured) -> str:
    """What was measured, for those who want to repeat it."""
    versions = ", ".join(f"{name} {value}" for name, value in measured.versions.items())
    return (
        f"Measured: bundle {measured.bundle} (SHA-256 of its manifest {measured.checksum[:12]}…), {measured.dataset}, "
        f"{measured.split} images: {measured.subset}; attacks on {measured.device}; {versions}."
    )


def _origins(found: Sequence[Figure], sanity: Sanity | None) -> list[Measured]:
    """What was measured; the images of the sanity checks are told beside them."""
    return [figure.measured for figure in found] or ([sanity.measured] if sanity else [])


def _clean(found: Sequence[Figure], kind: tuple[str, str]) -> str:
    first = next(figure for figure in found if (figure.protocol, figure.cell.defence) == kind)
    return _share(first.clean, first.cell.images)


def _share(correct: int, images: int) -> str:
    low, high = wilson(correct, images)
    return f"{100 * correct / images:.1f} [{low:.1f}, {high:.1f}]"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
