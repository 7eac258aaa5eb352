"""Stream thinning: which frames of a stream get the robust answer beside the fast one. Pure arithmetic on a clock.

Every frame of a stream has its first pass, which is cheap. A policy then chooses the frames whose votes are counted:

    rate       a draw: the chance is `rate`, whatever the frame shows and whatever the load is
    load       the same draw, where the engine has time to spare: the chance rises towards `max_rate`
    budget     the same draw, where the budget has votes to spare: likewise
    margin     the two most probable classes of the first pass differ by less than `margin`
    untypical  the frame is not like the images that the bundle knows
    uncertified  it is not proven that the label of the first pass is the same all round the frame

**Promise.** Let a frame come while the budget, if there is one, is not spent. Then the chance that it is drawn is at
least `rate` and at most `max_rate`, given everything that happened before, all earlier answers included. The draws are
independent and come from the operating system, so nobody can time an attack between them. What the caller sends and
what the load is move the chance between the two bounds, and not beyond.

A budget caps all policies, and whoever sends frames that look uncertain could spend it on them. So `margin`,
`untypical` and `uncertified` choose no frame while the budget is less than half full: the rest is for the draw.

Only the drawn frames are a fair sample of the stream. On the others the two paths disagree more often than on clean
traffic, because of how they were chosen, so they are no evidence of an attack (``carso.telemetry.evidence``).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Reason = Literal["rate", "load", "budget", "margin", "untypical", "uncertified"]

DRAWN: frozenset[Reason] = frozenset(("rate", "load", "budget"))  # reasons that do not depend on what a frame shows
SAVED_UP = 10.0  # seconds: how long the votes of a quiet stream are saved up, as for the rows of API keys
RESERVED = 0.5  # of a full budget: what the policies that look at a frame leave for the draw
FIRST_GUESS = 64.0  # votes that a frame is taken to need before one was counted; clean MNIST images take 13
FADE = 0.9  # of what is remembered of the votes per frame, per counted frame
_BITS = 53  # of a draw: as many as a float in [0, 1) holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Which frames are chosen. Raises ValueError for what cannot be one."""

    rate: float  # the least chance of a draw, in [0, 1]
    max_rate: float  # the chance of a draw if there is time, and votes, to spare; in [rate, 1]
    margin: float = 0.0  # in [0, 1]; 0: no frame is chosen for its margin
    untypical: bool = False
    uncertified: bool = False
    budget: float | None = None  # votes per second, > 0; None: as many as the policies choose

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= self.max_rate <= 1:
            raise ValueError(f"rate {self.rate:g} and max_rate {self.max_rate:g} are not 0 <= rate <= max_rate <= 1")
        if not 0 <= self.margin <= 1:
            raise ValueError(f"a margin of {self.margin:g} is not from 0 to 1")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"a budget of {self.budget:g} votes per second is not above 0")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is done with one frame."""

    why: tuple[Reason, ...]  # what chose the frame, a draw first; empty: nothing did
    afforded: bool = True  # False: it was chosen, and the budget has no votes for it
    charged: float = 0.0  # votes that the budget is charged until `settle`

    @property
    def counted(self) -> bool:
        """Whether the frame gets the robust answer."""
        return bool(self.why) and self.afforded

    @property
    def drawn(self) -> bool:
        """Whether it was chosen by a draw, and not only for what it shows."""
        return not DRAWN.isdisjoint(self.why)


class Budget:
    """A token bucket of votes. It may be overdrawn: what a count costs is known at its end."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_second`: votes, > 0. `clock`: in seconds. The bucket begins full."""
        self._per_second = per_second
        self._most = per_second * SAVED_UP
        self._clock = clock
        self._left, self._at = self._most, clock()

    @property
    def level(self) -> float:
        """How full the bucket is: 1 at most, and below 0 if it is overdrawn."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        return self._left / self._most

    def charge(self, votes: float) -> None:
        """Take votes; a negative number gives back."""
        self._left -= votes


def drawn() -> float:
    """Draw a number from [0, 1) that nobody can predict."""
    return secrets.randbits(_BITS) / float(2**_BITS)


class Thinning:
    """Chooses the frames of one stream; the promise is that of the module."""

    def __init__(
        self, policy: Policy, *, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = drawn
    ) -> None:
        """`clock`: in seconds. `draw`: independent draws from [0, 1)."""
        self._policy = policy
        self._draw = draw
        self._budget = None if policy.budget is None else Budget(policy.budget, clock=clock)
        self._guess = FIRST_GUESS  # votes that the next frame will need

    def choose(self, *, margin: float, typical: bool | None, certified: bool | None = None, load: float) -> Choice:
        """Choose or pass over a frame. `settle` must follow if it is counted.

        `margin`: between the two most probable classes, in [0, 1]. `typical`, `certified`: None if nobody looked.
        `load`: of the engine, from 0 (idle) to 1 (busy).
        """
        policy = self._policy
        level = 1.0 if self._budget is None else self._budget.level
        spare = max(0.0, min(1.0, 1.0 - load, level))
        why: list[Reason] = []
        draw = self._draw()
        if draw < policy.rate:
            why.append("rate")
        elif draw < policy.rate + (policy.max_rate - policy.rate) * spare:
            why.append("load" if self._budget is None else "budget")
        is_drawn = bool(why)
        if margin < policy.margin:
            why.append("margin")
        if policy.untypical and typical is False:
            why.append("untypical")
        if policy.uncertified and certified is False:
            why.append("uncertified")
        if not why:
            return Choice(())
        if self._budget is None:
            return Choice(tuple(why))
        if level <= (0.0 if is_drawn else RESERVED):
            return Choice(tuple(why), afforded=False)
        self._budget.charge(self._guess)
        return Choice(tuple(why), charged=self._guess)

    def settle(self, choice: Choice, *, votes: int) -> None:
        """Charge what the count of a frame took, instead of the guess. `votes` is 0 if there was no count after all."""
        if votes:
            self._guess = FADE * self._guess + (1 - FADE) * votes
        if self._budget is not None:
            self._budget.charge(votes - choice.charged)
