"""The data sets that a recipe may name. To add one, add a file with a `DatasetSpec` to this folder."""

from __future__ import annotations

from carso_training.datasets.spec import DatasetSpec
from carso_training.errors import DataUnavailableError
from carso_training.registry import entries

DATASETS = entries(__name__, __path__, DatasetSpec)


def dataset(name: str) -> DatasetSpec:
    """Look a data set up by name. Raises DataUnavailableError, which lists the names that there are."""
    if name not in DATASETS:
        raise DataUnavailableError(f"there is no data set {name!r}. There are: {', '.join(DATASETS)}")
    return DATASETS[name]
