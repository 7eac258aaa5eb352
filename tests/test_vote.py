"""The stopping rules against brute force, exact arithmetic, dynamic programming and simulation.

An election is its list of totals. The full count elects the class with most votes, the lowest index among equals, so
that a stop at another of the tied classes counts as wrong. Which class was expected is the election's worst luck where
it is another than the elected one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from math import comb, exp, lgamma, log, log1p, prod

import numpy as np
import pytest
from carso.inference.vote import BETA, EXPECTED, LARGEST_BALLOT, MAX_RISK, MIN_RISK, SMALLEST_BALLOT, StoppingRule
from hypothesis import assume, given, settings
from hypothesis import strategies as st


def elected(totals: list[int] | tuple[int, ...]) -> int:
    return totals.index(max(totals))


def standing(tally: list[int] | tuple[int, ...], *, expected: int = 0) -> dict[str, int]:
    *_, runner_up, leader = sorted(tally)
    return {"leader": leader, "runner_up": runner_up, "cast": sum(tally), "expected": tally[expected] == leader}


def first_stop(rule: StoppingRule, votes: list[int], *, by_ballots: bool) -> tuple[list[int], str]:
    """Count `votes` in order until the rule ends the count: the tally then, and which rule ended it."""
    tally = [0] * rule.classes
    check = 0
    for cast, vote in enumerate(votes):
        if by_ballots and cast == check:
            check += rule.next_ballot(**standing(tally))
        tally[vote] += 1
        if not by_ballots or cast + 1 == check:
            ended = rule.ended_by(**standing(tally))
            if ended:
                return tally, ended
    raise AssertionError("the rule let the count go on past its last vote")


# --- the exact rule ---------------------------------------------------------------------------------------------------


@given(
    votes=st.integers(2, 6).flatmap(lambda k: st.lists(st.integers(0, k - 1), min_size=1, max_size=120)),
    by_ballots=st.booleans(),
)
def test_the_exact_rule_elects_what_the_full_count_elects(votes, by_ballots):
    rule = StoppingRule(samples=len(votes), classes=6, risk=0)
    tally, ended = first_stop(rule, votes, by_ballots=by_ballots)
    assert ended == "exact"
    assert elected(tally) == elected([votes.count(label) for label in range(6)])


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (2, 2), (9, 2), (7, 3), (5, 4)])
def test_the_exact_rule_is_right_and_no_later_than_it_must_be_for_every_order_of_small_elections(samples, classes):
    """No later: as long as the count is open, some continuation brings another class level with the leader."""
    rule = StoppingRule(samples, classes, risk=0)
    for votes in product(range(classes), repeat=samples):
        full = elected([votes.count(label) for label in range(classes)])
        for cast in range(1, samples + 1):
            tally = [votes[:cast].count(label) for label in range(classes)]
            *_, runner_up, leader = sorted(tally)
            sure = leader > runner_up + samples - cast
            assert bool(rule.ended_by(**standing(tally))) == (sure or cast == samples)
            if sure:
                assert elected(tally) == full


# --- the risk-limited rule: the formula -------------------------------------------------------------------------------


@cache
def rising(start: Fraction, steps: int) -> Fraction:
    """start (start + 1) ... (start + steps - 1) = Gamma(start + steps) / Gamma(start)."""
    return prod((start + step for step in range(steps)), start=Fraction(1))


def satisfies_the_formula(leader: int, other: int, *, classes: int, risk: float, expected: bool) -> bool:
    """B(b, b) / (2^(s_A + s_j) B(s_A + b, s_j + b)) <= risk * w_A, in rational numbers."""
    b = Fraction(str(BETA))
    weight = Fraction(str(EXPECTED)) if expected else (1 - Fraction(str(EXPECTED))) / (classes - 1)
    cast = leader + other
    ratio = rising(2 * b, cast) / (2**cast * rising(b, leader) * rising(b, other))
    return ratio <= Fraction(risk) * weight


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("risk", [0.5, 0.05, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("expected", [True, False], ids=["expected", "unexpected"])
def test_the_rule_ends_the_count_exactly_where_the_formula_says(classes, risk, expected):
    samples = 300
    rule = StoppingRule(samples, classes, risk)
    leader = 1
    for runner_up in range(0, samples // 2, 3):
        leader = max(leader, runner_up + 1)  # an election that is not led has no winner yet
        while leader + runner_up < samples and not satisfies_the_formula(
            leader, runner_up, classes=classes, risk=risk, expected=expected
        ):
            leader += 1
        for near in range(max(leader - 2, runner_up), min(leader + 3, samples - runner_up)):
            by_curtailment = near > samples - near
            ended = "exact" if by_curtailment else "risk-limited" if near >= leader else None
            count = {"leader": near, "runner_up": runner_up, "cast": near + runner_up}
            assert rule.ended_by(**count, expected=expected) == ended


@given(
    totals=st.lists(st.integers(0, 60), min_size=2, max_size=10).filter(any),
    risk=st.sampled_from([0.5, 0.05, 1e-3]),
)
def test_checking_the_runner_up_checks_every_other_class(totals, risk):
    rule = StoppingRule(samples=10_000, classes=len(totals), risk=risk)
    count = standing(totals)
    leader, *others = sorted(totals, reverse=True)
    by_formula = all(
        satisfies_the_formula(leader, other, classes=len(totals), risk=risk, expected=bool(count["expected"]))
        for other in others
    )
    assert (rule.ended_by(**count) == "risk-limited") == (by_formula and leader > others[0])


# --- the risk-limited rule: the probability of a wrong stop, exactly --------------------------------------------------


def wrong_stop_probability(rule: StoppingRule, totals: tuple[int, ...], *, by_ballots: bool, expected: int) -> float:
    """Over all orders of the votes; by dynamic programming over the tallies at which the rule is checked."""
    reached = [defaultdict(float) for _ in range(rule.samples + 1)]
    reached[0][(0,) * len(totals)] = 1.0
    wrong = 0.0
    for cast, tallies in enumerate(reached):
        for tally, probability in tallies.items():
            if cast and rule.ended_by(**standing(tally, expected=expected)):
                wrong += probability * (elected(tally) != elected(totals))
                continue
            size = rule.next_ballot(**standing(tally, expected=expected)) if by_ballots else 1
            left = [total - count for total, count in zip(totals, tally, strict=True)]
            for drawn in compositions(size, left):
                ways = prod(map(comb, left, drawn))
                after = tuple(count + new for count, new in zip(tally, drawn, strict=True))
                reached[cast + size][after] += probability * ways / comb(rule.samples - cast, size)
    return wrong


def compositions(size: int, left: list[int]) -> Iterator[tuple[int, ...]]:
    """Every way to draw `size` votes of those `left`."""
    first, *rest = left
    if not rest:
        if size <= first:
            yield (size,)
        return
    for drawn in range(min(size, first) + 1):
        for others in compositions(size - drawn, rest):
            yield (drawn, *others)


SMALL_ELECTIONS = [
    *((total, 60 - total) for total in (15, 25, 28, 29, 30, 31, 32)),
    *((total, 41 - total) for total in (19, 20, 21, 22)),
    (12, 12, 12),
    (11, 12, 13),
    (18, 18, 0),
    (17, 18, 1),
    (14, 15, 7),
    (1, 17, 18),
]


@pytest.mark.parametrize("by_ballots", [False, True], ids=["after-every-vote", "by-ballots"])
@pytest.mark.parametrize("totals", SMALL_ELECTIONS, ids=str)
def test_no_order_weighs_more_than_the_risk_in_small_elections(totals, by_ballots):
    for risk in (0.5, 0.2, 0.05, 1e-2):
        rule = StoppingRule(sum(totals), len(totals), risk)
        for expected in range(len(totals)):
            assert wrong_stop_probability(rule, totals, by_ballots=by_ballots, expected=expected) <= risk


def test_wrong_stops_do_happen_in_small_elections_so_the_bound_is_a_statement():
    rule = StoppingRule(60, 2, risk=0.2)
    assert wrong_stop_probability(rule, (30, 30), by_ballots=False, expected=1) > 0.05
    assert wrong_stop_probability(rule, (30, 30), by_ballots=True, expected=1) > 0.05


# --- the risk-limited rule: the probability of a wrong stop, by simulation at full size -------------------------------

SAMPLES = 1500

WORST_ELECTIONS = {
    "a tie of two": (750, 750),
    "a margin of one vote of two": (749, 751),
    "a tie of two among ten classes": (750, 750, *8 * [0]),
    "a margin of one vote among ten classes": (700, 701, 99, *7 * [0]),
    "a tie of ten": (*10 * [150],),
    "one vote ahead of nine equals": (149, 151, *8 * [150]),
    "two level leaders above many small classes": (350, 350, *8 * [100]),
    "a leader by a hair above many small classes": (300, 303, *7 * [112], 113),
}


@dataclass(frozen=True)
class Orders:
    """Random orders of one election's votes: the counts after each vote, [trials, samples] int16."""

    totals: tuple[int, ...]
    leader: np.ndarray
    runner_up: np.ndarray
    winner: np.ndarray  # the count of the class that the full count elects
    rival: np.ndarray  # and of the strongest other one, the lowest index among equals


