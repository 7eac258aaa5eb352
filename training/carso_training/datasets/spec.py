"""What the project knows of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from carso_training.datasets.examples import Examples
from carso_training.datasets.files import Source, ensure

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set: what it is, where its files come from, and how they are read."""

    name: str  # as in a recipe
    title: str  # for people
    classes: tuple[str, ...]  # a name for each label, from 0 on
    input_shape: tuple[int, int, int]  # channels, height, width
    mean: float  # of the training pixels in [0, 1]
    std: float
    background: float  # the value round the subject, in [0, 1]
    expects: str  # what the images show, in which polarity and framing: a sentence for people
    files: Mapping[str, str]  # SHA-256 of each unpacked file, by name
    sources: tuple[Source, ...]  # tried in this order
    read: Callable[[Path, Split], Examples]  # from the folder that holds the files

    def ensure(self, *, cache: Path | None = None, given: Path | None = None) -> Path:
        """Bring the verified files into the cache folder; return the folder.

        `cache`: None for a folder of this data set in the user's cache. `given`: a folder of the user's with the
        files, plain or .gz, or with a folder of that kind named after the data set; it is tried first. Raises
        DataUnavailableError, which names every source that was tried and why it failed.
        """
        cache = cache or user_cache_path("carso") / self.name
        if given is not None and (given / self.name).is_dir():
            given /= self.name
        return ensure(self.files, title=self.title, sources=self.sources, cache=cache, given=given)

    def load(self, split: Split, *, cache: Path | None = None, given: Path | None = None) -> Examples:
        """Read one split, and first fetch the files that are not in the cache. Raises DataUnavailableError."""
        return self.read(self.ensure(cache=cache, given=given), split)
