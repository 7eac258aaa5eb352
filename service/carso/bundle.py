"""The bundle: a folder that holds a trained system, and the only thing that passes from carso_training to service.

    manifest.json       what the bundle is, and the SHA-256 of every other file in it
    first_pass.onnx     images -> probabilities, codes
    first_pass_with_bounds.onnx  images, eps -> probabilities, codes, margins: the same with what
                        `carso.inference.certificate` proves by; optional
    vote.onnx           codes, code_index, latents -> votes [, purified]
    vote_int8.onnx      as vote.onnx, in 8-bit arithmetic for CPUs; a bundle may lack it
    self_test.npz       inputs, and the answers that intact graphs give to them
    *.safetensors       weights, for further training and white-box evaluation; the service does not read them
    samples/            images, clean and attacked, with the answers that they got (``carso.samples``); optional
    MODEL_CARD.md       for people
    model.sig           a signature of all of these (``carso.signing``), which the manifest does not list; optional

No file is a pickle, and none but the manifest is parsed before its checksum and the signature are verified.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from carso.samples import INDEX, SAMPLES, Samples

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
FIRST_PASS = "first_pass.onnx"  # noqa: S105 (the name of a graph)
BOUNDS = "first_pass_with_bounds.onnx"
EARLIER_BOUNDS = "first_pass_bounds.onnx"
VOTE = "vote.onnx"
VOTE_INT8 = "vote_int8.onnx"
SELF_TEST = "self_test.npz"
REQUIRED = (FIRST_PASS, VOTE, SELF_TEST)
SELF_TEST_EPS = 0.01  # of the margins in the self-test, in units of the input's values

Norm = Literal["linf", "l2"]
# What an attacker differentiates or queries. `classifier`: the classifier of the defence under test, which for CARSO is
# the one of the first pass. `system`: all of the defence, its randomness included.
Sees = Literal["nothing", "answers", "classifier", "system"]
Kind = Literal["clean", "white-box", "transfer", "adaptive", "black-box"]
CLASSIFIERS = ("undefended", "classifier")  # defences that are a classifier and nothing else

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# No other separators, and no name that begins with a dot: nothing outside the folder
FileName = Annotated[str, Field(pattern=rf"^({SAMPLES}/)?[A-Za-z0-9][A-Za-z0-9._-]*$")]


class BundleError(Exception):
    """A bundle that cannot be read or trusted. The message names the file and says how to mend it."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSpec(_Strict):
    """One image: its shape (channels, height, width), the range that its values must lie in, and what it shows."""

    shape: tuple[int, int, int]
    low: float = 0.0
    high: float = 1.0
    background: float = 0.0  # the value round the subject, which `resize` pads with
    expects: str = ""  # for people: subject, polarity and framing of the images that the system knows

    @model_validator(mode="after")
    def _valid(self) -> InputSpec:
        if min(self.shape) < 1 or self.shape[0] not in (1, 3):
            raise ValueError(f"shape {self.shape} is not [1 or 3 channels, height, width]")
        if not self.low < self.high:
            raise ValueError(f"the value range [{self.low}, {self.high}] is empty")
        if not self.low <= self.background <= self.high:
            raise ValueError(f"the background {self.background} is outside the value range [{self.low}, {self.high}]")
        return self


class Threat(_Strict):
    """What an attacker does and knows."""

    attack: str = Field(min_length=1)  # the method, such as "pgd"; "none" for clean images
    norm: Norm  # in which the images stay within eps of the clean ones
    eps: float = Field(ge=0, allow_inf_nan=False)  # in units of the input's values; 0 for clean images
    sees: Sees
    settings: dict[str, int | float | str] = {}  # how strong: steps, step size, restarts, latents, ...

    @model_validator(mode="after")
    def _consistent(self) -> Threat:
        if (self.attack == "none") != (self.eps == 0) or (self.eps == 0) != (self.sees == "nothing"):
            raise ValueError(
                "attack `none`, eps 0 and sees `nothing` go together, "
                f"not {self.attack!r} with eps {self.eps} and sees {self.sees!r}"
            )
        return self

    @property
    def name(self) -> str:
        """A row's name in a table, such as ``pgd-0.30`` or ``clean``: the method and eps."""
        if self.attack == "none":
            return "clean"
        two_decimals = f"{self.eps:.2f}"
        return f"{self.attack}-{two_decimals if float(two_decimals) == self.eps else f'{self.eps:g}'}"


