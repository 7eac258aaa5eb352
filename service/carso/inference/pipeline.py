"""The two-pass pipeline over all work in flight: what one round computes, with no threads and no HTTP.

    job (images) -> first pass -> one election per image -> rounds of votes -> tallies -> job finished

First passes that wait go first, then one round of votes is drawn from all open elections in turn, and so on. An
election leaves as soon as its count may stop, and a new one joins at the next round. The service's engine thread and
the offline evaluation run this same code.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from carso.inference.latents import Latents, Stream, stream
from carso.inference.sessions import Sessions
from carso.inference.vote import Rule, StoppingRule

Path = Literal["fast", "robust"]
Spared = Literal["early_stop", "deadline", "cancelled"]  # why votes that were asked for were not cast

# Rows that an image of the robust path is priced at, at least: it holds memory however few votes it asks for.
LEAST_PRICE = 64

SEED_BITS = 53
MAX_SEED = 2**SEED_BITS - 1  # the largest integer that every JSON reader keeps exact


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """What is asked of the robust path."""

    samples: int  # votes to count at most
    risk: float  # 0: exact
    seed: int | None = None  # None: a fresh one per image, from the operating system

    @property
    def price(self) -> int:
        """Rows of work that an image is taken to owe: its first pass and its votes, or LEAST_PRICE."""
        return max(1 + self.samples, LEAST_PRICE)


@dataclass(slots=True)
class Outcome:
    """The election of one image; `tally` holds the votes of each class."""

    label: int
    votes: int
    tally: list[int]
    rule: Rule
    seed: int


@dataclass(eq=False, slots=True)
class Job:
    """The images of one request [n, *shape] float32; they are separate elections.

    The pipeline fills in the rest. `ballot` None: the fast path, finished after the first pass. Whoever set
    `cancelled` gets the job back unfinished at the next round's end. `deadline` is on the clock of `time.monotonic`:
    past it, open elections end with the votes they have, rule ``deadline``.
    """

    images: np.ndarray
    ballot: Ballot | None = None
    deadline: float | None = None
    cancelled: bool = False
    probabilities: np.ndarray | None = None  # [n, classes]
    outcomes: list[Outcome | None] = field(default_factory=list)  # one per image
    open: int = 0  # elections still to end
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0  # its first pass began
    first_pass_done: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.images):
            raise ValueError("a job needs at least one image")

    @property
    def path(self) -> Path:
        return "robust" if self.ballot else "fast"

    @property
    def rows(self) -> int:
        """Rows of work that it owes when it comes."""
        return len(self.images) * (self.ballot.price if self.ballot else 1)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    finished: list[Job]  # in the order in which they ended; cancelled ones too
    first_passes: int  # images
    rows: int  # votes
    elections: int  # that took part in the round
    seconds: float
    settled: Counter[Path]  # rows that jobs owe no longer: done or spared
    spared: Counter[Spared]  # votes


@dataclass(eq=False, slots=True)
class _Election:
    job: Job
    image: int  # its index in the job
    rule: StoppingRule
    seed: int
    code: np.ndarray  # [code]
    expected: int  # the first pass' class
    tally: list[int]  # [classes]
    latents: Stream  # those still to come
    leader: int = 0  # the two largest entries of the tally
    runner_up: int = 0
    cast: int = 0

    def ballot(self) -> int:
        return self.rule.ballot(
            leader=self.leader,
            runner_up=self.runner_up,
            cast=self.cast,
            expected=self.tally[self.expected] == self.leader,
        )

    def count(self, ballot: list[int], *, cast: int) -> Rule | None:
        """Add the votes of one ballot, by class; say which rule, if any, ends the count."""
        self.tally = [votes + more for votes, more in zip(self.tally, ballot, strict=True)]
        self.cast += cast
        *_, self.runner_up, self.leader = sorted(self.tally)
        return self.rule.ended_by(
            leader=self.leader,
            runner_up=self.runner_up,
            cast=self.cast,
            expected=self.tally[self.expected] == self.leader,
        )

    def end(self, rule: Rule) -> None:
        self.job.outcomes[self.image] = Outcome(
            label=self.tally.index(self.leader), votes=self.cast, tally=self.tally, rule=rule, seed=self.seed
        )
        self.job.open -= 1


class Pipeline:
    """All jobs in flight on one device. One thread at a time."""

    def __init__(self, sessions: Sessions, *, latent: int, classes: int, round_rows: int) -> None:
        """`round_rows`: votes of one round at most, or one ballot if that is larger; also images of one first pass."""
        self.sessions = sessions
        self.latent = latent
        self.classes = classes
        self.round_rows = round_rows
        self._latents = Latents()
        self._waiting: dict[Path, deque[Job]] = {"fast": deque(), "robust": deque()}  # for their first pass
        self._open: deque[_Election] = deque()
        self._voting: set[Job] = set()  # whose elections are open
        self._settled: Counter[Path] = Counter()  # in this step, as Step's
        self._spared: Counter[Spared] = Counter()

    @property
    def busy(self) -> bool:
        return bool(self._open or any(self._waiting.values()))

    def admit(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._waiting[job.path].append(job)

    def first_passes(self) -> Step:
        """The first passes of waiting jobs, those of the fast path before the others: as many as fit into one batch; a
        larger job goes alone, in parts."""
        began = time.monotonic()
        finished: list[Job] = []
        images = self._first_passes(finished)
        return self._done(finished, began=began, first_passes=images)

    def round(self) -> Step:
        """One round of votes over open elections in turn, as many as fit; those it leaves open go to the back."""
        began = time.monotonic()
        finished: list[Job] = []
        self._dismiss(finished)
        rows, elections = self._round(finished)
        return self._done(finished, began=began, rows=rows, elections=elections)

    def step(self) -> Step:
        """First passes, then a round."""
        first, then = self.first_passes(), self.round()
        return Step(
            finished=[*first.finished, *then.finished],
            first_passes=first.first_passes,
            rows=then.rows,
            elections=then.elections,
            seconds=first.seconds + then.seconds,
            settled=first.settled + then.settled,
            spared=first.spared + then.spared,
        )

    def classify(self, images: np.ndarray, ballot: Ballot) -> list[Outcome]:
        """The elections of `images` [n, *shape], run to their end: for offline use of an idle pipeline."""
        job = Job(images, ballot)
        self.admit([job])
        while self.busy:
            self.step()
        return [outcome for outcome in job.outcomes if outcome is not None]

    def _done(
        self, finished: list[Job], *, began: float, first_passes: int = 0, rows: int = 0, elections: int = 0
    ) -> Step:
        now = time.monotonic()
        for job in finished:
            job.finished = now
        settled, self._settled = self._settled, Counter()
        spared, self._spared = self._spared, Counter()
        return Step(finished, first_passes, rows, elections, now - began, settled, spared)

    def _first_passes(self, finished: list[Job]) -> int:
        batch: list[Job] = []
        size = 0
        while waiting := self._waiting["fast"] or self._waiting["robust"]:
            if batch and size + len(waiting[0].images) > self.round_rows:
                break
            job = waiting.popleft()
            if job.cancelled:
                self._settle_first_passes(job)
                if job.ballot is not None:
                    self._spare(len(job.images) * job.ballot.samples, "cancelled")
                finished.append(job)
                continue
            batch.append(job)
            size += len(job.images)
        if not batch:
            return 0

        started = time.monotonic()
        images = batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
        parts = [
            self.sessions.first_pass(images[start : start + self.round_rows])
            for start in range(0, size, self.round_rows)
        ]
        probabilities = np.concatenate([part.probabilities for part in parts])
        codes = np.concatenate([part.codes for part in parts])
        labels = probabilities.argmax(axis=1).tolist()
        done = time.monotonic()

        offset = 0
        for job in batch:
            own = slice(offset, offset + len(job.images))
            offset = own.stop
            job.started, job.first_pass_done = started, done
            job.probabilities = probabilities[own]
            self._settle_first_passes(job)
            if job.ballot is None:
                finished.append(job)
            else:
                self._call_elections(job, job.ballot, codes[own], labels[own])
        return size

    def _call_elections(self, job: Job, ballot: Ballot, codes: np.ndarray, expected: list[int]) -> None:
        rule = StoppingRule(ballot.samples, self.classes, ballot.risk)
        job.outcomes = [None] * len(codes)
        job.open = len(codes)
        self._voting.add(job)
        for image, (code, label) in enumerate(zip(codes, expected, strict=True)):
            seed = secrets.randbits(SEED_BITS) if ballot.seed is None else ballot.seed
            tally = [0] * self.classes
            self._open.append(_Election(job, image, rule, seed, code, label, tally, stream(seed)))

    def _round(self, finished: list[Job]) -> tuple[int, int]:
        elections, sizes = self._call_round()
        if not elections:
            return 0, 0
        rows = sum(sizes)
        latents = np.empty((rows, self.latent), np.float32)
        start = 0
        for election, size in zip(elections, sizes, strict=True):
            election.latents = self._latents.draw(election.latents, out=latents[start : start + size])
            start += size
        code_index = np.repeat(np.arange(len(elections)), sizes)
        votes = self.sessions.vote(np.stack([e.code for e in elections]), code_index, latents)
        by_class = np.bincount(code_index * self.classes + votes, minlength=len(elections) * self.classes)

        for election, ballot, cast in zip(elections, by_class.reshape(-1, self.classes).tolist(), sizes, strict=True):
            self._settled["robust"] += cast
            if rule := election.count(ballot, cast=cast):
                self._spare(election.rule.samples - election.cast, "early_stop")
                election.end(rule)
                self._leave(election.job, finished)
            else:
                self._open.append(election)
        return rows, len(elections)

    def _dismiss(self, finished: list[Job]) -> None:
        """Drop the elections of cancelled jobs and end those past their deadline: of the whole queue, not in turn."""
        now = time.monotonic()
        leaving = {job for job in self._voting if job.cancelled or (job.deadline is not None and now >= job.deadline)}
        if not leaving:
            return
        staying: deque[_Election] = deque()
        for election in self._open:
            job = election.job
            if job not in leaving:
                staying.append(election)
                continue
            reason: Literal["cancelled", "deadline"] = "cancelled" if job.cancelled else "deadline"
            self._spare(election.rule.samples - election.cast, reason)
            if reason == "deadline":
                election.end("deadline")
            else:
                job.open -= 1
            self._leave(job, finished)
        self._open = staying

    def _leave(self, job: Job, finished: list[Job]) -> None:
        """After the end of one of its elections."""
        if not job.open:
            self._voting.remove(job)
            finished.append(job)

    def _settle_first_passes(self, job: Job) -> None:
        """What is then owed of a robust job are its votes, whatever it was priced at."""
        votes = len(job.images) * job.ballot.samples if job.ballot else 0
        self._settled[job.path] += job.rows - votes

    def _spare(self, votes: int, reason: Spared) -> None:
        self._settled["robust"] += votes
        self._spared[reason] += votes

    def _call_round(self) -> tuple[list[_Election], list[int]]:
        """Take the elections of the next round off the queue, with the number of votes that each casts."""
        elections: list[_Election] = []
        sizes: list[int] = []
        room = self.round_rows
        while self._open:
            size = self._open[0].ballot()
            if size > room and elections:
                break
            elections.append(self._open.popleft())
            sizes.append(size)
            room -= size
        return elections, sizes
