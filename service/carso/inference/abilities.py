"""What an engine can do, which answers and `/info` tell of."""

from __future__ import annotations

from dataclasses import dataclass

from carso.choices import Precision


class DeviceError(Exception):
    """The device that was asked for is not available, or what runs on it gives wrong answers."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A precision of the votes, and the reason for it in words."""

    precision: Precision
    because: str


@dataclass(frozen=True, slots=True)
class Abilities:
    """Where an engine runs the graphs of its bundle, and how."""

    provider: str  # the execution provider really in use
    precision: Choice  # of the votes
    unproven: str | None  # why nothing can be proven, and what would change that; None: it can
