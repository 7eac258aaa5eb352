"""What is asked of the engine and what it gives back. All times are in seconds on the clock of ``time.monotonic``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from carso.choices import BISECTIONS, CertifyMode, PathName, price_of

# What ended an election: a stopping rule, the clock, or a proof that left nothing to vote on
Ending = Literal["exact", "risk-limited", "deadline", "certificate"]
# Why votes that were asked for were not cast
Spared = Literal["early_stop", "deadline", "cancelled", "certificate"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Every image within `eps` gets the same label from the first pass."""

    eps: float
    margin: float  # > 0: by how much the label's score stays above all others, at least


@dataclass(frozen=True, slots=True)
class Certify:
    """What is to be proven of a job's images."""

    mode: CertifyMode
    eps: float  # in (0, 1]; not used by `max`

    @property
    def rows(self) -> int:
        """Rows of work for each image: a pass of bounds costs about two first passes."""
        return 2 * (BISECTIONS if self.mode == "max" else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VotePlan:
    """How the robust path counts the votes of each image."""

    samples: int  # votes to count at most, >= 1
    risk: float  # chance that early stopping elects another class than all votes would; 0: exact
    seed: int | None = None  # of the latents, in [0, 2^53); None: a fresh one per image, from the operating system

    @property
    def price(self) -> int:
        """Rows of work that one image is taken to owe."""
        return price_of(self.samples)


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """The images of one request; each is an election of its own.

    Raises ValueError if there is no image.
    """

    images: np.ndarray  # [n, *shape] float32 in the bundle's value range
    plan: VotePlan | None = None  # None: the fast path
    deadline: float | None = None  # past it, open elections end with the votes that they have
    explain: bool = False  # whether the result says what the votes were cast on; for the robust path
    certify: Certify | None = None  # None: nothing is to be proven
    # What an earlier job has proven of the same images, as of its Result, which then is not proven again
    proven: tuple[Certificate | None, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.images):
            raise ValueError("a job needs at least one image")

    @property
    def path(self) -> PathName:
        """The path that the job takes."""
        return "robust" if self.plan else "fast"

    @property
    def rows(self) -> int:
        """Rows of work that the job owes when it arrives."""
        return self.first_pass_rows + (len(self.images) * (self.plan.price - 1) if self.plan else 0)

    @property
    def first_pass_rows(self) -> int:
        """Rows of work of its first passes, and of its proofs."""
        return len(self.images) * (1 + (self.certify.rows if self.certify and self.proven is None else 0))

    @property
    def bounds_at(self) -> float | None:
        """The eps of the bounds that its first passes are run with; None: without any."""
        if self.certify is None or self.certify.mode == "max" or self.proven is not None:
            return None
        return self.certify.eps

    @property
    def votes(self) -> int:
        """Votes that the job may need at most."""
        return len(self.images) * self.plan.samples if self.plan else 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the election of one image ended.

    One that a certificate decided has no votes, the first pass's label, and a risk reached of 1.
    """

    label: int  # the class with most votes, the lowest among equals; 0 if no vote was cast before a deadline
    votes: int  # cast
    tally: list[int]  # votes of each class
    ending: Ending
    risk_reached: float  # in [0, 1]: the bound that this tally gives on the chance that the full count differs
    seed: int  # of the latents


@dataclass(frozen=True, slots=True)
class Typicality:
    """How one image compares with what the purifier knows; ``carso.inference.typical`` defines the figures."""

    excess: float
    contrast: float


@dataclass(frozen=True, eq=False, slots=True)
class Explanation:
    """What the votes of one image were cast on; ``carso.inference.explanation`` makes it. Images are [*shape]."""

    purified: np.ndarray  # at the latent 0, which the figures of `Typicality` are about
    distance: float  # the mean of |image - purified| over all values
    mean: np.ndarray  # of the purified images of the first votes
    averaged: int  # how many it is the mean of
    votes: tuple[int, ...]  # the classes of the first votes
    shown: np.ndarray  # [len(votes), *shape], the purified images that they were cast on


@dataclass(frozen=True, slots=True)
class Times:
    """When a job came, when its first pass began and ended, and when its last election ended."""

    submitted: float
    started: float
    first_pass_done: float
    finished: float


@dataclass(frozen=True, eq=False, slots=True)
class Result:
    """What came of a job."""

    probabilities: np.ndarray  # [n, classes] float32: the first pass
    outcomes: tuple[Outcome, ...]  # one per image; none on the fast path
    times: Times
    typicalities: tuple[Typicality, ...] | None = None  # one per image; None: not asked for, or an image had no vote
    explanations: tuple[Explanation, ...] | None = None  # likewise
    # One per image, None where nothing is proven; or None: not asked for
    certificates: tuple[Certificate | None, ...] | None = None
    # One per image, whether it is nearly an earlier one; None: nobody looked. Classification fills it in
    near_duplicates: tuple[bool, ...] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class FirstSeen:
    """What the first pass says of one image, as soon as it is done."""

    image: int  # its index in the job
    probabilities: np.ndarray  # [classes] float32
    code: np.ndarray  # [code] float32


@dataclass(frozen=True, slots=True)
class Standing:
    """How the election of one image stands after a round."""

    image: int  # its index in the job
    tally: list[int]  # votes of each class
    votes: int  # cast
    risk_reached: float  # as of an Outcome, if the count ended here
    needed: int  # the fewest further votes that end the count, if all go to the leader; 0: it has ended


News = FirstSeen | Standing
Kinds = tuple[type[News], ...]


@dataclass(eq=False, slots=True)
class Ticket:
    """A job in flight. Whoever sets `cancelled` gets it back without a result at the end of the next round."""

    job: Job
    followed: Kinds = ()  # the news that the steps tell of it
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step of the pipeline did."""

    finished: tuple[tuple[Ticket, Result | None], ...] = ()  # in the order in which they ended; None: cancelled
    first_passes: int = 0  # images
    rows: int = 0  # votes cast
    elections: int = 0  # that cast them
    news: tuple[tuple[Ticket, News], ...] = ()  # of the jobs that are followed
    seconds: float = 0.0
    settled: Mapping[PathName, int] = field(default_factory=dict)  # rows that are owed no longer: done or spared
    spared: Mapping[Spared, int] = field(default_factory=dict)  # votes
