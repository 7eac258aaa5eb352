"""The vote: when may the count of an election stop?

One image is one election. Each vote is the class of one purified image; the class with most of `samples` votes
wins; among equals, the lowest index. Two rules end the count before all votes are cast (docs/vote.md has the proofs):

* **exact** (curtailment): the leader is ahead of the runner-up by more votes than are left. The answer is always that
  of the full count.
* **risk-limited**: with s_A votes for the leader, s_j for every other class j of K, and B the beta function,

      B(b, b) / (2^(s_A + s_j) B(s_A + b, s_j + b)) <= risk * w_A

  where b = 1/5, and w_A is 9/10 for the class that the first pass expects and 1/10 divided by K - 1 for any other.
  Over the order of the votes, the probability that the count ever stops at a class that the full count would not
  elect is at most `risk`, however often the rule is checked. This is the prior-posterior-ratio test of a two-way
  election (Waudby-Smith & Ramdas, arXiv:2006.04347; PPR-1v1 of arXiv:2109.05047, where b = 1), applied to each pair.

The guarantee is about the count, not about adversarial robustness. Pure arithmetic: no arrays of votes, no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import exp, lgamma, log
from typing import Literal

from carso.choices import MAX_RISK, MIN_RISK

Rule = Literal["exact", "risk-limited"]

# The guarantee holds whatever these are. They are chosen for elections that are almost undisputed, because most are:
EXPECTED = 0.9  # the part of the risk that is spent on the class that the first pass expects
BETA = 0.2  # b of the prior Beta(b, b): 1 is the uniform prior; a smaller b bets more on a large share

# Votes asked for at once while an election stays open: at least SMALLEST (a round has a fixed cost), at most LARGEST
# (so that one election does not fill a round). benchmarks/votes.py measures what they cost in votes and rounds.
SMALLEST_BALLOT = 4
LARGEST_BALLOT = 512


class _Leads:
    """A table: entry s is the fewest votes of a leader that end the count against a runner-up with s votes.

    `risk` is the part of the risk that this leader has. The table grows only as far as elections ask for it, so a
    risk that a caller chooses costs no more than that caller's votes. Among the other classes, only the runner-up
    matters, because the left side of the rule grows with s_j.
    """

    def __init__(self, risk: float) -> None:
        self._limit = log(risk)
        self._entries: list[int] = []

    def __getitem__(self, runner_up: int) -> int:
        entries = self._entries
        while len(entries) <= runner_up:
            other = len(entries)
            leader = max(entries[-1] if entries else 1, other + 1)  # never fewer than against a weaker runner-up
            while _log_ratio(leader, other) > self._limit:
                leader += 1
            entries.append(leader)
        return entries[runner_up]


@lru_cache(maxsize=128)  # two for each risk; bounded, because callers choose the risk and a table holds up to 0.2 MB
def _leads(risk: float) -> _Leads:
    return _Leads(risk)


@lru_cache(maxsize=4096)  # most elections end with one of a few tallies
def _log_ratio(leader: int, other: int) -> float:
    return _log_beta(BETA, BETA) - _log_beta(leader + BETA, other + BETA) - (leader + other) * log(2)


def _log_beta(x: float, y: float) -> float:
    return lgamma(x) + lgamma(y) - lgamma(x + y)


@dataclass(frozen=True)
class StoppingRule:
    """Both rules for one election. `risk` = 0 leaves only the exact one.

    The methods are told about a count: the votes of the `leader` and the `runner_up`, its two largest entries; the
    votes `cast` so far; and whether the leader, or one of several, is the class `expected` before the count, here the
    one that the first pass gives. The guarantee holds whichever class was expected, as long as no vote had a part in
    that.

    Raises ValueError for samples below 1, classes below 2, or a risk that is neither 0 nor in [1e-12, 0.5].
    """

    samples: int
    classes: int
    risk: float
    _leads: tuple[_Leads, _Leads] | None = field(init=False, repr=False, compare=False)  # unexpected, expected leader

    def __post_init__(self) -> None:
        if self.samples < 1 or self.classes < 2:
            raise ValueError(f"no election with {self.samples} votes and {self.classes} classes")
        if self.risk and not MIN_RISK <= self.risk <= MAX_RISK:
            raise ValueError(f"risk {self.risk} is neither 0 nor in [{MIN_RISK}, {MAX_RISK}]")
        leads = (_leads(self.risk * self._part(False)), _leads(self.risk * self._part(True))) if self.risk else None
        object.__setattr__(self, "_leads", leads)

    @cached_property
    def first_ballot(self) -> int:
        """How many votes to cast first."""
        return self.next_ballot(leader=0, runner_up=0, cast=0, expected=True)

    def ended_by(self, *, leader: int, runner_up: int, cast: int, expected: bool) -> Rule | None:
        """Return the rule that ends the count, or None if the count goes on."""
        if cast == self.samples or leader - runner_up > self.samples - cast:
            return "exact"
        if self._leads is not None and leader >= self._leads[expected][runner_up]:
            return "risk-limited"
        return None

    def risk_reached(self, *, leader: int, runner_up: int, cast: int, expected: bool) -> float:
        """Return the bound that a count gives on the chance that the full count would elect another class: in [0, 1].

        It is the smallest risk at which the rule would end this count, and 0 where the exact rule does. It does not
        depend on the risk asked for, and holds whenever the count is looked at: for every r, the probability that the
        count ever shows a risk reached of at most r and a class that the full count would not elect is at most r.
        """
        if cast == self.samples or leader - runner_up > self.samples - cast:
            return 0.0
        return min(1.0, exp(_log_ratio(leader, runner_up)) / self._part(expected))

    def _part(self, expected: bool) -> float:
        """The part of the risk that a leader has."""
        return EXPECTED if expected else (1 - EXPECTED) / (self.classes - 1)

    def needed(self, *, leader: int, runner_up: int, cast: int, expected: bool) -> int:
        """Return the fewest further votes that end an open count if all of them go to the leader."""
        left = self.samples - cast
        by_exact = (left - (leader - runner_up)) // 2 + 1
        if self._leads is not None:
            return min(by_exact, self._leads[expected][runner_up] - leader, left)
        return min(by_exact, left)

    def next_ballot(self, *, leader: int, runner_up: int, cast: int, expected: bool) -> int:
        """Return how many votes to cast next in an open count.

        That is the number needed. An election that has stayed open casts up to twice as many, or half of those cast
        so far, so that a contested one does not take a round for every few votes. The size is a function of the tally
        alone. So the points at which the rules are checked, and with them the answer to a seed, are the same however
        elections are batched together, and in however many parts a ballot is cast.
        """
        needed = self.needed(leader=leader, runner_up=runner_up, cast=cast, expected=expected)
        size = max(needed, SMALLEST_BALLOT, min(cast // 2, 2 * needed))
        return min(size, LARGEST_BALLOT, self.samples - cast)