class Cell(_Strict):
    """One measured accuracy: a defence against a threat.

    The defence answers for images that were made against what the threat `sees`.
    """

    defence: str = Field(min_length=1)  # "undefended", "classifier" (the fast path), "carso" (the robust path), ...
    threat: Threat
    correct: int = Field(ge=0)  # images classified correctly
    images: int = Field(gt=0)
    published: float | None = Field(ge=0, le=100)  # percent; None: this cell was never published

    @model_validator(mode="after")
    def _possible(self) -> Cell:
        if self.correct > self.images:
            raise ValueError(f"{self.correct} of {self.images} images cannot be correct")
        return self

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.images

    @property
    def kind(self) -> Kind:
        """What the accuracy tells.

        - clean: no attack
        - black-box: the attacker sees only answers
        - white-box: a classifier answers for images made against itself
        - adaptive: a larger defence answers for images made against all of it
        - transfer: the images were made against something else than what answers
        """
        if self.threat.sees == "nothing":
            return "clean"
        if self.threat.sees == "answers":
            return "black-box"
        is_classifier = self.defence in CLASSIFIERS
        if self.threat.sees == "classifier":
            return "white-box" if is_classifier else "transfer"
        return "transfer" if is_classifier else "adaptive"


class Recount(_Strict):
    """The same images, judged by votes in int8 and in float32."""

    threat: Threat  # that the images were made under
    images: int = Field(gt=0)
    correct_float32: int = Field(ge=0)
    correct_int8: int = Field(ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Recount:
        if max(self.correct_float32, self.correct_int8) > self.images:
            raise ValueError(
                f"{self.correct_float32} and {self.correct_int8} of {self.images} images cannot be correct"
            )
        return self


class Judged(_Strict):
    """Images of one kind, and how many of them are not typical."""

    kind: str = Field(min_length=1)  # such as "clean", "fashion-mnist", "inverted"
    images: int = Field(gt=0)
    untypical: int = Field(ge=0)
    missed: int | None = Field(default=None, ge=0)  # typical, and yet misread; None: there is no right answer

    @model_validator(mode="after")
    def _possible(self) -> Judged:
        if self.untypical + (self.missed or 0) > self.images:
            raise ValueError(
                f"{self.untypical} untypical and {self.missed} missed images are more than all {self.images}"
            )
        return self


class Typical(_Strict):
    """Which images are typical of those that the purifier knows; ``carso.inference.typical`` defines the figures."""

    eps: float = Field(ge=0, allow_inf_nan=False)  # how far an attacker may move a value, in units of the input's
    excess: float = Field(ge=0, allow_inf_nan=False)  # the largest of a typical image
    contrast: float = Field(ge=0, allow_inf_nan=False)  # the smallest of a typical image
    table: tuple[Judged, ...] = ()  # what these thresholds flag, measured on images that took no part in setting them

    def admits(self, *, excess: float, contrast: float) -> bool:
        """Return whether an image of these figures is typical."""
        return excess <= self.excess and contrast >= self.contrast


class Disagreement(_Strict):
    """On how many clean validation images the fast path and the robust path give different labels."""

    images: int = Field(gt=0)
    disagree: int = Field(ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Disagreement:
        if self.disagree > self.images:
            raise ValueError(f"{self.disagree} of {self.images} images cannot disagree")
        return self

    @property
    def rate(self) -> float:
        """In [0, 1]."""
        return self.disagree / self.images


class NearDuplicates(_Strict):
    """How near to an earlier image's code another code is seldom by chance; see ``carso.inference.duplicates``."""

    distance: float = Field(gt=0, allow_inf_nan=False)  # Euclidean, between codes
    share: float = Field(ge=0, lt=1)  # of clean images that are nearer to an earlier one
    images: int = Field(gt=0)  # validation images that it was measured on


class Proofs(_Strict):
    """Of how many clean validation images the first pass's label is proven; ``carso.inference.certificate``."""

    eps: float = Field(gt=0, le=1)  # in units of the input's values
    images: int = Field(gt=0)
    proven: int = Field(ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Proofs:
        if self.proven > self.images:
            raise ValueError(f"{self.proven} of {self.images} images cannot be proven")
        return self

    @property
    def rate(self) -> float:
        """In [0, 1]."""
        return self.proven / self.images


class Manifest(_Strict):
    """What a bundle is."""

    schema_version: Literal[2]
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
    recounts: tuple[Recount, ...] = ()  # what int8 votes change, as far as it was measured
    typical: Typical | None = None  # None: this bundle cannot tell
    disagreement: Disagreement | None = None  # None: not measured
    near_duplicates: NearDuplicates | None = None  # None: not measured
    proofs: Proofs | None = None  # None: not measured
    unbounded: str | None = None  # why there is no first_pass_with_bounds.onnx, where its export was tried and failed
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if missing := [name for name in REQUIRED if name not in self.files]:
            raise ValueError(f"files does not list {', '.join(missing)}")
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
    # [M] float32: the first pass's own labels, at SELF_TEST_EPS; None: the bundle has no bounds
    margins: np.ndarray | None = None


class Key(Protocol):
    """What tells whether a bundle is signed: ``carso.signing.PublicKey``."""

    def check(self, folder: Path, digests: Mapping[str, str]) -> None:
        """Raise BundleError unless exactly these files, by their SHA-256, are signed in `folder`."""


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory: verified, and independent of its folder from now on."""

    folder: Path
    manifest: Manifest
    checksum: str  # SHA-256 of the manifest, and so of all that it lists
    first_pass: bytes  # ONNX graph
    bounds: bytes | None  # ONNX graph
    vote: bytes  # ONNX graph
    vote_int8: bytes | None  # ONNX graph
    self_test: SelfTest
    samples: Samples | None  # None: this bundle ships none
    sample_files: Mapping[str, bytes]  # the PNG file of each sample, by its name in `samples`

    @property
    def recounts(self) -> tuple[Recount, ...]:
        """What votes in int8 change; nothing, if there is no graph to cast them."""
        return () if self.vote_int8 is None else self.manifest.recounts

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of every file, the manifest's too; model.sig is not one of them."""
        return {MANIFEST: self.checksum, **self.manifest.files}

    @classmethod
    def load(cls, folder: Path, *, key: Key | None = None) -> Bundle:
        """Read and verify a bundle. Raises BundleError.

        `key`: whose signature it must have, over these files and no others. None: any bundle will do.
        """
        content = _read(folder / MANIFEST)
        manifest = _parse(folder / MANIFEST, content)
        checksum = hashlib.sha256(content).hexdigest()
        if key is not None:
            key.check(folder, {MANIFEST: checksum, **manifest.files})
            _alone(folder, manifest)
        files = {}
        for name, expected in manifest.files.items():
            data = _read(folder / name)
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                raise BundleError(
                    f"{folder / name} is damaged: its SHA-256 is {found}, the manifest says {expected}. "
                    "Copy the bundle again, or export it again with carso-train."
                )
            if name in (*REQUIRED, BOUNDS, VOTE_INT8) or name.startswith(f"{SAMPLES}/"):
                files[name] = data
        samples = _samples(folder / INDEX, files, manifest)
        return cls(
            folder=folder,
            manifest=manifest,
            checksum=checksum,
            first_pass=files[FIRST_PASS],
            bounds=files.get(BOUNDS),
            vote=files[VOTE],
            vote_int8=files.get(VOTE_INT8),
            self_test=_self_test(folder / SELF_TEST, files[SELF_TEST], manifest),
            samples=samples,
            sample_files={each.file: files[f"{SAMPLES}/{each.file}"] for each in samples.images} if samples else {},
        )


def sealed(folder: Path, manifest: dict[str, Any]) -> Manifest:
    """Write the manifest of the files in `folder`, with their checksums; return it.

    `manifest` holds every field of Manifest except `schema_version` and `files`. Raises pydantic's ValidationError if a
    field is wrong, and OSError if a file cannot be read or written.
    """
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted([*folder.iterdir(), *folder.glob(f"{SAMPLES}/*")])
        if path.is_file() and path.name not in (MANIFEST, SIGNATURE)
    }
    complete = Manifest.model_validate({"schema_version": SCHEMA_VERSION, **manifest, "files": files})
    (folder / MANIFEST).write_text(complete.model_dump_json(indent=2) + "\n")
    return complete


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """List the files in a bundle's folder that are none of the bundle's, by their path in it."""
    known = {MANIFEST, SIGNATURE, *manifest.files}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(found - known)


def _alone(folder: Path, manifest: Manifest) -> None:
    if found := strangers(folder, manifest):
        raise BundleError(f"{folder / found[0]} is no file of the bundle, and is not signed. Remove it.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if path.name == MANIFEST:
            raise BundleError(
                f"{path.parent} holds no {MANIFEST}, so it is not a bundle. Set CARSO_BUNDLE to the folder of one, "
                "such as models/mnist-conv, or make one with: carso-train run mnist-conv"
            ) from None
        raise BundleError(f"{path} is missing, though the manifest lists it. Copy the bundle again.") from None
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e.strerror}). Check the folder and its permissions.") from None


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path} is not JSON ({e}). Copy the bundle again.") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}; this release reads {SCHEMA_VERSION}. "
            "Export the bundle again with the carso-train of this release, or install the release that wrote it."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(
            f"{path} is not a valid manifest: {where}: {first['msg']}. Export the bundle again."
        ) from None


