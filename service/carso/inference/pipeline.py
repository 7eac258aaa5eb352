"""The two-pass pipeline over all work in flight: what one step computes, with no threads and no HTTP.

    job (images) -> first pass -> one election per image -> rounds of votes -> tallies -> result

Waiting first passes go first. Then one round casts votes for the open elections in turn, and so on. An election leaves
as soon as its count may stop, and a new one joins at the next round. The service's engine thread and the offline
evaluation run this same code.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from carso.choices import MAX_SEED, PathName
from carso.inference.jobs import Ending, Job, Outcome, Result, Spared, Step, Ticket, Times, VotePlan
from carso.inference.latents import Latents, Stream, stream
from carso.inference.sessions import Sessions
from carso.inference.vote import Rule, StoppingRule


@dataclass(eq=False, slots=True)
class _Progress:
    """A job of the robust path after its first pass."""

    ticket: Ticket
    probabilities: np.ndarray  # [n, classes]
    started: float
    first_pass_done: float
    open: int  # elections still to end
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by image

    def result(self, *, finished: float) -> Result | None:
        """The result; None if an election of the job was cancelled."""
        if len(self.outcomes) < len(self.probabilities):
            return None
        outcomes = tuple(outcome for _, outcome in sorted(self.outcomes.items()))
        return Result(
            self.probabilities, outcomes, Times(self.ticket.submitted, self.started, self.first_pass_done, finished)
        )


@dataclass(eq=False, slots=True)
class _Election:
    """The count of one image."""

    progress: _Progress
    image: int  # its index in the job
    rule: StoppingRule
    seed: int
    code: np.ndarray  # [code]
    expected: int  # the class that the first pass gives
    tally: list[int]  # [classes]
    latents: Stream  # those still to come
    leader: int = 0  # the two largest entries of the tally
    runner_up: int = 0
    cast: int = 0

    @property
    def left(self) -> int:
        """Votes that were asked for and not cast."""
        return self.rule.samples - self.cast

    def next_ballot(self) -> int:
        """How many votes to cast in the next round."""
        return self.rule.next_ballot(
            leader=self.leader,
            runner_up=self.runner_up,
            cast=self.cast,
            expected=self.tally[self.expected] == self.leader,
        )

    def count(self, ballot: list[int], *, cast: int) -> Rule | None:
        """Add the votes of one ballot, by class; return the rule that ends the count, if one does."""
        self.tally = [votes + more for votes, more in zip(self.tally, ballot, strict=True)]
        self.cast += cast
        *_, self.runner_up, self.leader = sorted(self.tally)
        return self.rule.ended_by(
            leader=self.leader,
            runner_up=self.runner_up,
            cast=self.cast,
            expected=self.tally[self.expected] == self.leader,
        )

    def end(self, ending: Ending) -> None:
        """Note the outcome."""
        self.progress.outcomes[self.image] = Outcome(
            label=self.tally.index(self.leader), votes=self.cast, tally=self.tally, ending=ending, seed=self.seed
        )


_Left = tuple[_Election, Spared]  # an election that is over, and why the rest of its votes was spared


class Pipeline:
    """All jobs in flight on one device. Not for use by two threads at once."""

    def __init__(
        self,
        sessions: Sessions,
        *,
        latent: int,
        classes: int,
        round_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`round_rows`: the most votes of one round, or one ballot if that is larger; also the most images of one first
        pass. `clock` tells the time that deadlines are compared with, in seconds.
        """
        self.sessions = sessions
        self.latent = latent
        self.classes = classes
        self.round_rows = round_rows
        self._clock = clock
        self._latents = Latents()
        self._waiting: dict[PathName, deque[Ticket]] = {"fast": deque(), "robust": deque()}  # for their first pass
        self._open: deque[_Election] = deque()
        self._voting: set[_Progress] = set()  # jobs with open elections

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._open or any(self._waiting.values()))

    def admit(self, tickets: Iterable[Ticket]) -> None:
        """Take on jobs; their first passes come with the next step."""
        for ticket in tickets:
            self._waiting[ticket.job.path].append(ticket)

    def first_passes(self) -> Step:
        """Compute the first passes of waiting jobs, the fast path's before the others: as many jobs as fit into one
        batch. A larger job goes alone, in parts.
        """
        began = self._clock()
        batch, gone = self._take_batch()
        settled: Counter[PathName] = Counter()
        spared: Counter[Spared] = Counter()
        for ticket in gone:
            settled[ticket.job.path] += ticket.job.rows
            spared["cancelled"] += ticket.job.votes
        finished: list[tuple[Ticket, Result | None]] = [(ticket, None) for ticket in gone]
        if batch:
            finished += self._first_pass(batch)
            for ticket in batch:  # from now on a robust job owes its votes, whatever it was priced at
                settled[ticket.job.path] += ticket.job.rows - ticket.job.votes
        return Step(
            finished=tuple(finished),
            first_passes=sum(len(ticket.job.images) for ticket in batch),
            seconds=self._clock() - began,
            settled=settled,
            spared=spared,
        )

    def round(self) -> Step:
        """Cast one round of votes for the open elections in turn, as many as fit; those left open go to the back."""
        began = self._clock()
        left = self._dismiss(began)
        elections, sizes = self._call_round()
        rows = sum(sizes)
        if elections:
            left += self._vote(elections, sizes)
        spared: Counter[Spared] = Counter()
        for election, reason in left:
            spared[reason] += election.left
        now = self._clock()
        return Step(
            finished=tuple((progress.ticket, progress.result(finished=now)) for progress in self._close(left)),
            rows=rows,
            elections=len(elections),
            seconds=now - began,
            settled=Counter({"robust": rows + spared.total()}),
            spared=spared,
        )

    def classify(self, images: np.ndarray, plan: VotePlan) -> tuple[Outcome, ...]:
        """Run the elections of `images` [n, *shape] to their end and return one outcome per image: for offline use of
        an idle pipeline.
        """
        ticket = Ticket(Job(images, plan))
        self.admit([ticket])
        results: dict[Ticket, Result | None] = {}
        while self.busy:
            results.update(self.first_passes().finished)
            results.update(self.round().finished)
        result = results[ticket]
        assert result is not None  # noqa: S101  nobody cancelled it
        return result.outcomes

    def _take_batch(self) -> tuple[list[Ticket], list[Ticket]]:
        """Take the next batch of first passes off the queues; and the cancelled jobs that stood before its end."""
        batch: list[Ticket] = []
        gone: list[Ticket] = []
        size = 0
        while waiting := self._waiting["fast"] or self._waiting["robust"]:
            if batch and size + len(waiting[0].job.images) > self.round_rows:
                break
            ticket = waiting.popleft()
            if ticket.cancelled:
                gone.append(ticket)
            else:
                batch.append(ticket)
                size += len(ticket.job.images)
        return batch, gone

    def _first_pass(self, batch: Sequence[Ticket]) -> list[tuple[Ticket, Result]]:
        """Compute the first passes of a batch and open the elections of its robust jobs; return the fast results."""
        started = self._clock()
        images = batch[0].job.images if len(batch) == 1 else np.concatenate([ticket.job.images for ticket in batch])
        parts = [
            self.sessions.first_pass(images[start : start + self.round_rows])
            for start in range(0, len(images), self.round_rows)
        ]
        probabilities = np.concatenate([part.probabilities for part in parts])
        codes = np.concatenate([part.codes for part in parts])
        labels = probabilities.argmax(axis=1).tolist()
        done = self._clock()

        finished: list[tuple[Ticket, Result]] = []
        offset = 0
        for ticket in batch:
            own = slice(offset, offset + len(ticket.job.images))
            offset = own.stop
            if ticket.job.plan is None:
                times = Times(ticket.submitted, started, done, done)
                finished.append((ticket, Result(probabilities[own], (), times)))
            else:
                progress = _Progress(ticket, probabilities[own], started, done, open=len(ticket.job.images))
                self._open_elections(progress, ticket.job.plan, codes[own], labels[own])
        return finished

    def _open_elections(self, progress: _Progress, plan: VotePlan, codes: np.ndarray, expected: list[int]) -> None:
        rule = StoppingRule(plan.samples, self.classes, plan.risk)
        self._voting.add(progress)
        for image, (code, label) in enumerate(zip(codes, expected, strict=True)):
            seed = secrets.randbelow(MAX_SEED + 1) if plan.seed is None else plan.seed
            tally = [0] * self.classes
            self._open.append(_Election(progress, image, rule, seed, code, label, tally, stream(seed)))

    def _call_round(self) -> tuple[list[_Election], list[int]]:
        """Take the elections of the next round off the queue; return them with the size of the ballot of each."""
        elections: list[_Election] = []
        sizes: list[int] = []
        room = self.round_rows
        while self._open:
            size = self._open[0].next_ballot()
            if size > room and elections:
                break
            elections.append(self._open.popleft())
            sizes.append(size)
            room -= size
        return elections, sizes

    def _vote(self, elections: Sequence[_Election], sizes: Sequence[int]) -> list[_Left]:
        """Cast and count one ballot of each election; return those that it ended."""
        latents = np.empty((sum(sizes), self.latent), np.float32)
        start = 0
        for election, size in zip(elections, sizes, strict=True):
            election.latents = self._latents.draw(election.latents, out=latents[start : start + size])
            start += size
        code_index = np.repeat(np.arange(len(elections)), sizes)
        votes = self.sessions.vote(np.stack([election.code for election in elections]), code_index, latents)
        by_class = np.bincount(code_index * self.classes + votes, minlength=len(elections) * self.classes)

        ended: list[_Left] = []
        for election, ballot, size in zip(elections, by_class.reshape(-1, self.classes).tolist(), sizes, strict=True):
            if rule := election.count(ballot, cast=size):
                election.end(rule)
                ended.append((election, "early_stop"))
            else:
                self._open.append(election)
        return ended

    def _dismiss(self, now: float) -> list[_Left]:
        """Take the elections of cancelled jobs, and of those past their deadline, out of the whole queue."""
        reasons: dict[_Progress, Spared] = {}
        for progress in self._voting:
            if progress.ticket.cancelled:
                reasons[progress] = "cancelled"
            elif (deadline := progress.ticket.job.deadline) is not None and now >= deadline:
                reasons[progress] = "deadline"
        if not reasons:
            return []
        staying: deque[_Election] = deque()
        left: list[_Left] = []
        for election in self._open:
            reason = reasons.get(election.progress)
            if reason is None:
                staying.append(election)
                continue
            if reason == "deadline":
                election.end("deadline")
            left.append((election, reason))
        self._open = staying
        return left

    def _close(self, left: Iterable[_Left]) -> list[_Progress]:
        """Note that elections have left; return the jobs whose last one did, in order."""
        closed: list[_Progress] = []
        for election, _ in left:
            progress = election.progress
            progress.open -= 1
            if not progress.open:
                self._voting.remove(progress)
                closed.append(progress)
        return closed
