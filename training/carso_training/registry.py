"""Tables that a folder fills: to add an entry, add one file to the folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Protocol, TypeVar


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The key in the table."""


T = TypeVar("T", bound=Named)


def entries(package: str, path: Iterable[str], kind: type[T]) -> dict[str, T]:
    """Import the modules of `package` and collect their module-level values of type `kind`, by name.

    A package calls this with its own ``__name__`` and ``__path__``. Raises ValueError if two entries share a name.
    """
    found: dict[str, T] = {}
    for module in pkgutil.iter_modules(path):
        for value in vars(import_module(f"{package}.{module.name}")).values():
            if not isinstance(value, kind):
                continue
            if found.setdefault(value.name, value) is not value:
                raise ValueError(f"{package} has two entries named {value.name!r}")
    return found
