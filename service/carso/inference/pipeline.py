"""The two-pass pipeline over all work in flight: what one step computes, with no threads and no HTTP.

    job (images) -> first pass [with bounds] -> one election per image -> rounds of votes -> tallies -> result

Waiting first passes go first. Then one round casts votes for the open elections in turn, and so on. An election leaves
as soon as its count may stop, and a new one joins at the next round. The service's engine thread and the offline
evaluation run this same code.

Where a deadline is near, a round casts only a part of each ballot, so that more elections have votes by then. A part is
counted, but the rules are checked at the end of a ballot only: an answer to a seed does not depend on the parts.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, islice

import numpy as np

from carso.choices import MAX_SEED, PathName
from carso.inference.certificate import certificate, largest, rounded_up
from carso.inference.elections import Election, Progress
from carso.inference.explanation import AVERAGED, explanation
from carso.inference.jobs import (
    Certificate,
    FirstSeen,
    Job,
    News,
    Outcome,
    Result,
    Spared,
    Standing,
    Step,
    Ticket,
    Times,
    Typicality,
    VotePlan,
)
from carso.inference.latents import Part, Stream, Streams, drawing
from carso.inference.sessions import FirstPass, Sessions
from carso.inference.typical import typicalities
from carso.inference.vote import SMALLEST_BALLOT, StoppingRule

# A deadline is near if it comes before this many times what a ballot of each open election takes at the measured pace.
NEAR = 2.0
FADE = 0.9  # of what is remembered of the pace, per round


_Left = tuple[Election, Spared]  # an election that is over, and why the rest of its votes was spared


class Pipeline:
    """All jobs in flight on one device. Not for use by two threads at once."""

    def __init__(
        self,
        sessions: Sessions,
        *,
        latent: int,
        classes: int,
        round_rows: int,
        eps: float | None = None,
        typical_on: Collection[PathName] = frozenset(("robust",)),
        draw_threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`round_rows`: the most votes of one round, or one ballot if that is larger; also the most images of one first
        pass. `eps`: that of ``carso.inference.typical``, whose figures jobs get that take a path in `typical_on`; None:
        no job does. Each costs one purified row for an image. `draw_threads` draw the latents of a round: one is enough
        where the votes take longer than their latents. `clock` tells the time that deadlines are compared with,
        in seconds.
        """
        self.sessions = sessions
        self.latent = latent
        self.classes = classes
        self.round_rows = round_rows
        self._eps = eps
        self._typical_on = frozenset[PathName]() if eps is None else frozenset(typical_on)
        self._clock = clock
        # of samples and risk; bounded, because callers choose both
        self._rule = lru_cache(maxsize=128)(partial(StoppingRule, classes=classes))
        self._streams = Streams()
        self._draw = drawing(draw_threads)
        self._waiting: dict[PathName, deque[Ticket]] = {"fast": deque(), "robust": deque()}  # for their first pass
        self._open: deque[Election] = deque()
        self._voting: set[Progress] = set()  # jobs with open elections
        self._called = 0  # votes of the current ballots of all open elections that are not cast yet
        self._recent_rows = 0.0  # both fade
        self._recent_seconds = 0.0

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
        settled: defaultdict[PathName, int] = defaultdict(int)
        spared: defaultdict[Spared, int] = defaultdict(int)
        for ticket in gone:
            settled[ticket.job.path] += ticket.job.rows
            spared["cancelled"] += ticket.job.votes
        finished: list[tuple[Ticket, Result | None]] = [(ticket, None) for ticket in gone]
        news: list[tuple[Ticket, News]] = []
        if batch:
            done, decided = self._first_pass(batch, news)
            finished += done
            for ticket in batch:  # from now on a robust job owes its votes, whatever it was priced at
                settled[ticket.job.path] += ticket.job.rows - ticket.job.votes
            if decided:
                settled["robust"] += decided
                spared["certificate"] += decided
        return Step(
            finished=tuple(finished),
            first_passes=sum(len(ticket.job.images) for ticket in batch),
            news=tuple(news),
            seconds=self._clock() - began,
            settled=settled,
            spared=spared,
        )

    def round(self) -> Step:
        """Cast one round of votes for the open elections in turn, as many as fit; those left open go to the back.

        If a deadline has passed, no vote is cast, so that the answers which are due leave at once.
        """
        began = self._clock()
        left = self._dismiss(began)
        due = any(reason == "deadline" for _, reason in left)
        elections, sizes = ([], []) if due else self._call_round(began)
        rows = sum(sizes)
        if elections:
            left += self._vote(elections, sizes)
            self._recent_rows = FADE * self._recent_rows + rows
            self._recent_seconds = FADE * self._recent_seconds + self._clock() - began
        spared: defaultdict[Spared, int] = defaultdict(int)
        for election, reason in left:
            spared[reason] += election.left
            if election.progress.ticket.job.explain and reason != "cancelled":
                self._explain(election)
        now = self._clock()
        followed = [election for election in elections if Standing in election.progress.ticket.followed]
        return Step(
            finished=tuple((progress.ticket, progress.result(finished=now)) for progress in self._close(left)),
            news=tuple((election.progress.ticket, election.standing()) for election in followed),
            rows=rows,
            elections=len(elections),
            seconds=now - began,
            settled={"robust": rows + sum(spared.values())},
            spared=spared,
        )

    def classify(self, images: np.ndarray, plan: VotePlan) -> tuple[Outcome, ...]:
        """Run the elections of `images` [n, *shape] to their end and return one outcome per image: for offline use of
        an idle pipeline.
        """
        (result,) = self.run([Job(images, plan)])
        return result.outcomes

    def run(self, jobs: Iterable[Job]) -> list[Result]:
        """Run `jobs` to their end and return their results, in order: for offline use of an idle pipeline."""
        tickets = [Ticket(job) for job in jobs]
        self.admit(tickets)
        results: dict[Ticket, Result] = {}
        while self.busy:
            for step in (self.first_passes(), self.round()):
                results |= {ticket: result for ticket, result in step.finished if result is not None}
        return [results[ticket] for ticket in tickets]

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

    def _first_pass(
        self, batch: Sequence[Ticket], news: list[tuple[Ticket, News]]
    ) -> tuple[list[tuple[Ticket, Result | None]], int]:
        """Compute the first passes of a batch and open the elections of its robust jobs. Add to `news` what there is
        to tell.

        Return the results that need no vote, and how many votes certificates spared.
        """
        started = self._clock()
        batch = sorted(batch, key=lambda ticket: ticket.job.bounds_at is not None)
        images = batch[0].job.images if len(batch) == 1 else np.concatenate([ticket.job.images for ticket in batch])
        probabilities, codes, margins = self._passes(batch, images)
        labels = probabilities.argmax(axis=1)
        proven = self._certificates(batch, margins)
        decided = _decided(batch, proven)
        figures = self._typical_without_a_vote(batch, images, codes, decided)
        done = self._clock()

        seedless = [ticket.job for ticket in batch if ticket.job.plan is not None and ticket.job.plan.seed is None]
        fresh = iter(_fresh_seeds(sum(len(job.images) for job in seedless)))
        finished: list[tuple[Ticket, Result | None]] = []
        spared = 0
        for ticket, own in _with_rows(batch):
            rows, plan = slice(own.start, own.stop), ticket.job.plan
            if FirstSeen in ticket.followed:
                found = zip(probabilities[rows], codes[rows], strict=True)
                news += [(ticket, FirstSeen(image, *each)) for image, each in enumerate(found)]
            outcomes: dict[int, Outcome] = {}
            if plan is not None:
                seeds = [next(fresh) if plan.seed is None else plan.seed for _ in own]
                outcomes = {
                    row - own.start: self._outcome_of_proof(label, seed)
                    for row, label, seed in zip(own, labels[rows].tolist(), seeds, strict=True)
                    if row in decided
                }
                spared += len(outcomes) * plan.samples
                if len(outcomes) < len(own):
                    progress = Progress(
                        ticket,
                        probabilities[rows],
                        started,
                        done,
                        deadline=math.inf if ticket.job.deadline is None else ticket.job.deadline,
                        open=len(own) - len(outcomes),
                        certificates=proven.get(ticket),
                        outcomes=outcomes,
                        typicalities={row - own.start: figures[row] for row in own if row in figures},
                    )
                    self._open_elections(progress, plan, codes[rows], labels[rows].tolist(), seeds)
                    continue
            result = Result(
                probabilities[rows],
                tuple(outcomes.values()),
                Times(ticket.submitted, started, done, self._clock() if outcomes else done),
                tuple(figures[row] for row in own) if own.start in figures else None,
                certificates=proven.get(ticket),
            )
            finished.append((ticket, result))
        return finished, spared

    def _passes(self, batch: Sequence[Ticket], images: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Compute the first passes of a batch, whose last jobs are those that ask for bounds, in the same run.

        Return the probabilities and codes of all images, and the margins of the last ones.
        """
        eps: list[np.float32] = []
        for ticket in batch:
            if (at := ticket.job.bounds_at) is not None:
                eps += [rounded_up(at)] * len(ticket.job.images)
        plain = len(images) - len(eps)
        parts: list[FirstPass] = [self.sessions.first_pass(images[rows]) for rows in self._parts(0, plain)]
        bounded = [
            self.sessions.first_pass_with_bounds(
                images[rows], np.array(eps[rows.start - plain : rows.stop - plain], np.float32)
            )
            for rows in self._parts(plain, len(images))
        ]
        parts += bounded
        return (
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.codes for part in parts]),
            [margin for part in bounded for margin in part.margins.tolist()],
        )

    def _certificates(
        self, batch: Sequence[Ticket], margins: Iterable[float]
    ) -> dict[Ticket, tuple[Certificate | None, ...]]:
        """Return what is proven of the images of the jobs that ask. `margins`: as `_passes` returns them."""
        left = iter(margins)
        proven: dict[Ticket, tuple[Certificate | None, ...]] = {}
        searched: list[Ticket] = []
        for ticket in batch:
            if ticket.job.proven is not None:
                proven[ticket] = ticket.job.proven
            elif (at := ticket.job.bounds_at) is not None:
                proven[ticket] = tuple(certificate(at, margin) for margin in islice(left, len(ticket.job.images)))
            elif ticket.job.certify is not None:
                searched.append(ticket)
        if searched:
            images = np.concatenate([ticket.job.images for ticket in searched])
            found = chain.from_iterable(
                largest(lambda part, eps: self.sessions.first_pass_with_bounds(part, eps).margins, images[rows])
                for rows in self._parts(0, len(images))
            )
            proven |= {ticket: tuple(islice(found, len(ticket.job.images))) for ticket in searched}
        return proven

    def _parts(self, start: int, end: int) -> list[slice]:
        """Cut rows into parts that are run at once."""
        return [slice(at, min(at + self.round_rows, end)) for at in range(start, end, self.round_rows)]

    def _outcome_of_proof(self, label: int, seed: int) -> Outcome:
        return Outcome(label, 0, [0] * self.classes, "certificate", risk_reached=1.0, seed=seed)

    def _open_elections(
        self, progress: Progress, plan: VotePlan, codes: np.ndarray, expected: list[int], seeds: list[int]
    ) -> None:
        """Open an election for each image of a job that has no outcome yet."""
        rule = self._rule(samples=plan.samples, risk=plan.risk)
        for image, (seed, label) in enumerate(zip(seeds, expected, strict=True)):
            if image not in progress.outcomes:
                tally = [0] * self.classes
                code = codes[image : image + 1]
                self._open.append(Election(progress, image, rule, seed, code, label, tally, rule.first_ballot))
        self._called += progress.open * rule.first_ballot
        self._voting.add(progress)

    def _typical_without_a_vote(
        self, batch: Sequence[Ticket], images: np.ndarray, codes: np.ndarray, decided: set[int]
    ) -> dict[int, Typicality]:
        """The figures of those images of a batch, by row, whose votes will not give them: of the fast path, and decided
        by a certificate.
        """
        rows: list[int] = []
        for ticket, own in _with_rows(batch):
            if ticket.job.path in self._typical_on:
                rows += own if ticket.job.plan is None else [row for row in own if row in decided]
        if self._eps is None or not rows:
            return {}
        return dict(zip(rows, self._figures(images[rows], codes[rows], self._eps), strict=True))

    def _figures(self, images: np.ndarray, codes: np.ndarray, eps: float) -> list[Typicality]:
        """How typical images are, by a purified version of each, of latent 0."""
        found: list[Typicality] = []
        for start in range(0, len(images), self.round_rows):
            part = codes[start : start + self.round_rows]
            latents = np.zeros((len(part), self.latent), np.float32)
            purified = self.sessions.purify(part, np.arange(len(part)), latents)
            found += typicalities(images[start : start + self.round_rows], purified, eps=eps)
        return found

    def _call_round(self, now: float) -> tuple[list[Election], list[int]]:
        """Take the elections of the next round off the queue; return them with the votes that each casts.

        Each casts its ballot. If a deadline is near, each casts a part of it that leaves room for the others, and those
        that have a deadline and no vote yet go first, the earliest deadline before the others.
        """
        near = self._near(now)
        share = self.round_rows
        if near:
            self._open = deque(sorted(self._open, key=lambda e: math.inf if e.cast else e.progress.deadline))
            share = max(SMALLEST_BALLOT, self.round_rows // len(self._open))
        elections: list[Election] = []
        sizes: list[int] = []
        room = self.round_rows
        while self._open:
            size = self._open[0].ballot
            if near:
                size = min(size, share, room)
            if (size > room and elections) or not size:
                break
            elections.append(self._open.popleft())
            sizes.append(size)
            room -= size
        return elections, sizes

    def _near(self, now: float) -> bool:
        """Whether a deadline comes before every open election has had its ballot, or might."""
        deadlines = (progress.deadline for progress in self._voting)
        nearest = min((deadline for deadline in deadlines if deadline > now), default=math.inf)
        if nearest == math.inf:
            return False
        if not self._recent_rows:  # no pace is known yet
            return True
        return nearest - now < NEAR * self._called * self._recent_seconds / self._recent_rows

    def _vote(self, elections: Sequence[Election], sizes: Sequence[int]) -> list[_Left]:
        """Cast and count `sizes` votes of each election; return those that this ended."""
        code_index = np.repeat(np.arange(len(elections)), sizes)
        votes = self._cast(elections, sizes, code_index)
        by_class = np.bincount(code_index * self.classes + votes, minlength=len(elections) * self.classes)

        ended: list[_Left] = []
        for election, found, size in zip(elections, by_class.reshape(-1, self.classes).tolist(), sizes, strict=True):
            self._called -= election.ballot
            if rule := election.count(found, cast=size):
                election.end(rule)
                ended.append((election, "early_stop"))
            else:
                self._called += election.ballot
                self._open.append(election)
        return ended

    def _cast(self, elections: Sequence[Election], sizes: Sequence[int], code_index: np.ndarray) -> np.ndarray:
        """Cast `sizes` votes of each election, and note the figures of images that have no vote yet, if they are asked
        for. Return the class of each vote, in the order of `code_index`.
        """
        eps = self._eps if "robust" in self._typical_on else None
        new = [] if eps is None else [index for index, election in enumerate(elections) if not election.cast]
        latents = np.zeros((len(code_index) + len(new), self.latent), np.float32)  # 0 for the purified images
        parts: list[Part] = []
        start = 0
        for election, size in zip(elections, sizes, strict=True):
            if election.latents is None:
                election.latents = self._streams.begin(election.seed)
            parts.append((election.latents, latents[start : start + size]))
            start += size
        self._draw(parts)
        codes = np.concatenate([election.code for election in elections])
        if eps is None or not new:
            return self.sessions.vote(codes, code_index, latents)
        votes, purified = self.sessions.vote_and_purify(
            codes, np.concatenate([code_index, new]), latents, purified=len(new)
        )
        judged = [elections[index] for index in new]
        images = np.concatenate(
            [election.progress.ticket.job.images[election.image : election.image + 1] for election in judged]
        )
        for election, figures in zip(judged, typicalities(images, purified, eps=eps), strict=True):
            election.progress.typicalities[election.image] = figures
        return votes

    def _explain(self, election: Election) -> None:
        """Note what the votes of an election that has ended were cast on, if there was one."""
        if not election.cast:
            return
        votes = min(election.cast, AVERAGED)
        latents = np.zeros((votes + 1, self.latent), np.float32)  # 0 for the image that got no vote
        Stream(election.seed).draw(out=latents[:votes])
        rows = np.zeros(votes + 1, np.int64)
        cast = self.sessions.vote(election.code, rows[:votes], latents[:votes])
        purified = self.sessions.purify(election.code, rows, latents)
        image = election.progress.ticket.job.images[election.image]
        election.progress.explanations[election.image] = explanation(image, cast, purified)

    def _dismiss(self, now: float) -> list[_Left]:
        """Take the elections of cancelled jobs, and of those past their deadline, out of the whole queue."""
        reasons: dict[Progress, Spared] = {}
        for progress in self._voting:
            if progress.ticket.cancelled:
                reasons[progress] = "cancelled"
            elif now >= progress.deadline:
                reasons[progress] = "deadline"
        if not reasons:
            return []
        staying: deque[Election] = deque()
        left: list[_Left] = []
        for election in self._open:
            reason = reasons.get(election.progress)
            if reason is None:
                staying.append(election)
                continue
            self._called -= election.ballot
            if reason == "deadline":
                election.end("deadline")
            left.append((election, reason))
        self._open = staying
        return left

    def _close(self, left: Iterable[_Left]) -> list[Progress]:
        """Note that elections have left; return the jobs whose last one did, in order."""
        closed: list[Progress] = []
        for election, _ in left:
            if election.latents is not None:
                self._streams.end(election.latents)
            progress = election.progress
            progress.open -= 1
            if not progress.open:
                self._voting.remove(progress)
                closed.append(progress)
        return closed


def _with_rows(batch: Iterable[Ticket]) -> Iterator[tuple[Ticket, range]]:
    """Yield each job of a batch with the rows that its images have there."""
    end = 0
    for ticket in batch:
        yield ticket, range(end, end := end + len(ticket.job.images))


def _decided(batch: Sequence[Ticket], proven: Mapping[Ticket, Sequence[Certificate | None]]) -> set[int]:
    """Return the rows of a batch whose label a certificate decides."""
    found: set[int] = set()
    for ticket, own in _with_rows(batch):
        job = ticket.job
        # an explanation shows votes, so they are cast
        if job.certify is not None and job.certify.mode == "decide" and job.plan is not None and not job.explain:
            found.update(row for row, certificate in zip(own, proven[ticket], strict=True) if certificate is not None)
    return found


def _fresh_seeds(count: int) -> list[int]:
    """Return as many numbers in [0, MAX_SEED] that nobody can foresee, from the operating system."""
    drawn = np.frombuffer(secrets.token_bytes(8 * count), np.uint64)
    seeds: list[int] = (drawn & np.uint64(MAX_SEED)).tolist()
    return seeds
