"""How hard a measurement tries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EffortName = Literal["quick", "thorough"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The budget of every attack. A figure's file repeats it."""

    name: str  # of the entry below; "custom" if something of it was changed
    steps: int  # of APGD
    targets: int  # other classes that targeted APGD aims at
    restarts: int  # of PGD, with another random start each
    pgd_steps: int  # of 2.5 eps / steps each
    queries: int  # of Square and of random search
    latents: int  # votes that stand for the expectation, at every step of every attack on CARSO
    latents_of_square: int  # votes that stand for it in attacks without gradients; they stay the same for a whole batch
    draws: int  # elections that an image must win


EFFORTS: dict[EffortName, Effort] = {
    # on an idle core, about a second for each image that withstands it: a look, and a baseline for tests
    "quick": Effort(
        name="quick",
        steps=50,
        targets=3,
        restarts=2,
        pgd_steps=50,
        queries=1000,
        latents=8,
        latents_of_square=4,
        draws=2,
    ),
    # on an idle core, about ten seconds for each image that withstands it
    "thorough": Effort(
        name="thorough",
        steps=100,
        targets=9,
        restarts=5,
        pgd_steps=200,
        queries=5000,
        latents=20,
        latents_of_square=5,
        draws=5,
    ),
}
