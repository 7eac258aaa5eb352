"""Measured figures, one JSON file each: what was measured, how, with which versions, and how long it took.

Tables are made from these files and never typed (`report.py`).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from carso.bundle import BOUNDS, EARLIER_BOUNDS, Bundle, Cell
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from carso_training import durable
from carso_training.errors import RunError

Protocol = Literal["adaptive", "certified", "strong", "controls", "blackbox"]
Split = Literal["validation", "test"]
Settings = dict[str, int | float | str]
LIBRARIES = ("torch", "onnxruntime", "onnxruntime-gpu", "numpy")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Strict):
    """Which system was measured, on which machine, with what."""

    bundle: str  # its name
    networks: str  # SHA-256 of its graphs and weights, which stays when the bundle's table is written
    dataset: str
    split: Split
    subset: str  # which images of the split
    device: str  # that the attacks were made on
    # of one image: `classifier`, all of the first pass (`image`), and each vote (`vote`); empty: unknown
    multiply_adds: dict[str, int] = {}
    versions: dict[str, str]


class Tried(_Strict):
    """One attack of a protocol, made on the images that withstood those before it."""

    attack: str
    settings: Settings
    attacked: int  # images
    broken: int  # of these
    seconds: float
    answers: dict[str, int] = {}  # of a service that was attacked: how many requests were answered by what


class Figure(_Strict):
    """The accuracy of a defence against a whole protocol: an image counts if it withstands every attack in it."""

    schema_version: Literal[2] = 2
    protocol: Protocol
    measured: Measured
    cell: Cell
    clean: int = Field(ge=0)  # images classified correctly before any attack
    trials: tuple[Tried, ...]
    seed: int
    seconds: float

    @property
    def file_name(self) -> str:
        """The figure's file: protocol, defence, norm and eps."""
        threat = self.cell.threat
        return f"{self.protocol}-{self.cell.defence}-{threat.norm}-{threat.eps:.2f}.json"


class Checked(_Strict):
    """One sanity check of an evaluation."""

    name: str  # a sentence that is true if the check passes
    passed: bool
    evidence: str  # the numbers
    rule: str  # what passes


class Sanity(_Strict):
    """The sanity checks of one system."""

    schema_version: Literal[2] = 2
    measured: Measured
    eps: float
    images: int
    settings: Settings
    checks: tuple[Checked, ...]
    seed: int
    seconds: float

    file_name: str = "sanity.json"


def networks(bundle: Bundle) -> str:
    """Return the SHA-256 of all that a bundle computes: its graphs and weights, without card, table and self-test.

    The graph of bounds follows from the weights, and may be added later.
    """
    files = bundle.manifest.files
    parts = [
        f"{name} {files[name]}"
        for name in sorted(files)
        if name.endswith((".onnx", ".safetensors")) and name not in (BOUNDS, EARLIER_BOUNDS)
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def measured(
    bundle: Bundle, *, split: Split, subset: str, device: str, multiply_adds: Mapping[str, int] | None = None
) -> Measured:
    """Note what is measured, with the versions of the libraries that compute it."""
    installed = {"python": platform.python_version(), "carso": version("carso")}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except ModuleNotFoundError:
            continue
    return Measured(
        bundle=bundle.manifest.name,
        networks=networks(bundle),
        dataset=bundle.manifest.dataset,
        split=split,
        subset=subset,
        device=device,
        multiply_adds=dict(multiply_adds or {}),
        versions=installed,
    )


def write(folder: Path, figure: Figure | Sanity) -> Path:
    """Write a figure into `folder` under its name, in place of an older one; return the file. Raises OSError."""
    path = folder / figure.file_name
    durable.write(path, figure.model_dump_json(indent=1) + "\n")
    return path


def read(folder: Path) -> tuple[list[Figure], Sanity | None]:
    """Read the figures of a folder, by protocol, defence and eps, and its sanity checks, if any.

    Raises RunError, which names the file that is not a figure.
    """
    found: list[Figure] = []
    sanity = None
    for path in sorted(folder.glob("*.json")):
        try:
            if path.name == "sanity.json":
                sanity = Sanity.model_validate_json(path.read_bytes())
            else:
                found.append(Figure.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as e:
            raise RunError(f"{path} is not a figure of this release: {e}. Remove it, and measure it again.") from None
    return in_order(found), sanity


def in_order(found: Sequence[Figure]) -> list[Figure]:
    """Sort figures by protocol, defence and eps: the adaptive ones first."""
    order = get_args(Protocol)
    return sorted(found, key=lambda f: (order.index(f.protocol), f.cell.defence, f.cell.threat.eps))
