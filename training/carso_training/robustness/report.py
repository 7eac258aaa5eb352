"""Pages of measured figures: tables in Markdown, made from the figures' files and never typed.

A page has its tables between two lines, which this keeps:

    <!-- measured: mnist-fcn -->
    <!-- end -->

The name is that of a folder of figures. Such folders lie in one that is named after the page, without its suffix; from
a page elsewhere, give the path from that page. With `compared` in place of `measured`, the systems of several folders
stand side by side in one table; with `headline`, there is only the table of CARSO and its classifier, at the strengths
of the adaptive attacks. The plots (`plots.py`) are written beside the folders.
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

PLACE = re.compile(
    r"(?P<head><!-- (?P<what>measured|compared|headline): (?P<names>[\w./ -]+?) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
TITLES = {
    ("strong", "classifier"): "the classifier alone, strong attacks",
    ("adaptive", "carso"): "CARSO, adaptive attacks",
    ("certified", "classifier"): "the classifier alone, right and proven",
    ("blackbox", "carso"): "CARSO, attacked through its HTTP API",
}


def updated(path: Path) -> str:
    """Return the page at `path` with every measured part made again from its figures.

    Raises RunError if there are none or one cannot be read, and OSError if the page cannot.
    """
    root = path.with_suffix("")

    def part(what: str, names: str) -> str:
        folders = [root / name if root.is_dir() else path.parent / name for name in names.split()]
        if what == "compared":
            return side_by_side(folders)
        return "\n\n".join(map(headline if what == "headline" else as_markdown, folders))

    return PLACE.sub(lambda m: f"{m['head']}\n{part(m['what'], m['names'])}\n\n{m['end']}", path.read_text())


def update(path: Path) -> bool:
    """Write the page at `path` again; return whether it changed. Raises RunError and OSError."""
    after = updated(path)
    changed = after != path.read_text()
    if changed:
        durable.write(path, after)
    return changed


def as_markdown(folder: Path) -> str:
    """Return the tables of one folder of figures. Raises RunError if it holds none."""
    found, sanity = _read(folder)
    parts = []
    main = [figure for figure in found if figure.protocol != "controls"]
    controls = [figure for figure in found if figure.protocol == "controls"]
    if main:
        parts.append(accuracies(main))
    if controls:
        parts += ["**Controls**", accuracies([figure for figure in main if figure.protocol == "adaptive"] + controls)]
    if found:
        parts += ["**Which attack breaks what**", *(attacks(figure) for figure in found)]
    if sanity:
        parts.append(checks(sanity))
    parts += dict.fromkeys(origin(each) for each in _origins(found, sanity))
    return "\n\n".join(parts)


def headline(folder: Path) -> str:
    """Return the table that leads a page: CARSO under adaptive attack, and its classifier alone at the same strengths.

    Raises RunError if the folder holds no figures.
    """
    found, _ = _read(folder)
    strengths = {figure.cell.threat.eps for figure in found if figure.protocol == "adaptive"}
    shown = [f for f in found if f.protocol in ("adaptive", "strong") and f.cell.threat.eps in strengths]
    return accuracies(sorted(shown, key=lambda figure: figure.protocol))  # adaptive first


def side_by_side(folders: Sequence[Path]) -> str:
    """Compare systems: the adaptive figure first, then the classifier alone, then what the purifier adds or takes.

    Raises RunError if a folder holds no figures.
    """
    rows = []
    for folder in folders:
        found, _ = _read(folder)
        by_place = {(f.protocol, f.cell.threat.eps): f for f in found if (f.protocol, f.cell.defence) in TITLES}
        rows += [
            [folder.name, f"{eps:.2f}", *_compared(figure, by_place.get(("strong", eps)))]
            for (protocol, eps), figure in sorted(by_place.items(), key=lambda item: item[0][1])
            if protocol == "adaptive"
        ]
    heads = ["system", "eps", "CARSO, adaptive", "its classifier alone", "the purifier adds", "images", "effort"]
    return _table(heads, rows)


def _compared(whole: Figure, alone: Figure | None) -> list[str]:
    shown = ["-" if figure is None else _share(figure.cell.correct, figure.cell.images) for figure in (whole, alone)]
    gained = "-" if alone is None else f"{whole.cell.accuracy - alone.cell.accuracy:+.1f} points"
    return [*shown, gained, str(whole.cell.images), str(whole.cell.threat.settings.get("effort", "-"))]


def accuracies(found: Sequence[Figure]) -> str:
    """The accuracies of figures: a row per defence, a column per eps."""
    kinds = list(dict.fromkeys((figure.protocol, figure.cell.defence) for figure in found))
    strengths = sorted({figure.cell.threat.eps for figure in found})
    by_place = {(figure.protocol, figure.cell.defence, figure.cell.threat.eps): figure for figure in found}
    rows = []
    for kind in kinds:
        shown = [by_place.get((*kind, eps)) for eps in strengths]
        cells = ["-" if figure is None else _share(figure.cell.correct, figure.cell.images) for figure in shown]
        rows.append([_title(*kind, found), _clean(found, kind), *cells])
    heads = ["accuracy, %, with 95 % intervals", "clean", *(f"eps {eps:.2f}" for eps in strengths)]
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
    title = f"{_title(figure.protocol, cell.defence, [figure])}, eps {cell.threat.eps:.2f}"
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
        f"Measured: bundle {measured.bundle} (SHA-256 of its graphs and weights {measured.networks[:12]}…), "
        f"{measured.dataset}, {measured.split} images: {measured.subset}; attacks on {measured.device}; {versions}."
    )


def _read(folder: Path) -> tuple[list[Figure], Sanity | None]:
    found, sanity = figures.read(folder)
    if not found and sanity is None:
        raise RunError(f"{folder} holds no figures. Make them with: carso-train evaluate BUNDLE --out {folder}")
    return found, sanity


def _title(protocol: str, defence: str, found: Sequence[Figure]) -> str:
    """Name a row of a table; of a control, with what it is made of."""
    if (protocol, defence) in TITLES:
        return TITLES[protocol, defence]  # type: ignore[index]
    figure = next(f for f in found if (f.protocol, f.cell.defence) == (protocol, defence))
    settings = figure.cell.threat.settings
    votes = settings.get("samples")
    match defence.partition("-")[0]:
        case "votes":
            return f"CARSO, the same images judged again by {votes} vote{'s' if votes != 1 else ''}"
        case "one":
            return "CARSO with one zero latent"
        case "noised":
            return f"its classifier voting over noise of {settings['noise']}, {votes} votes, no purifier"
        case "smoothing":
            return f"randomised smoothing at the same cost: noise of {settings['noise']}, {votes} votes"
    return f"the classifier of {defence.removesuffix('-classifier')} alone"


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