def _samples(path: Path, files: Mapping[str, bytes], manifest: Manifest) -> Samples | None:
    if INDEX not in files:
        return None
    try:
        samples = Samples.model_validate_json(files[INDEX])
    except ValidationError as e:
        raise BundleError(
            f"{path} does not describe samples: {e.errors()[0]['msg']}. Export the bundle again."
        ) from None
    for sample in samples.images:
        if f"{SAMPLES}/{sample.file}" not in files:
            raise BundleError(f"{path} names {sample.file}, which the manifest does not list. Export the bundle again.")
        if max(sample.label, sample.fast_label, sample.robust_label) >= len(manifest.classes):
            raise BundleError(
                f"{path}: {sample.file} has a class past the last of {len(manifest.classes)}. Export the bundle again."
            )
    return samples


def _self_test(path: Path, content: bytes, manifest: Manifest) -> SelfTest:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            test = SelfTest(**arrays)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise BundleError(f"{path} is not a self-test ({e}). Export the bundle again.") from None
    images, votes = (array.shape[0] if array.ndim else 0 for array in (test.images, test.votes))
    expected = {
        "images": (images, *manifest.input.shape),
        "latents": (votes, manifest.latent),
        "code_index": (votes,),
        "probabilities": (images, len(manifest.classes)),
        "codes": (images, manifest.code),
        "votes": (votes,),
        **({} if test.margins is None else {"margins": (images,)}),
    }
    for name, shape in expected.items():
        array = getattr(test, name)
        if array.shape != shape or not prod(shape):
            raise BundleError(f"{path}: {name} has shape {array.shape}, not {shape}. Export the bundle again.")
        dtype = np.dtype(np.int64 if name in ("code_index", "votes") else np.float32)
        if array.dtype != dtype:
            raise BundleError(f"{path}: {name} is of {array.dtype}, not {dtype}. Export the bundle again.")
    if test.code_index.min() < 0 or test.code_index.max() >= images:
        raise BundleError(f"{path}: code_index points past the last of {images} codes. Export the bundle again.")
    return test
