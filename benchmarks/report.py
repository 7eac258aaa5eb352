"""What every benchmark hands over: tables on standard output, and a JSON file that also says on what they were made."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from carso.bundle import Bundle
from carso.inference.sessions import usable_cpus
from carso.settings import REFERENCE_BUNDLE
from rich.console import Console
from rich.table import Table

BundleFolder = Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Keep every figure, and the machine's facts, here.")]
REFERENCE = REFERENCE_BUNDLE

LIBRARIES = (
    *("carso", "numpy", "onnxruntime-gpu", "onnxruntime", "torch", "fastapi", "starlette", "uvicorn", "uvloop"),
    *("httptools", "pillow", "pydantic"),
)

WIDTH = 150  # of tables that go to a file or a pipe

console = Console(width=None if sys.stdout.isatty() else WIDTH)
progress_console = Console(stderr=True)


def facts(bundle: Bundle) -> dict[str, Any]:
    """The machine, the versions and the bundle: what a figure must not be quoted without."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": usable_cpus(),
        "load_average": os.getloadavg()[0],  # above a few tenths at the start: something else was running
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "settings": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("CARSO_", "OMP_")) and name != "CARSO_DATA"
        },
        "bundle": {"name": bundle.manifest.name, "version": bundle.manifest.version, "checksum": bundle.checksum},
    }


def begin(benchmark: str, bundle: Bundle) -> dict[str, Any]:
    """The facts, after printing the few that a reader of the tables needs."""
    known = facts(bundle)
    console.print(
        f"{benchmark}: {known['cpu']}, {known['cpus']} processors, load {known['load_average']:.1f} at the start; "
        f"bundle {known['bundle']['name']} {bundle.checksum[:12]}",
        highlight=False,
    )
    return known


def keep(
    path: Path | None, *, known: Mapping[str, Any], options: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write one run's facts, options and results to `path`, where one was given."""
    if path is not None:
        path.write_text(json.dumps({"facts": known, "options": options, **results}, indent=1, default=str) + "\n")
        console.print(f"kept in {path}")


def table(title: str, *heads: str) -> Table:
    """An empty table: the first column to the left, all others to the right."""
    made = Table(title=title, title_justify="left", min_width=len(title))
    for place, head in enumerate(heads):
        made.add_column(head, justify="right" if place else "left")
    return made


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
