"""The pipeline on a real bundle and real sessions: the same answers however the work is mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.choices import LEAST_PRICE, MAX_SEED
from carso.inference.jobs import Job, Outcome, Result, Step, Ticket, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.vote import LARGEST_BALLOT

from tests.bundles import SMALL, random_images, shared_bundle

LATENT, CLASSES = SMALL.purifier.latent, SMALL.classifier.classes
IMAGES = random_images(24)
ROUND_ROWS = (1, 64, 300, 4096)


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def sessions() -> Sessions:
    return Sessions(Bundle.load(shared_bundle()), device="cpu", threads=1)


@pytest.fixture
def pipeline(sessions) -> Pipeline:
    return pipeline_of(sessions, round_rows=512)


def pipeline_of(sessions: Sessions, *, round_rows: int, **options: object) -> Pipeline:
    return Pipeline(sessions, latent=LATENT, classes=CLASSES, round_rows=round_rows, **options)


def plan(*, samples: int = 1500, risk: float = 1e-3, seed: int | None = 0) -> VotePlan:
    return VotePlan(samples=samples, risk=risk, seed=seed)


def both(pipeline: Pipeline) -> tuple[Step, Step]:
    """First passes, then a round: what the engine does in one turn."""
    return pipeline.first_passes(), pipeline.round()


def admitted(pipeline: Pipeline, *jobs: Job) -> list[Ticket]:
    tickets = [Ticket(job) for job in jobs]
    pipeline.admit(tickets)
    return tickets


def run(pipeline: Pipeline) -> list[Step]:
    """Step until the pipeline is idle."""
    steps = []
    while pipeline.busy:
        steps += both(pipeline)
    return steps


def results(steps: Iterable[Step]) -> dict[Ticket, Result | None]:
    return {ticket: result for step in steps for ticket, result in step.finished}


def answered(pipeline: Pipeline, job: Job) -> Result:
    """The result of a job that is alone in the pipeline."""
    (ticket,) = admitted(pipeline, job)
    return results(run(pipeline))[ticket]


def full_count(sessions: Sessions, image: np.ndarray, *, seed: int, samples: int) -> list[int]:
    """The tally of all votes, from the definition."""
    code = sessions.first_pass(image[None]).codes
    draws = np.random.Generator(np.random.Philox(key=seed))
    latents = draws.standard_normal((samples, LATENT), dtype=np.float32)
    votes = sessions.vote(code, np.zeros(samples, np.int64), latents)
    return [int((votes == label).sum()) for label in range(CLASSES)]


# --- the answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("risk", [0, 1e-3])
@pytest.mark.parametrize("round_rows", ROUND_ROWS)
def test_a_seed_gives_the_same_outcome_alone_in_a_batch_and_under_mixed_load(sessions, round_rows, risk):
    asked = plan(risk=risk, seed=77)
    alone = [pipeline_of(sessions, round_rows=512).classify(image[None], asked)[0] for image in IMAGES]

    in_a_batch = pipeline_of(sessions, round_rows=round_rows).classify(IMAGES, asked)
    assert list(in_a_batch) == alone

    pipeline = pipeline_of(sessions, round_rows=round_rows)
    rng = np.random.default_rng(5)
    order = rng.permutation(24)
    tickets = {index: Ticket(Job(IMAGES[[index]], asked)) for index in order}
    noise = [
        Job(random_images(int(rng.integers(1, 9)), seed=index), plan(samples=int(rng.integers(1, 400)), risk=1e-2))
        for index in range(20)
    ]
    noise += [Job(random_images(3, seed=index)) for index in range(10)]
    everything = [*tickets.values(), *map(Ticket, noise)]
    load = [everything[i] for i in rng.permutation(len(everything))]
    steps: list[Step] = []
    while load or pipeline.busy:
        pipeline.admit(load[:3])
        del load[:3]
        steps += both(pipeline)
    found = results(steps)
    for index, ticket in tickets.items():
        assert found[ticket].outcomes == (alone[index],)


def test_the_exact_rule_elects_the_class_of_the_full_count(sessions, pipeline):
    for samples in (1, 2, 17, 1500):
        for seed in (0, MAX_SEED):
            outcomes = pipeline.classify(IMAGES, plan(samples=samples, risk=0, seed=seed))
            for image, outcome in zip(IMAGES, outcomes, strict=True):
                tally = full_count(sessions, image, seed=seed, samples=samples)
                assert outcome.label == tally.index(max(tally))
                assert outcome.ending == "exact"
                if outcome.votes == samples:
                    assert outcome.tally == tally


def test_the_votes_that_are_cast_are_the_first_ones_of_the_seed(sessions, pipeline):
    for image, outcome in zip(IMAGES, pipeline.classify(IMAGES, plan(seed=3)), strict=True):
        assert outcome.tally == full_count(sessions, image, seed=3, samples=outcome.votes)


@pytest.mark.parametrize("risk", [0, 1e-6, 1e-2])
def test_no_vote_is_lost_or_counted_twice(pipeline, risk):
    (ticket,) = admitted(pipeline, Job(IMAGES, plan(risk=risk)))
    steps = run(pipeline)
    outcomes = results(steps)[ticket].outcomes
    assert sum(step.rows for step in steps) == sum(outcome.votes for outcome in outcomes)
    assert sum(step.first_passes for step in steps) == len(IMAGES)
    for outcome in outcomes:
        assert sum(outcome.tally) == outcome.votes <= 1500
        assert outcome.label == int(np.argmax(outcome.tally))
        assert outcome.ending in ("exact", "risk-limited")


def test_a_risk_saves_votes_and_names_its_rule(pipeline):
    exact = pipeline.classify(IMAGES, plan(risk=0))
    limited = pipeline.classify(IMAGES, plan(risk=1e-3))
    assert sum(o.votes for o in limited) < sum(o.votes for o in exact) / 2
    assert "risk-limited" in {o.ending for o in limited}
    assert {o.ending for o in exact} == {"exact"}


def test_without_a_seed_every_image_and_every_request_gets_its_own(pipeline):
    same_image_twice = IMAGES[[9, 9]]
    first = pipeline.classify(same_image_twice, plan(seed=None))
    second = pipeline.classify(same_image_twice, plan(seed=None))
    outcomes = [*first, *second]
    assert len({outcome.seed for outcome in outcomes}) == 4
    assert all(0 <= outcome.seed <= MAX_SEED for outcome in outcomes)
    assert len({tuple(outcome.tally) for outcome in outcomes}) > 1


def test_the_seed_that_an_answer_tells_gives_that_answer_again(pipeline):
    (outcome,) = pipeline.classify(IMAGES[:1], plan(seed=None))
    assert pipeline.classify(IMAGES[:1], plan(seed=outcome.seed)) == (outcome,)


def test_another_seed_draws_other_votes(pipeline):
    one, other = (pipeline.classify(IMAGES, plan(seed=seed)) for seed in (1, 2))
    assert [o.tally for o in one] != [o.tally for o in other]


# --- the order of work ------------------------------------------------------------------------------------------------


def test_a_fast_job_is_finished_in_the_step_it_arrives_in_whatever_elections_are_open(sessions):
    pipeline = pipeline_of(sessions, round_rows=64)
    (elections,) = admitted(pipeline, Job(IMAGES, plan(risk=0)))
    steps = [*both(pipeline)]
    for seed in range(5):
        (fast,) = admitted(pipeline, Job(random_images(2, seed=seed)))
        first, then = both(pipeline)
        ((ticket, result),) = first.finished
        assert ticket is fast
        assert then.rows > 0  # and the elections went on
        expected = sessions.first_pass(fast.job.images).probabilities
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
        assert result.outcomes == ()
        steps += [first, then]
    assert elections not in results(steps)
    assert len(results(run(pipeline))[elections].outcomes) == len(IMAGES)


def test_a_fast_job_goes_ahead_of_the_round_of_its_step(sessions):
    fast, robust = Job(IMAGES[:1]), Job(IMAGES[1:2], plan())
    log = []

    class Recorder:
        def first_pass(self, images):
            log.append("first pass")
            return sessions.first_pass(images)

        def vote(self, *arguments):
            log.append("votes")
            return sessions.vote(*arguments)

    pipeline = Pipeline(Recorder(), latent=LATENT, classes=CLASSES, round_rows=64)
    for job in (robust, fast):
        admitted(pipeline, job)
        both(pipeline)
    assert log == ["first pass", "votes", "first pass", "votes"]


def test_open_elections_take_turns(sessions):
    """24 elections, room for one of them in a round: after 36 rounds none is more than one ballot ahead of another."""
    clock = Clock()
    pipeline = pipeline_of(sessions, round_rows=64, clock=clock)
    tickets = admitted(pipeline, *(Job(image[None], plan(risk=0), deadline=1) for image in IMAGES))
    pipeline.first_passes()
    assert [pipeline.round().elections for _ in range(36)] == 36 * [1]
    clock.now = 1
    found = results([pipeline.round()])
    votes = [found[ticket].outcomes[0].votes for ticket in tickets]
    assert min(votes) > 0
    assert max(votes) - min(votes) <= LARGEST_BALLOT


@pytest.mark.parametrize("round_rows", ROUND_ROWS)
def test_a_round_is_at_most_as_large_as_it_may_be(sessions, round_rows):
    """Or one ballot, where a single one is larger."""
    pipeline = pipeline_of(sessions, round_rows=round_rows)
    admitted(pipeline, Job(IMAGES, plan(risk=0)))
    for step in run(pipeline):
        assert step.rows <= max(round_rows, LARGEST_BALLOT)
        assert step.rows <= round_rows or step.elections == 1


def test_a_job_of_more_images_than_a_round_has_rows_is_finished(sessions):
    images = random_images(100)
    pipeline = pipeline_of(sessions, round_rows=16)
    robust, fast = admitted(pipeline, Job(images, plan(seed=8)), Job(images))
    found = results(run(pipeline))
    assert next(iter(found)) is fast
    np.testing.assert_allclose(found[fast].probabilities, sessions.first_pass(images).probabilities, atol=1e-6)
    assert found[robust].outcomes == pipeline_of(sessions, round_rows=4096).classify(images, plan(seed=8))


def test_each_job_is_handed_back_once_with_its_times_in_order(pipeline):
    tickets = admitted(pipeline, *(Job(random_images(n, seed=n), plan() if n % 2 else None) for n in range(1, 12)))
    finished = [each for step in run(pipeline) for each in step.finished]
    assert len(finished) == len(tickets)
    assert {ticket for ticket, _ in finished} == set(tickets)
    for ticket, result in finished:
        times = result.times
        assert times.submitted == ticket.submitted
        assert times.submitted <= times.started <= times.first_pass_done <= times.finished


# --- ends before the end ----------------------------------------------------------------------------------------------


def test_a_cancelled_job_leaves_at_the_next_round_and_costs_no_more_rows(sessions):
    pipeline = pipeline_of(sessions, round_rows=24 * LARGEST_BALLOT)
    long = plan(risk=0, samples=10 * LARGEST_BALLOT)
    gone, kept = admitted(pipeline, Job(IMAGES[:12], long), Job(IMAGES[12:], long))
    pipeline.first_passes()
    before = [pipeline.round(), pipeline.round()]
    assert [step.elections for step in before] == [24, 24]
    gone.cancelled = True
    step = pipeline.round()
    assert step.finished == ((gone, None),)
    assert step.elections == 12
    after = [step, *run(pipeline)]
    kept_before = 12 * 2 * LARGEST_BALLOT
    outcomes = results(after)[kept].outcomes
    assert sum(s.rows for s in after) == sum(outcome.votes for outcome in outcomes) - kept_before


def test_a_cancelled_job_leaves_at_the_next_round_however_long_the_queue(sessions):
    pipeline = pipeline_of(sessions, round_rows=16)
    _, gone = admitted(pipeline, Job(IMAGES, plan(risk=0)), Job(IMAGES[:4], plan(risk=0)))
    both(pipeline)
    both(pipeline)
    gone.cancelled = True
    assert pipeline.round().finished == ((gone, None),)


def test_a_job_that_is_cancelled_before_its_first_pass_costs_nothing(pipeline):
    gone = Ticket(Job(IMAGES, plan()), cancelled=True)
    pipeline.admit([gone])
    first, then = run(pipeline)
    assert (first.finished, first.first_passes, then.rows) == (((gone, None),), 0, 0)


def test_a_deadline_ends_the_open_elections_with_the_votes_they_have(sessions):
    clock = Clock()
    pipeline = pipeline_of(sessions, round_rows=512, clock=clock)
    asked = plan(risk=1e-3, seed=4)
    undisturbed = pipeline.classify(IMAGES, asked)
    late, other = admitted(pipeline, Job(IMAGES, asked, deadline=1), Job(IMAGES[:2], asked))
    steps = [step for _ in range(4) for step in both(pipeline)]
    assert late not in results(steps)
    clock.now = 1
    steps.append(pipeline.round())
    outcomes = results(steps)[late].outcomes
    cut = [outcome for outcome in outcomes if outcome.ending == "deadline"]
    assert 0 < len(cut) < len(IMAGES)
    for outcome in cut:
        assert 0 < sum(outcome.tally) == outcome.votes < 1500
        assert outcome.label == outcome.tally.index(max(outcome.tally))
    for outcome, whole in zip(outcomes, undisturbed, strict=True):
        assert outcome.ending == "deadline" or outcome == whole

    assert results([*steps, *run(pipeline)])[other].outcomes == undisturbed[:2]  # others do not notice


def test_a_deadline_holds_however_long_the_queue(sessions):
    clock = Clock()
    pipeline = pipeline_of(sessions, round_rows=16, clock=clock)
    _, late = admitted(pipeline, Job(IMAGES, plan(risk=0)), Job(IMAGES[:4], plan(risk=0), deadline=1))
    both(pipeline)
    both(pipeline)
    clock.now = 1
    assert list(results([pipeline.round()])) == [late]


def test_a_deadline_that_is_past_at_the_start_leaves_an_empty_tally(sessions):
    pipeline = pipeline_of(sessions, round_rows=512, clock=Clock())
    result = answered(pipeline, Job(IMAGES[:1], plan(seed=1), deadline=-1))
    assert result.outcomes == (Outcome(label=0, votes=0, tally=CLASSES * [0], ending="deadline", seed=1),)
    assert len(result.probabilities) == 1  # the fast path's answer is there all the same


def test_first_passes_of_the_fast_path_go_ahead_of_all_others_that_wait(sessions):
    pipeline = pipeline_of(sessions, round_rows=len(IMAGES))
    *_, fast = admitted(pipeline, *(Job(IMAGES, plan()) for _ in range(10)), Job(IMAGES[:3]))
    assert list(results([pipeline.first_passes()])) == [fast]


# --- what is owed -----------------------------------------------------------------------------------------------------


def test_the_rows_of_a_job_are_its_first_passes_and_the_votes_it_may_need():
    assert Job(IMAGES[:3]).rows == 3
    assert Job(IMAGES[:3], plan(samples=1500)).rows == 3 * 1501


def test_images_that_ask_for_few_votes_are_priced_at_some_rows_as_they_take_memory_all_the_same():
    assert Job(IMAGES[:3], plan(samples=1)).rows == 3 * LEAST_PRICE


@pytest.mark.parametrize("samples", [1, 40, 200])
@pytest.mark.parametrize("leaves", ["answered", "late", "cancelled before", "cancelled after"])
def test_all_that_a_job_owes_is_settled_once_however_it_leaves(sessions, samples, leaves):
    late = leaves == "late"
    clock = Clock()
    pipeline = pipeline_of(sessions, round_rows=512, clock=clock)
    job = Job(IMAGES, plan(samples=samples, risk=0), deadline=0 if late else None)
    fast = Job(IMAGES[:5])
    ticket, _ = admitted(pipeline, job, fast)
    ticket.cancelled = leaves == "cancelled before"
    steps = [pipeline.first_passes()]
    ticket.cancelled = leaves.startswith("cancelled")
    steps += run(pipeline)
    assert sum((step.settled for step in steps), Counter()) == {"robust": job.rows, "fast": fast.rows}
    voted = sum(step.rows for step in steps)
    assert sum(sum(step.spared.values()) for step in steps) == len(IMAGES) * samples - voted
