"""Counts that an earlier and simpler pipeline made, one Python object per election: this one has to make the same.

The votes here come from additions and comparisons of float32, which are the same on every machine, so that a count is
a function of its image, plan and seed. What is recorded of each scenario is a hash of all that its steps told: votes
cast, who finished in which order, and every outcome. `python -m tests.test_recorded_counts` writes the hashes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from carso.inference.jobs import Job, Result, Step, Ticket, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import FirstPass

CLASSES, LATENT, SIDE = 10, 12, 4
COST = 1e-3  # seconds of a vote, on the scenario's clock


class Exact:
    """Votes without a network: the class of the largest sum of a code and a latent. Each takes COST on its clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def first_pass(self, images: np.ndarray) -> FirstPass:
        codes = images.reshape(len(images), -1)[:, :CLASSES]
        flipped = np.where(images.reshape(len(images), -1)[:, -1:] > 0.8, codes[:, ::-1], codes)  # it errs at times
        return FirstPass(probabilities=flipped, codes=codes)

    def vote(self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        self.now += COST * len(latents)
        return (codes[code_index] * np.float32(4) + latents[:, :CLASSES]).argmax(axis=1)

    def purify(self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        return np.resize(codes[code_index] + latents[:, :CLASSES], (len(latents), 1, SIDE, SIDE))

    def vote_and_purify(
        self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray, *, purified: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = len(latents) - purified
        votes = self.vote(codes, code_index[:rows], latents[:rows])
        return votes, self.purify(codes, code_index[rows:], latents[rows:])


def images(count: int, *, seed: int) -> np.ndarray:
    """Of undisputed ones and ones that divide the votes, about as many."""
    drawn = np.random.Generator(np.random.Philox(key=seed)).random((count, 1, SIDE, SIDE), dtype=np.float32)
    drawn[::2, 0, 0, 1] += np.float32(1.5)
    return drawn


def told(step: Step, names: dict[Ticket, int]) -> object:
    return [
        step.first_passes,
        step.rows,
        step.elections,
        sorted(step.settled.items()),
        sorted(step.spared.items()),
        [[names[ticket], result and outcomes(result)] for ticket, result in step.finished],
    ]


def outcomes(result: Result) -> object:
    return [
        [[o.label, o.votes, list(o.tally), o.ending, f"{o.risk_reached:.9g}", o.seed] for o in result.outcomes],
        [[f"{t.excess:.6f}", f"{t.contrast:.6f}"] for t in result.typicalities or ()],
    ]


def pipeline_of(sessions: Exact, *, round_rows: int, eps: float | None = None) -> Pipeline:
    return Pipeline(sessions, latent=LATENT, classes=CLASSES, round_rows=round_rows, eps=eps, clock=sessions.clock)


def steps(pipeline: Pipeline) -> Iterator[Step]:
    while pipeline.busy:
        yield pipeline.first_passes()
        yield pipeline.round()


def every_plan(round_rows: int) -> Iterator[object]:
    """30 plans, each for 12 images of its own, all in flight together."""
    pipeline = pipeline_of(Exact(), round_rows=round_rows, eps=0.2)
    tickets = [
        Ticket(Job(images(12, seed=samples), VotePlan(samples=samples, risk=risk, seed=1000 * samples + place)))
        for samples in (1, 2, 17, 100, 1500, 4000)
        for place, risk in enumerate((0, 0.5, 1e-2, 1e-3, 1e-9))
    ]
    names = {ticket: number for number, ticket in enumerate(tickets)}
    pipeline.admit(tickets)
    for step in steps(pipeline):
        yield told(step, names)


def one_plan(risk: float) -> Iterator[object]:
    """1500 images with the same plan, as a client sends them."""
    pipeline = pipeline_of(Exact(), round_rows=2048)
    tickets = [Ticket(Job(images(50, seed=seed), VotePlan(samples=1500, risk=risk, seed=seed))) for seed in range(30)]
    names = {ticket: number for number, ticket in enumerate(tickets)}
    pipeline.admit(tickets)
    for step in steps(pipeline):
        yield told(step, names)


def mixed_load(seed: int) -> Iterator[object]:
    """Jobs of every kind that come over time, many with a deadline that is near, some of them cancelled."""
    draws = np.random.Generator(np.random.Philox(key=seed))
    sessions = Exact()
    pipeline = pipeline_of(sessions, round_rows=(16, 64, 300)[seed % 3], eps=0.2 if seed % 2 else None)
    names: dict[Ticket, int] = {}
    for turn in range(60):
        if turn < 40:
            for _ in range(draws.integers(0, 4)):
                deadline = sessions.now + draws.choice([0.01, 0.1, 0.5, 5.0]) if draws.random() < 0.6 else None
                samples, risk = int(draws.choice([3, 60, 1500])), float(draws.choice([0, 1e-2, 1e-3]))
                plan = VotePlan(samples=samples, risk=risk, seed=int(draws.integers(2**53)))
                robust = draws.random() < 0.8
                job = Job(
                    images(int(draws.integers(1, 6)), seed=int(draws.integers(2**40))),
                    plan if robust else None,
                    deadline=deadline if robust else None,
                )
                ticket = Ticket(job, submitted=sessions.now)
                names[ticket] = len(names)
                pipeline.admit([ticket])
        for ticket in names:
            ticket.cancelled |= draws.random() < 0.01
        yield told(pipeline.first_passes(), names)
        yield told(pipeline.round(), names)
    for step in steps(pipeline):
        yield told(step, names)


SCENARIOS: dict[str, Callable[[], Iterator[object]]] = {
    **{f"every plan, rounds of {rows}": lambda rows=rows: every_plan(rows) for rows in (16, 64, 512, 8192)},
    **{f"one plan, risk {risk:g}": lambda risk=risk: one_plan(risk) for risk in (0, 1e-2, 1e-3, 1e-6)},
    **{f"mixed load {seed}": lambda seed=seed: mixed_load(seed) for seed in range(12)},
}


def digest(scenario: Callable[[], Iterator[object]]) -> str:
    hashed = hashlib.sha256()
    for line in scenario():
        hashed.update(json.dumps(line).encode())
    return hashed.hexdigest()[:16]


RECORDED = {
    "every plan, rounds of 16": "efc20b3b62f6bdf0",
    "every plan, rounds of 64": "f210888fa1a1d347",
    "every plan, rounds of 512": "49806578029d5bb3",
    "every plan, rounds of 8192": "75fdadf25575924d",
    "one plan, risk 0": "9f8429ddd226636f",
    "one plan, risk 0.01": "414848da632be163",
    "one plan, risk 0.001": "a6ee9be194dcfa8d",
    "one plan, risk 1e-06": "6e2a223a0dd5d0d3",
    "mixed load 0": "27c15027986b5771",
    "mixed load 1": "e7a103432bcc4766",
    "mixed load 2": "be5fa0693704aed0",
    "mixed load 3": "30f45e9d6c4a13ad",
    "mixed load 4": "621dbc538692ca33",
    "mixed load 5": "8a157e21f5b720c6",
    "mixed load 6": "f58e7c2dc2028c52",
    "mixed load 7": "755609fe9b8ea131",
    "mixed load 8": "693db4c8425b6193",
    "mixed load 9": "e2dcf82572bccc90",
    "mixed load 10": "1ca4efbc92961d9a",
    "mixed load 11": "f6723e8ea55ef657",
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_count_is_as_it_was_recorded(name):
    assert digest(SCENARIOS[name]) == RECORDED[name]


if __name__ == "__main__":
    for scenario, make in SCENARIOS.items():
        sys.stdout.write(f'    "{scenario}": "{digest(make)}",\n')