def random_orders(totals: tuple[int, ...], *, trials: int, seed: int = 0) -> Orders:
    rng = np.random.default_rng(seed)
    votes = np.repeat(np.arange(len(totals), dtype=np.int8), totals)
    votes = rng.permuted(np.tile(votes, (trials, 1)), axis=1)
    leader, runner_up, winner, rival = (np.zeros(votes.shape, np.int16) for _ in range(4))
    strongest = max((label for label in range(len(totals)) if label != elected(totals)), key=totals.__getitem__)
    for label in np.flatnonzero(totals):
        count = np.cumsum(votes == label, axis=1, dtype=np.int16)
        np.maximum(runner_up, np.minimum(leader, count), out=runner_up)
        np.maximum(leader, count, out=leader)
        if label == elected(totals):
            winner = count
        if label == strongest:
            rival = count
    return Orders(totals, leader, runner_up, winner, rival)


def stops(
    rule: StoppingRule, orders: Orders, *, by_ballots: bool, winner_expected: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Votes cast in each trial when the rule ended its count, and whether another class than the winner led then.

    Expected is the winner, or its strongest rival.
    """
    trials = np.arange(len(orders.leader))
    votes = np.full(len(trials), rule.samples)
    expected = (orders.winner if winner_expected else orders.rival) == orders.leader
    if by_ballots:
        shape = 3 * (rule.samples + 1,) + (2,)
        first = rule.next_ballot(leader=0, runner_up=0, cast=0, expected=True)
        going, cast = trials, np.full(len(trials), first)
        while len(going):
            here = going, cast - 1
            at = orders.leader[here], orders.runner_up[here], cast, expected[here]
            counts, which = np.unique(np.ravel_multi_index(at, shape), return_inverse=True)
            counts = np.transpose(np.unravel_index(counts, shape)).tolist()
            further = np.array([ballot_or_zero(rule, *count) for count in counts])[which]
            votes[going] = cast
            going, cast = going[further > 0], (cast + further)[further > 0]
    else:
        ends = orders.leader >= np.where(
            expected, leads(rule, expected=True)[orders.runner_up], leads(rule, expected=False)[orders.runner_up]
        )
        votes = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, rule.samples)
    wrong = (votes < rule.samples) & (orders.winner[trials, votes - 1] < orders.leader[trials, votes - 1])
    return votes, wrong


def leads(rule: StoppingRule, *, expected: bool) -> np.ndarray:
    """The fewest votes of a leader that end the count, by those of the runner-up."""
    found = np.full(rule.samples + 1, rule.samples + 1, np.int16)
    for runner_up in range(rule.samples // 2):
        for leader in range(max(runner_up, found[runner_up - 1] if runner_up else 0), rule.samples - runner_up):
            if rule.ended_by(leader=leader, runner_up=runner_up, cast=leader + runner_up, expected=expected):
                found[runner_up] = leader
                break
    return found


def ballot_or_zero(rule: StoppingRule, leader: int, runner_up: int, cast: int, expected: int) -> int:
    count = {"leader": leader, "runner_up": runner_up, "cast": cast, "expected": bool(expected)}
    return 0 if rule.ended_by(**count) else rule.next_ballot(**count)


def chance_of_at_most(count: int, *, trials: int, probability: float) -> float:
    """Of a binomial count."""
    log_odds = [
        lgamma(trials + 1)
        - lgamma(k + 1)
        - lgamma(trials - k + 1)
        + k * log(probability)
        + (trials - k) * log1p(-probability)
        for k in range(count + 1)
    ]
    return sum(map(exp, log_odds))


@pytest.fixture(scope="module", params=WORST_ELECTIONS)
def worst_orders(request):
    totals = WORST_ELECTIONS[request.param]
    no_slack = sum(sorted(totals)[-2:]) == SAMPLES  # for other pairs of classes
    return random_orders(totals, trials=50_000 if no_slack else 20_000)


@pytest.mark.slow  # some 250 000 elections of 1500 votes each
@pytest.mark.parametrize("risk", [0.05, 1e-2, 1e-3])
@pytest.mark.parametrize("by_ballots", [False, True], ids=["after-every-vote", "by-ballots"])
def test_the_share_of_wrong_stops_is_at_most_the_risk_in_the_worst_elections(worst_orders, by_ballots, risk):
    """So few wrong stops in 20 000 counts or more that a rule which errs as often as `risk` shows them once in 1000."""
    rule = StoppingRule(SAMPLES, len(worst_orders.totals), risk)
    _, wrong = stops(rule, worst_orders, by_ballots=by_ballots)
    assert chance_of_at_most(int(wrong.sum()), trials=len(wrong), probability=risk) < 1e-3
    _, fewer = stops(rule, worst_orders, by_ballots=by_ballots, winner_expected=True)
    assert fewer.sum() <= wrong.sum()


@pytest.mark.parametrize("by_ballots", [False, True], ids=["after-every-vote", "by-ballots"])
def test_the_simulation_shows_the_wrong_stops_of_a_rule_that_may_err_more_often(by_ballots):
    orders = random_orders((750, 750), trials=1000)
    _, wrong = stops(StoppingRule(SAMPLES, 2, risk=0.5), orders, by_ballots=by_ballots)
    assert chance_of_at_most(int(wrong.sum()), trials=1000, probability=0.05) > 0.999


@pytest.mark.parametrize(
    ("leader", "expected", "votes"),
    [(1500, True, 12), (1350, True, 24), (900, True, 500), (1500, False, 19), (1350, False, 37), (900, False, 720)],
)
def test_the_mean_count_at_risk_one_in_a_thousand_is_as_documented(leader, expected, votes):
    """All votes that do not go to the leader go to one other of ten classes: the hardest case of that share."""
    orders = random_orders((leader, SAMPLES - leader, *8 * [0]), trials=1000)
    cast, _ = stops(StoppingRule(SAMPLES, 10, risk=1e-3), orders, by_ballots=False, winner_expected=expected)
    assert cast.mean() == pytest.approx(votes, rel=0.1)


# --- how many votes to draw next --------------------------------------------------------------------------------------


@st.composite
def open_counts(draw) -> tuple[StoppingRule, dict[str, int]]:
    samples = draw(st.integers(1, 2000))
    classes = draw(st.integers(2, 12))
    rule = StoppingRule(samples, classes, risk=draw(st.sampled_from([0, 0.5, 1e-2, 1e-3, 1e-9])))
    leader = draw(st.integers(0, samples))
    runner_up = draw(st.integers(0, min(leader, samples - leader)))
    cast = draw(st.integers(leader + runner_up, min(samples, leader + (classes - 1) * runner_up)))
    count = {"leader": leader, "runner_up": runner_up, "cast": cast, "expected": draw(st.booleans())}
    assume(cast == 0 or rule.ended_by(**count) is None)
    return rule, count


@given(open_counts())
def test_as_many_further_votes_of_the_leader_as_are_needed_end_the_count_and_no_fewer(case):
    rule, count = case
    needed = rule.needed(**count)
    for further in range(1, needed + 1):
        after = count | {"leader": count["leader"] + further, "cast": count["cast"] + further}
        assert bool(rule.ended_by(**after)) == (further == needed)


@given(tally=st.lists(st.integers(0, 4), min_size=3, max_size=3), risk=st.sampled_from([0, 0.5, 0.3]))
@settings(max_examples=60)
def test_votes_for_other_classes_than_an_expected_leader_end_no_count_sooner(tally, risk):
    rule = StoppingRule(samples=20, classes=3, risk=risk)
    expected = elected(tally)
    count = standing(tally, expected=expected)
    assume(any(tally) and rule.ended_by(**count) is None)
    for further in range(1, min(rule.needed(**count), 7)):
        for drawn in compositions(further, [further] * 3):
            after = [votes + new for votes, new in zip(tally, drawn, strict=True)]
            assert rule.ended_by(**standing(after, expected=expected)) is None


@given(open_counts())
def test_a_ballot_is_at_least_one_vote_and_at_most_those_left(case):
    rule, count = case
    left = rule.samples - count["cast"]
    size = rule.next_ballot(**count)
    assert 1 <= size <= min(left, LARGEST_BALLOT)
    assert size >= min(left, SMALLEST_BALLOT)


@pytest.mark.parametrize("risk", [0, 1e-3])
def test_the_last_vote_ends_every_count_exactly(risk):
    rule = StoppingRule(samples=1500, classes=10, risk=risk)
    for expected in (True, False):
        assert rule.ended_by(leader=150, runner_up=150, cast=1500, expected=expected) == "exact"
        assert rule.ended_by(leader=150, runner_up=150, cast=1499, expected=expected) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"samples": 0},
        {"samples": -1},
        {"classes": 1},
        {"risk": -1e-3},
        {"risk": MIN_RISK / 2},
        {"risk": MAX_RISK * 1.01},
        {"risk": float("nan")},
        {"risk": float("inf")},
    ],
    ids=str,
)
def test_an_impossible_election_is_refused(arguments):
    with pytest.raises(ValueError, match=r"votes|risk"):
        StoppingRule(**{"samples": 1500, "classes": 10, "risk": 1e-3} | arguments)


# --- the risk reached -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize(("leader", "runner_up"), [(4, 0), (13, 0), (30, 5), (200, 120)])
def test_the_risk_reached_is_the_smallest_risk_at_which_the_rule_would_end_the_count(leader, runner_up, expected):
    count = {"leader": leader, "runner_up": runner_up, "cast": leader + runner_up, "expected": expected}
    reached = StoppingRule(1500, 10, 0).risk_reached(**count)
    assert 0 < reached <= 1
    if reached <= 0.4:
        assert StoppingRule(1500, 10, reached * 1.001).ended_by(**count) == "risk-limited"
        assert StoppingRule(1500, 10, reached * 0.999).ended_by(**count) is None
    assert StoppingRule(1500, 10, 1e-3).risk_reached(**count) == reached  # whatever was asked for


def test_the_risk_reached_is_0_where_the_outcome_is_certain_and_1_where_the_votes_say_nothing():
    rule = StoppingRule(100, 10, 1e-3)
    assert rule.risk_reached(leader=51, runner_up=0, cast=51, expected=False) == 0
    assert rule.risk_reached(leader=40, runner_up=40, cast=100, expected=False) == 0
    assert rule.risk_reached(leader=0, runner_up=0, cast=0, expected=True) == 1
    assert rule.risk_reached(leader=7, runner_up=7, cast=14, expected=True) == 1


def test_more_votes_for_the_leader_never_raise_the_risk_reached():
    rule = StoppingRule(1500, 10, 0)
    bounds = [rule.risk_reached(leader=n, runner_up=3, cast=n + 3, expected=True) for n in range(3, 700)]
    assert bounds == sorted(bounds, reverse=True)
