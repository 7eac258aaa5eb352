"""Which frames of a stream are chosen: against a scripted clock, and with real draws."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from math import log, sqrt

import pytest
from carso.inference.thinning import FIRST_GUESS, RESERVED, SAVED_UP, Budget, Choice, Policy, Thinning, drawn
from hypothesis import given
from hypothesis import strategies as st

CERTAIN = {"margin": 1.0, "typical": True}


class Clock:
    """Tells the time that the test sets, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def policy(**given: object) -> Policy:
    rate = given.pop("rate", 0.0)
    return Policy(rate=rate, max_rate=given.pop("max_rate", rate), **given)


def thinning(draws: list[float] | None = None, clock: Callable[[], float] | None = None, **given: object) -> Thinning:
    """With draws that come round again; None: those of the operating system."""
    script = cycle(draws or ())
    return Thinning(policy(**given), clock=clock or Clock(), draw=(lambda: next(script)) if draws else drawn)


def test_draws_fill_the_interval_evenly_and_never_reach_one():
    draws = [drawn() for _ in range(20_000)]
    assert all(0 <= draw < 1 for draw in draws)
    for low in (0.0, 0.25, 0.5, 0.75):
        share = sum(low <= draw < low + 0.25 for draw in draws) / len(draws)
        assert abs(share - 0.25) < sqrt(log(2e12) / (2 * len(draws)))  # Hoeffding: false once in 10^12 runs


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_rate_is_kept_whatever_the_frames_show_and_whatever_the_load_is(rate):
    kinds = [(0.0, False, 1.0), (1.0, True, 0.0), (0.5, None, 0.7)]
    for margin, typical, load in kinds:
        frames = thinning(rate=rate)
        found = [frames.choose(margin=margin, typical=typical, load=load) for _ in range(20_000)]
        share = sum(choice.why == ("rate",) for choice in found) / len(found)
        assert abs(share - rate) < sqrt(log(2e12) / (2 * len(found)))


def test_a_rate_of_0_never_draws_and_a_rate_of_1_always_does():
    assert not any(thinning(rate=0).choose(**CERTAIN, load=0).why for _ in range(1000))
    assert all(thinning(rate=1).choose(**CERTAIN, load=1).why == ("rate",) for _ in range(1000))


@given(
    rate=st.floats(0, 1),
    more=st.floats(0, 1),
    draw=st.floats(0, 1, exclude_max=True),
    load=st.floats(0, 1),
    budget=st.none() | st.floats(1, 1e6),
    spent=st.floats(0, 1),
)
def test_the_load_and_the_budget_move_the_chance_between_the_two_bounds_only(rate, more, draw, load, budget, spent):
    bounds = policy(rate=rate, max_rate=rate + (1 - rate) * more, budget=budget)
    frames = Thinning(bounds, clock=Clock(), draw=lambda: draw)
    if budget:
        frames.settle(Choice(("rate",)), votes=int(0.99 * spent * budget * SAVED_UP))
    choice = frames.choose(**CERTAIN, load=load)
    if draw < bounds.rate:
        assert choice.why == ("rate",) and choice.counted
    elif draw >= bounds.max_rate:
        assert choice.why == ()
    else:
        assert choice.why in ((), ("budget",) if budget else ("load",))


def test_an_idle_engine_is_used_up_to_the_upper_bound_and_a_busy_one_falls_to_the_lower():
    frames = thinning([0.05, 0.15, 0.35, 0.75], rate=0.1, max_rate=0.6)

    def chosen(load: float) -> list[tuple[str, ...]]:
        return [frames.choose(**CERTAIN, load=load).why for _ in range(4)]

    assert chosen(0.0) == [("rate",), ("load",), ("load",), ()]
    assert chosen(0.5) == [("rate",), ("load",), (), ()]  # a chance of 0.35
    assert chosen(1.0) == [("rate",), (), (), ()]


def test_a_frame_is_chosen_if_its_classes_are_too_near_each_other():
    frames = thinning(margin=0.3)
    assert frames.choose(margin=0.29, typical=None, load=0) == Choice(("margin",))
    assert frames.choose(margin=0.3, typical=None, load=0) == Choice(())


def test_an_untypical_frame_is_chosen_and_one_that_nobody_looked_at_is_not():
    frames = thinning(untypical=True)
    assert frames.choose(margin=1, typical=False, load=0).why == ("untypical",)
    assert frames.choose(margin=1, typical=True, load=0).why == ()
    assert frames.choose(margin=1, typical=None, load=0).why == ()
    assert thinning(rate=0).choose(margin=1, typical=False, load=0).why == ()


