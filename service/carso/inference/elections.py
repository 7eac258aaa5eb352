"""The count of one image, and the job that it belongs to: state that the pipeline advances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict, TypeVar

import numpy as np

from carso.inference.jobs import Certificate, Ending, Explanation, Outcome, Result, Standing, Ticket, Times, Typicality
from carso.inference.latents import Stream
from carso.inference.vote import Rule, StoppingRule

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Progress:
    """A job of the robust path after its first pass."""

    ticket: Ticket
    probabilities: np.ndarray  # [n, classes]
    started: float
    first_pass_done: float
    deadline: float  # when its open elections end; infinity: never
    open: int  # elections still to end
    certificates: tuple[Certificate | None, ...] | None = None  # one per image; None: not asked for
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by image
    typicalities: dict[int, Typicality] = field(default_factory=dict)  # by image
    explanations: dict[int, Explanation] = field(default_factory=dict)  # by image

    def result(self, *, finished: float) -> Result | None:
        """The result; None if an election of the job was cancelled."""
        if len(self.outcomes) < len(self.probabilities):
            return None
        images = range(len(self.outcomes))
        return Result(
            self.probabilities,
            tuple(self.outcomes[image] for image in images),
            Times(self.ticket.submitted, self.started, self.first_pass_done, finished),
            _of_all(images, self.typicalities),
            _of_all(images, self.explanations),
            self.certificates,
        )


def _of_all(images: range, found: dict[int, T]) -> tuple[T, ...] | None:
    """Return what was found of each image; None if something is missing."""
    return tuple(found[image] for image in images) if len(found) == len(images) else None


class _Count(TypedDict):
    """What the rules are told; see StoppingRule."""

    leader: int
    runner_up: int
    cast: int
    expected: bool


@dataclass(eq=False, slots=True)
class Election:
    """The count of one image."""

    progress: Progress
    image: int  # its index in the job
    rule: StoppingRule
    seed: int
    code: np.ndarray  # [1, code]
    expected: int  # the class that the first pass gives
    tally: list[int]  # [classes]
    ballot: int  # votes of the current ballot that are not cast yet
    latents: Stream | None = None  # those still to come; None: no vote is cast yet
    leader: int = 0  # the two largest entries of the tally
    runner_up: int = 0
    cast: int = 0

    @property
    def left(self) -> int:
        """Votes that were asked for and not cast."""
        return self.rule.samples - self.cast

    def count(self, votes: list[int], *, cast: int) -> Rule | None:
        """Add the votes of a ballot, or of a part of it, by class; return the rule that ends the count, if one does."""
        self.tally = [before + more for before, more in zip(self.tally, votes, strict=True)] if self.cast else votes
        self.cast += cast
        self.ballot -= cast
        *_, self.runner_up, self.leader = sorted(self.tally)
        if self.ballot:
            return None
        count = self._count()
        ended_by = self.rule.ended_by(**count)
        if not ended_by:
            self.ballot = self.rule.next_ballot(**count)
        return ended_by

    def end(self, ending: Ending) -> None:
        """Note the outcome."""
        self.progress.outcomes[self.image] = Outcome(
            label=self.tally.index(self.leader),
            votes=self.cast,
            tally=self.tally,
            ending=ending,
            risk_reached=self.rule.risk_reached(**self._count()),
            seed=self.seed,
        )

    def standing(self) -> Standing:
        """Return how the count stands now."""
        count = self._count()
        needed = max(0, self.rule.needed(**count))
        return Standing(self.image, self.tally, self.cast, self.rule.risk_reached(**count), needed)

    def _count(self) -> _Count:
        return {
            "leader": self.leader,
            "runner_up": self.runner_up,
            "cast": self.cast,
            "expected": self.tally[self.expected] == self.leader,
        }
