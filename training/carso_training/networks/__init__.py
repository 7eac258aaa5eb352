"""The networks that a recipe may name.

To add an architecture, add a file with a `ClassifierArchitecture`, a `PurifierArchitecture` or both to this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from carso_training.networks.interface import (
    Architecture,
    Classifier,
    ClassifierArchitecture,
    ClassifierConfig,
    Purifier,
    PurifierArchitecture,
    PurifierConfig,
)
from carso_training.registry import entries

__all__ = [
    "CLASSIFIERS",
    "PURIFIERS",
    "AnyClassifierConfig",
    "AnyPurifierConfig",
    "Classifier",
    "ClassifierConfig",
    "Purifier",
    "PurifierConfig",
    "build_classifier",
    "build_purifier",
    "classifier_config",
    "purifier_config",
]

CLASSIFIERS = entries(__name__, __path__, ClassifierArchitecture)
PURIFIERS = entries(__name__, __path__, PurifierArchitecture)


def classifier_config(value: Any) -> ClassifierConfig:
    """Read a classifier's config as it stands in a recipe: its ``network`` says which one. Raises ValueError."""
    return _config(value, CLASSIFIERS)


def purifier_config(value: Any) -> PurifierConfig:
    """Read a purifier's config as it stands in a recipe: its ``network`` says which one. Raises ValueError."""
    return _config(value, PURIFIERS)


def build_classifier(config: ClassifierConfig) -> Classifier:
    """Build a classifier with fresh weights, from PyTorch's global random generator."""
    return CLASSIFIERS[config.network].build(config)


def build_purifier(config: PurifierConfig) -> Purifier:
    """Build a purifier with fresh weights, from PyTorch's global random generator."""
    return PURIFIERS[config.network].build(config)


def _config(value: Any, table: Mapping[str, Architecture[Any, Any]]) -> Any:
    if not isinstance(value, Mapping):
        return value
    name = value.get("network", "fcn")
    if name not in table:
        raise ValueError(f"there is no network {name!r}. There are: {', '.join(table)}")
    return table[name].config.model_validate(dict(value))


AnyClassifierConfig = Annotated[SerializeAsAny[ClassifierConfig], BeforeValidator(classifier_config)]
AnyPurifierConfig = Annotated[SerializeAsAny[PurifierConfig], BeforeValidator(purifier_config)]
