"""A GPU, checked and measured: python -m benchmarks.gpu

One command, without a network, in at most four minutes: docs/gpu.md says what the machine needs. Each step runs in a
process of its own, so that one which fails, crashes or hangs is told by name, and the others go on. `--device cpu`
rehearses all steps on the CPU.
"""

from __future__ import annotations

import json as jsonlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from carso.bundle import Bundle

from benchmarks.device_steps import Figures, Rig, StepError, steps
from benchmarks.memory import nvidia_smi
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table

STEP_SECONDS = 60.0  # that a step may take, so that one that hangs leaves time for the others
LAST_LINES = 12  # of a failed step's output that are kept


def in_a_process(name: str, rig: Rig, *, limit: float) -> Figures:
    """Run one step in a process of its own, for at most `limit` seconds. Raises StepError."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "benchmarks.device_steps", name, rig.told(), file.name]
        try:
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            raise StepError(f"it was not done after {limit:.0f} s, and so was ended") from None
        if ran.returncode:
            lines = ran.stdout.decode(errors="replace").splitlines()[-LAST_LINES:]
            raise StepError("\n".join([*lines, f"(exit status {ran.returncode})"]))
        found: Figures = jsonlib.loads(Path(file.name).read_bytes())
        return found


def run_all(rig: Rig, *, limit: float) -> tuple[dict[str, Figures], dict[str, str], dict[str, float]]:
    """Run all steps within `limit` seconds. Return their figures, the reasons of those that failed, and the seconds
    that each took.
    """
    found: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    took: dict[str, float] = {}
    end = time.monotonic() + limit
    with progress_console.status("") as status:
        for name in steps(rig):
            began = time.monotonic()
            if began >= end:
                failed[name] = "it was not run, because no time was left"
                continue
            status.update(name)
            try:
                longest = STEP_SECONDS + (2 * rig.leak_seconds if name == "leak" else 0)
                found[name] = in_a_process(name, rig, limit=min(longest, end - began))
            except StepError as e:
                failed[name] = str(e)
            took[name] = time.monotonic() - began
            progress_console.print(f"{name}: {took[name]:.1f} s{', failed' if name in failed else ''}", highlight=False)
    return found, failed, took


def show(found: Mapping[str, Figures], failed: Mapping[str, str]) -> None:
    """Print a table for each step, and then what failed."""
    for name, figures in found.items():
        columns = list(dict.fromkeys(column for cells in figures.values() for column in cells))
        shown = table(name, "", *columns)
        for row, cells in figures.items():
            shown.add_row(row, *(_cell(cells.get(column)) for column in columns))
        console.print(shown)
    for name, reason in failed.items():
        console.print(f"FAILED: {name}", style="bold red", highlight=False)
        console.print(reason, markup=False, highlight=False)
    console.print(f"{len(found)} steps done, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))


def _cell(figure: float | str | None) -> str:
    if figure is None:
        return ""
    return figure if isinstance(figure, str) else f"{figure:.4g}" if abs(figure) < 1000 else f"{figure:.0f}"


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu rehearses the steps.")] = "cuda",
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each measurement.")] = 0.5,
    leak_seconds: Annotated[float, typer.Option(min=1.0, help="Of load in which memory is watched.")] = 60.0,
    rows: Annotated[list[int], typer.Option(min=1, help="Votes of one run; may be given several times.")] = [  # noqa: B006
        16,
        128,
        512,
        2048,
        8192,
    ],
    images: Annotated[
        int | None, typer.Option(min=1, help="In the pipeline's flight. [default: 2048; CPU: 64]")
    ] = None,
    limit: Annotated[float, typer.Option(min=0.0, help="Seconds for all steps together.")] = 230.0,
    json: JsonFile = None,
) -> None:
    known = begin("gpu", Bundle.load(bundle)) | {"gpus": nvidia_smi("name,driver_version,memory.total")}
    console.print(f"GPUs: {'; '.join(known['gpus']) or 'none that nvidia-smi tells of'}", highlight=False)
    asked = Rig(
        folder=bundle,
        device=device,
        seconds=seconds,
        leak_seconds=leak_seconds,
        rows=tuple(rows),
        images=images or (2048 if device == "cuda" else 64),
        connections=(1, 32, 128),
    )
    found, failed, took = run_all(asked, limit=limit)
    show(found, failed)
    keep(json, known=known, options=asdict(asked), results={"steps": found, "failed": failed, "seconds": took})
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
