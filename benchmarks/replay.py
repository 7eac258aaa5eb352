"""Elections whose votes are all known, counted again under any stopping rule.

An image's seed fixes its votes one by one, and a count that stops early has cast the first of them. So the full count
is cast once, and every rule is replayed on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from carso.inference.sessions import Sessions
from carso.inference.vote import Rule, StoppingRule


class Count(NamedTuple):
    label: int  # the lowest of the leaders
    votes: int
    rounds: int
    rule: Rule


def cast_all(sessions: Sessions, codes: np.ndarray, *, seeds: Sequence[int], samples: int, latent: int) -> np.ndarray:
    """All votes of the elections of `codes` [N, code], as the pipeline draws them: [N, samples] uint8."""
    votes = np.empty((len(codes), samples), np.uint8)
    same_code = np.zeros(samples, np.int64)
    for image, seed in enumerate(seeds):
        draws = np.random.Generator(np.random.Philox(key=seed))
        latents = draws.standard_normal((samples, latent), dtype=np.float32)
        votes[image] = sessions.vote(codes[image : image + 1], same_code, latents)
    return votes


def by_ballot(rule: StoppingRule, *, leader: int, runner_up: int, cast: int, expected: bool) -> int:
    """The rule is checked after each ballot, as the engine does."""
    return rule.next_ballot(leader=leader, runner_up=runner_up, cast=cast, expected=expected)


def one_by_one(rule: StoppingRule, *, leader: int, runner_up: int, cast: int, expected: bool) -> int:
    """The rule is checked after each vote: the fewest votes that it allows."""
    return 1


def replay(votes: Sequence[int], rule: StoppingRule, ballot: Callable[..., int] = by_ballot, *, expected: int) -> Count:
    """Count `votes`, of which there are `rule.samples`, until the rule ends the count; class `expected` is expected."""
    tally = [0] * rule.classes
    leader = runner_up = cast = rounds = 0
    while True:
        by_expected = tally[expected] == leader
        size = ballot(rule, leader=leader, runner_up=runner_up, cast=cast, expected=by_expected)
        for vote in votes[cast : cast + size]:
            tally[vote] += 1
        cast += size
        rounds += 1
        *_, runner_up, leader = sorted(tally)
        by_expected = tally[expected] == leader
        if ended := rule.ended_by(leader=leader, runner_up=runner_up, cast=cast, expected=by_expected):
            return Count(tally.index(leader), cast, rounds, ended)
