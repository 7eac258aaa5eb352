"""The bundle: a folder that holds a trained system, and the only thing that passes from carso_training to service.

    manifest.json       what the bundle is, and the SHA-256 of every other file in it
    first_pass.onnx     images -> probabilities, codes
    vote.onnx           codes, code_index, latents -> votes [, purified]
    vote_int8.onnx      as vote.onnx, in 8-bit arithmetic for CPUs; a bundle may lack it
    self_test.npz       inputs and the answers that a sound copy of the graphs gives to them
    *.safetensors       weights, for further training and white-box evaluation; the service does not read them
    MODEL_CARD.md       for people

No file is a pickle, and none is read before its checksum is right.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FIRST_PASS = "first_pass.onnx"  # noqa: S105 (the name of a graph)
VOTE = "vote.onnx"
VOTE_INT8 = "vote_int8.onnx"
SELF_TEST = "self_test.npz"
REQUIRED = (FIRST_PASS, VOTE, SELF_TEST)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # no separators: nothing outside the folder


class BundleError(Exception):
    """A bundle that cannot be trusted or read. The message names the file and the mend."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSpec(_Strict):
    """One image: channels, height, width, and the range its values must lie in."""

    shape: tuple[int, int, int]
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _sound(self) -> InputSpec:
        if min(self.shape) < 1 or self.shape[0] not in (1, 3):
            raise ValueError(f"shape {self.shape} is not [1 or 3 channels, height, width]")
        if not self.low < self.high:
            raise ValueError(f"the value range [{self.low}, {self.high}] is empty")
        return self


class Cell(_Strict):
    """One measured accuracy: how many of `images` were classified right, and the published figure, if any."""

    attack: str  # such as "pgd-0.30"
    column: Literal["none", "IAT", "CARSO"]
    kind: Literal["transfer", "white-box"]  # which classifier the attack saw, and which one answered
    correct: int = Field(ge=0)
    images: int = Field(gt=0)
    published: float | None  # percent

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.images


class Manifest(_Strict):
    schema_version: Literal[1]
    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    dataset: str
    classes: tuple[str, ...] = Field(min_length=2)
    input: InputSpec
    code: int = Field(gt=0)  # size of the compressed representation
    latent: int = Field(gt=0)
    samples: int = Field(gt=0)  # votes asked for by default
    recipe: dict[str, Any]  # how it was trained
    table: tuple[Cell, ...]  # what was measured
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if missing := [name for name in REQUIRED if name not in self.files]:
            raise ValueError(f"files lists no {', '.join(missing)}")
        return self


@dataclass(frozen=True)
class SelfTest:
    """Known answers: M images, R votes."""

    images: np.ndarray  # [M, *shape] float32
    latents: np.ndarray  # [R, latent] float32
    code_index: np.ndarray  # [R] int64, below M
    probabilities: np.ndarray  # [M, classes] float32
    codes: np.ndarray  # [M, code] float32
    votes: np.ndarray  # [R] int64


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory: verified, and independent of the folder from now on."""

    folder: Path
    manifest: Manifest
    checksum: str  # SHA-256 of the manifest, and so of all that it lists
    first_pass: bytes  # ONNX graph
    vote: bytes  # ONNX graph
    vote_int8: bytes | None  # ONNX graph
    self_test: SelfTest

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read and verify a bundle. Raises BundleError."""
        content = _read(folder / MANIFEST)
        manifest = _parse(folder / MANIFEST, content)
        files = {}
        for name, expected in manifest.files.items():
            data = _read(folder / name)
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                raise BundleError(
                    f"{folder / name} is damaged: its SHA-256 is {found}, the manifest says {expected}. "
                    "Copy the bundle again, or export it anew with carso-train."
                )
            if name in (*REQUIRED, VOTE_INT8):
                files[name] = data
        return cls(
            folder=folder,
            manifest=manifest,
            checksum=hashlib.sha256(content).hexdigest(),
            first_pass=files[FIRST_PASS],
            vote=files[VOTE],
            vote_int8=files.get(VOTE_INT8),
            self_test=_self_test(folder / SELF_TEST, files[SELF_TEST], manifest),
        )


def sealed(folder: Path, manifest: dict[str, Any]) -> Manifest:
    """Write the manifest of the files that lie in `folder`, with their checksums; return it.

    `manifest` holds every field of Manifest but `schema_version` and `files`.
    """
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    complete = Manifest.model_validate({"schema_version": SCHEMA_VERSION, **manifest, "files": files})
    (folder / MANIFEST).write_text(complete.model_dump_json(indent=2) + "\n")
    return complete


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if path.name == MANIFEST:
            raise BundleError(
                f"{path.parent} holds no {MANIFEST}, so it is no bundle. Set CARSO_BUNDLE to the folder of one, "
                "such as models/mnist-fcn, or make one with: carso-train run mnist-fcn"
            ) from None
        raise BundleError(f"{path} is missing, though the manifest lists it. Copy the bundle again.") from None
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e.strerror}). Check the folder and its permissions.") from None


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        raw = json.loads(content)
    except ValueError as e:
        raise BundleError(f"{path} is not JSON ({e}). Copy the bundle again.") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}; this release reads {SCHEMA_VERSION}. "
            "Export the bundle anew with the carso-train of this release, or install the release that wrote it."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(f"{path} is not a valid manifest: {where}: {first['msg']}. Export the bundle anew.") from None


def _self_test(path: Path, content: bytes, manifest: Manifest) -> SelfTest:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            test = SelfTest(**arrays)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise BundleError(f"{path} is not a self-test ({e}). Export the bundle anew.") from None
    images, votes = (array.shape[0] if array.ndim else 0 for array in (test.images, test.votes))
    expected = {
        "images": (images, *manifest.input.shape),
        "latents": (votes, manifest.latent),
        "code_index": (votes,),
        "probabilities": (images, len(manifest.classes)),
        "codes": (images, manifest.code),
        "votes": (votes,),
    }
    for name, shape in expected.items():
        array = getattr(test, name)
        if array.shape != shape or not prod(shape):
            raise BundleError(f"{path}: {name} has shape {array.shape}, not {shape}. Export the bundle anew.")
        dtype = np.dtype(np.int64 if name in ("code_index", "votes") else np.float32)
        if array.dtype != dtype:
            raise BundleError(f"{path}: {name} is of {array.dtype}, not {dtype}. Export the bundle anew.")
    if test.code_index.min() < 0 or test.code_index.max() >= images:
        raise BundleError(f"{path}: code_index names codes beyond the {images} there are. Export the bundle anew.")
    return test