def test_a_frame_that_is_not_proven_is_chosen_and_one_of_which_nobody_asked_is_not():
    frames = thinning(uncertified=True)
    assert frames.choose(**CERTAIN, certified=False, load=0).why == ("uncertified",)
    assert frames.choose(**CERTAIN, certified=True, load=0).why == ()
    assert frames.choose(**CERTAIN, certified=None, load=0).why == ()
    assert thinning(rate=0).choose(**CERTAIN, certified=False, load=0).why == ()


def test_a_choice_says_all_that_chose_the_frame_and_whether_a_draw_was_among_it():
    frames = thinning([0.0, 0.9], rate=0.5, margin=0.3, untypical=True)
    first = frames.choose(margin=0.1, typical=False, load=0)
    assert (first.why, first.drawn, first.counted) == (("rate", "margin", "untypical"), True, True)
    second = frames.choose(margin=0.1, typical=False, load=0)
    assert (second.why, second.drawn, second.counted) == (("margin", "untypical"), False, True)


def test_a_budget_alone_spends_what_it_has_and_no_more():
    """A thousand seconds of ten frames a second, of which each count takes fifty votes."""
    clock = Clock()
    frames = Thinning(policy(max_rate=1.0, budget=100), clock=clock)
    votes = 0
    for _ in range(10_000):
        choice = frames.choose(**CERTAIN, load=0)
        if choice.counted:
            frames.settle(choice, votes=50)
            votes += 50
        clock.now += 0.1
    saved_up = 100 * SAVED_UP
    assert votes <= 100 * 1000 + saved_up + FIRST_GUESS
    assert votes >= 0.9 * 100 * 1000


def test_a_budget_that_is_spent_says_so_and_comes_back_with_time():
    clock = Clock()
    frames = thinning([0.0], clock, rate=1, budget=10)
    first = frames.choose(**CERTAIN, load=0)
    assert first.counted
    frames.settle(first, votes=1500)  # one count may leave a debt
    second = frames.choose(**CERTAIN, load=0)
    assert (second.why, second.counted) == (("rate",), False)
    clock.now += (1500 - 10 * SAVED_UP) / 10
    assert not frames.choose(**CERTAIN, load=0).counted
    clock.now += 0.1
    assert frames.choose(**CERTAIN, load=0).counted


def test_frames_that_look_uncertain_leave_half_of_the_budget_to_the_draw():
    clock = Clock()
    draw = 0.5
    frames = Thinning(policy(rate=0.1, margin=1, budget=100), clock=clock, draw=lambda: draw)
    counted = 0
    while (choice := frames.choose(margin=0, typical=None, load=0)).counted:
        frames.settle(choice, votes=10)
        counted += 1
    assert choice == Choice(("margin",), afforded=False)
    assert 100 * SAVED_UP * RESERVED <= 10 * counted < 100 * SAVED_UP * RESERVED + FIRST_GUESS + 10
    draw = 0.0
    drawn_too = frames.choose(margin=0, typical=None, load=0)
    assert (drawn_too.why, drawn_too.counted) == (("rate", "margin"), True)


def test_a_frame_that_was_not_counted_after_all_costs_nothing():
    frames = thinning([0.0], rate=1, budget=10)
    for _ in range(100):
        choice = frames.choose(**CERTAIN, load=0)
        assert choice.counted and choice.charged == FIRST_GUESS
        frames.settle(choice, votes=0)


def test_the_guess_follows_what_counts_take():
    frames = thinning([0.0], rate=1, budget=1e6)
    for _ in range(100):
        frames.settle(frames.choose(**CERTAIN, load=0), votes=13)
    assert frames.choose(**CERTAIN, load=0).charged == pytest.approx(13, abs=0.1)


def test_a_bucket_holds_ten_seconds_of_votes_and_no_more():
    clock = Clock()
    budget = Budget(20, clock=clock)
    assert budget.level == 1
    budget.charge(100)
    assert budget.level == 0.5
    clock.now += 2.5
    assert budget.level == 0.75
    clock.now += 1e6
    assert budget.level == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.5, "max_rate": 0.4}, "rate 0.5 and max_rate 0.4 are not 0 <= rate <= max_rate <= 1"),
        ({"rate": -0.1, "max_rate": 0.4}, "rate -0.1"),
        ({"rate": 0.1, "max_rate": 1.1}, "max_rate 1.1"),
        ({"rate": float("nan"), "max_rate": 1.0}, "rate nan"),
        ({"rate": 0.1, "max_rate": 0.1, "margin": 1.5}, "a margin of 1.5 is not from 0 to 1"),
        ({"rate": 0.1, "max_rate": 0.1, "budget": 0.0}, "a budget of 0 votes per second is not above 0"),
    ],
)
def test_a_policy_that_cannot_be_one_is_refused_with_its_value(wrong, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Policy(**wrong)
