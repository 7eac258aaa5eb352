"""Results as `carso` shows them: tables, JSON, warnings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import typer

from carso.client.results import FastPrediction, Info, RobustPrediction

Prediction: TypeAlias = RobustPrediction | FastPrediction

ROBUST_HEADS = ("file", "class", "share", "votes", "fast label", "agree")
FAST_HEADS = ("file", "class", "probability")
PROVEN = "proven within"  # the head of one more column, where a proof was asked for


def row(name: str, prediction: Prediction) -> Sequence[str]:
    """Make a row under ROBUST_HEADS or FAST_HEADS; "-" for what the service withholds, and for a share of no votes."""
    shown: tuple[object, ...]
    match prediction:
        case RobustPrediction(share=share, agree=agree):
            shown = (
                f"{share:.4f}" if share is not None and prediction.votes else None,
                prediction.votes,
                prediction.fast_label,
                {True: "yes", False: "NO", None: None}[agree],
            )
        case FastPrediction(probabilities=probabilities):
            shown = (None if probabilities is None else f"{probabilities[prediction.label]:.4f}",)
    return (name, prediction.class_name, *("-" if value is None else str(value) for value in shown))


def proven(prediction: Prediction) -> str:
    """Say within which eps the first pass's label is proven; "-": at none."""
    return "-" if prediction.certified is None else f"{prediction.certified.eps:g}"


def warnings(name: str, prediction: Prediction) -> list[str]:
    """Say what deserves attention: an image unlike all known ones, paths that disagree, a count cut by a deadline."""
    found = []
    if prediction.typical is False:
        found.append(
            f"warning: {name}: this is not like the images that the bundle knows, so its label means little: look at "
            "polarity, framing and scale"
        )
    if isinstance(prediction, RobustPrediction) and prediction.agree is False:
        found.append(
            f"warning: {name}: the vote says label {prediction.label}, the fast path {prediction.fast_label}: the "
            "image may have been manipulated"
        )
    if isinstance(prediction, RobustPrediction) and not prediction.complete:
        votes = "" if prediction.votes is None else f" after {prediction.votes} of {prediction.samples} votes"
        found.append(f"warning: {name}: the deadline ended the count{votes}")
    return found


def facts(answer: Info) -> list[Sequence[str]]:
    """Make rows of what a service says of itself."""
    bundle, limits = answer.bundle, answer.limits
    adaptive = [
        f"{100 * cell.correct / cell.images:.1f} % of {cell.images} at eps {cell.threat.eps:.2f}"
        for cell in bundle.table
        if cell.threat.attack == "adaptive" and cell.defence == "carso"
    ]
    return [
        ("service", answer.version),
        ("bundle", f"{bundle.name} {bundle.version}, {bundle.checksum[:12]}"),
        ("under adaptive attack", "; ".join(adaptive) or "not measured"),
        ("classes", f"{len(bundle.classes)}: {', '.join(bundle.classes)}"),
        ("input", f"{list(bundle.input.shape)} in [{bundle.input.low:g}, {bundle.input.high:g}]"),
        *([("images", bundle.input.expects)] if bundle.input.expects else []),
        ("votes", f"{bundle.samples} at risk {answer.risk:g}, at most {limits.max_samples}"),
        ("device", f"{answer.device.provider}, {answer.device.precision}"),
        ("per request", f"{limits.max_images} images, {limits.max_body_bytes} bytes, {limits.max_pixels} pixels"),
        ("seeds", "allowed" if limits.allow_seed else "refused"),
    ]


def flat(value: object) -> str:
    """Write a number, or several by name, on one line."""
    return ", ".join(f"{name}: {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def sent(value: Prediction | Info) -> dict[str, Any]:
    """Return what the service sent, and no more."""
    return value.model_dump(mode="json", exclude_unset=True)


def print_json(content: object) -> None:
    """Print one line of JSON."""
    typer.echo(json.dumps(content))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print with rich on a terminal; elsewhere in plain columns, two spaces apart, whatever their width."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*heads, box=None, show_header=any(heads), pad_edge=False)
        for line in rows:
            table.add_row(*(Text(cell, style="bold red" if cell == "NO" else "", overflow="fold") for cell in line))
        Console().print(table)
        return
    lines = [heads, *rows] if any(heads) else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
