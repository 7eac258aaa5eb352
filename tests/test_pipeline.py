"""The pipeline on a real bundle and real sessions: the same answers however the work is mixed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.inference.pipeline import LEAST_PRICE, MAX_SEED, Ballot, Job, Outcome, Pipeline, Step
from carso.inference.sessions import Sessions
from carso.inference.vote import LARGEST_BALLOT

from tests.bundles import SMALL, random_images, shared_bundle

LATENT, CLASSES = SMALL.purifier.latent, SMALL.classifier.classes
IMAGES = random_images(24)
ROUND_ROWS = (1, 64, 300, 4096)


@pytest.fixture(scope="module")
def sessions() -> Sessions:
    return Sessions(Bundle.load(shared_bundle()), device="cpu", threads=1)


@pytest.fixture
def pipeline(sessions) -> Pipeline:
    return pipeline_of(sessions, round_rows=512)


def pipeline_of(sessions: Sessions, *, round_rows: int) -> Pipeline:
    return Pipeline(sessions, latent=LATENT, classes=CLASSES, round_rows=round_rows)


def ballot(*, samples: int = 1500, risk: float = 1e-3, seed: int | None = 0) -> Ballot:
    return Ballot(samples=samples, risk=risk, seed=seed)


def run(pipeline: Pipeline, jobs: Iterable[Job] = ()) -> list[Step]:
    """Admit `jobs`, and step until the pipeline is idle."""
    pipeline.admit(jobs)
    steps = []
    while pipeline.busy:
        steps.append(pipeline.step())
    return steps


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
    asked = ballot(risk=risk, seed=77)
    alone = [pipeline_of(sessions, round_rows=512).classify(image[None], asked)[0] for image in IMAGES]

    in_a_batch = pipeline_of(sessions, round_rows=round_rows).classify(IMAGES, asked)
    assert in_a_batch == alone

    pipeline = pipeline_of(sessions, round_rows=round_rows)
    rng = np.random.default_rng(5)
    jobs = [Job(IMAGES[[index]], asked) for index in rng.permutation(24)]
    noise = [
        Job(random_images(int(rng.integers(1, 9)), seed=index), ballot(samples=int(rng.integers(1, 400)), risk=1e-2))
        for index in range(20)
    ]
    noise += [Job(random_images(3, seed=index)) for index in range(10)]
    load = [jobs[i] if i < 24 else noise[i - 24] for i in rng.permutation(24 + len(noise))]
    while load or pipeline.busy:
        pipeline.admit(load[:3])
        del load[:3]
        pipeline.step()
    for job in jobs:
        index = next(i for i in range(24) if (IMAGES[i] == job.images[0]).all())
        assert job.outcomes == [alone[index]]


def test_the_exact_rule_elects_the_class_of_the_full_count(sessions, pipeline):
    for samples in (1, 2, 17, 1500):
        for seed in (0, MAX_SEED):
            outcomes = pipeline.classify(IMAGES, ballot(samples=samples, risk=0, seed=seed))
            for image, outcome in zip(IMAGES, outcomes, strict=True):
                tally = full_count(sessions, image, seed=seed, samples=samples)
                assert outcome.label == tally.index(max(tally))
                assert outcome.rule == "exact"
                if outcome.votes == samples:
                    assert outcome.tally == tally


def test_the_votes_that_are_cast_are_the_first_ones_of_the_seed(sessions, pipeline):
    for image, outcome in zip(IMAGES, pipeline.classify(IMAGES, ballot(seed=3)), strict=True):
        assert outcome.tally == full_count(sessions, image, seed=3, samples=outcome.votes)


@pytest.mark.parametrize("risk", [0, 1e-6, 1e-2])
def test_no_vote_is_lost_or_counted_twice(pipeline, risk):
    job = Job(IMAGES, ballot(risk=risk))
    steps = run(pipeline, [job])
    assert sum(step.rows for step in steps) == sum(outcome.votes for outcome in job.outcomes)
    assert sum(step.first_passes for step in steps) == len(IMAGES)
    for outcome in job.outcomes:
        assert sum(outcome.tally) == outcome.votes <= 1500
        assert outcome.label == int(np.argmax(outcome.tally))
        assert outcome.rule in ("exact", "risk-limited")


def test_a_risk_saves_votes_and_names_its_rule(pipeline):
    exact = pipeline.classify(IMAGES, ballot(risk=0))
    limited = pipeline.classify(IMAGES, ballot(risk=1e-3))
    assert sum(o.votes for o in limited) < sum(o.votes for o in exact) / 2
    assert "risk-limited" in {o.rule for o in limited}
    assert {o.rule for o in exact} == {"exact"}


def test_without_a_seed_every_image_and_every_request_gets_its_own(pipeline):
    same_image_twice = IMAGES[[9, 9]]
    first = pipeline.classify(same_image_twice, ballot(seed=None))
    second = pipeline.classify(same_image_twice, ballot(seed=None))
    outcomes = [*first, *second]
    assert len({outcome.seed for outcome in outcomes}) == 4
    assert all(0 <= outcome.seed <= MAX_SEED for outcome in outcomes)
    assert len({tuple(outcome.tally) for outcome in outcomes}) > 1


def test_the_seed_that_an_answer_tells_gives_that_answer_again(pipeline):
    (outcome,) = pipeline.classify(IMAGES[:1], ballot(seed=None))
    assert pipeline.classify(IMAGES[:1], ballot(seed=outcome.seed)) == [outcome]


def test_another_seed_draws_other_votes(pipeline):
    one, other = (pipeline.classify(IMAGES, ballot(seed=seed)) for seed in (1, 2))
    assert [o.tally for o in one] != [o.tally for o in other]


# --- the order of work ------------------------------------------------------------------------------------------------


def test_a_fast_job_is_finished_in_the_step_it_arrives_in_whatever_elections_are_open(sessions):
    pipeline = pipeline_of(sessions, round_rows=64)
    elections = Job(IMAGES, ballot(risk=0))
    pipeline.admit([elections])
    pipeline.step()
    for seed in range(5):
        fast = Job(random_images(2, seed=seed))
        pipeline.admit([fast])
        step = pipeline.step()
        assert step.finished == [fast]
        assert step.rows > 0  # and the elections went on
        np.testing.assert_allclose(fast.probabilities, sessions.first_pass(fast.images).probabilities, atol=1e-6)
        assert fast.outcomes == []
    assert elections.open == len(IMAGES)


def test_a_fast_job_goes_ahead_of_the_round_of_its_step(sessions):
    fast, robust = Job(IMAGES[:1]), Job(IMAGES[1:2], ballot())
    log = []

    class Recorder:
        def first_pass(self, images):
            log.append("first pass")
            return sessions.first_pass(images)

        def vote(self, *arguments):
            log.append("votes")
            return sessions.vote(*arguments)

    pipeline = Pipeline(Recorder(), latent=LATENT, classes=CLASSES, round_rows=64)
    pipeline.admit([robust])
    pipeline.step()
    pipeline.admit([fast])
    pipeline.step()
    assert log == ["first pass", "votes", "first pass", "votes"]


def test_open_elections_take_turns(sessions):
    """24 elections, room for one of them in a round: after 36 rounds none is more than one ballot ahead of another."""
    jobs = [Job(image[None], ballot(risk=0)) for image in IMAGES]
    pipeline = pipeline_of(sessions, round_rows=64)
    pipeline.admit(jobs)
    assert [pipeline.step().elections for _ in range(36)] == 36 * [1]
    for job in jobs:
        job.deadline = time.monotonic()
    run(pipeline)
    votes = [job.outcomes[0].votes for job in jobs]
    assert min(votes) > 0
    assert max(votes) - min(votes) <= LARGEST_BALLOT


@pytest.mark.parametrize("round_rows", ROUND_ROWS)
def test_a_round_is_at_most_as_large_as_it_may_be(sessions, round_rows):
    """Or one ballot, where a single one is larger."""
    for step in run(pipeline_of(sessions, round_rows=round_rows), [Job(IMAGES, ballot(risk=0))]):
        assert step.rows <= max(round_rows, LARGEST_BALLOT)
        assert step.rows <= round_rows or step.elections == 1


def test_a_job_of_more_images_than_a_round_has_rows_is_finished(sessions):
    images = random_images(100)
    pipeline = pipeline_of(sessions, round_rows=16)
    robust, fast = Job(images, ballot(seed=8)), Job(images)
    steps = run(pipeline, [robust, fast])
    assert next(job for step in steps for job in step.finished) is fast
    np.testing.assert_allclose(fast.probabilities, sessions.first_pass(images).probabilities, atol=1e-6)
    assert robust.outcomes == pipeline_of(sessions, round_rows=4096).classify(images, ballot(seed=8))


def test_each_job_is_handed_back_once_with_its_times_in_order(pipeline):
    jobs = [Job(random_images(n, seed=n), ballot() if n % 2 else None) for n in range(1, 12)]
    before = time.monotonic()
    finished = [job for step in run(pipeline, jobs) for job in step.finished]
    assert sorted(map(id, finished)) == sorted(map(id, jobs))
    for job in jobs:
        assert job.submitted <= before <= job.started <= job.first_pass_done <= job.finished <= time.monotonic()


# --- ends before the end ----------------------------------------------------------------------------------------------


def test_a_cancelled_job_leaves_at_the_next_round_and_costs_no_more_rows(sessions):
    pipeline = pipeline_of(sessions, round_rows=24 * LARGEST_BALLOT)
    long = ballot(risk=0, samples=10 * LARGEST_BALLOT)
    gone, kept = Job(IMAGES[:12], long), Job(IMAGES[12:], long)
    pipeline.admit([gone, kept])
    before = [pipeline.step(), pipeline.step()]
    assert [step.elections for step in before] == [24, 24]
    gone.cancelled = True
    step = pipeline.step()
    assert step.finished == [gone]
    assert step.elections == 12
    assert gone.outcomes == 12 * [None]
    after = [step, *run(pipeline)]
    kept_before = 12 * 2 * LARGEST_BALLOT
    assert sum(s.rows for s in after) == sum(outcome.votes for outcome in kept.outcomes) - kept_before


def test_a_cancelled_job_leaves_at_the_next_round_however_long_the_queue(sessions):
    pipeline = pipeline_of(sessions, round_rows=16)
    gone = Job(IMAGES[:4], ballot(risk=0))
    pipeline.admit([Job(IMAGES, ballot(risk=0)), gone])
    pipeline.step()
    pipeline.step()
    gone.cancelled = True
    assert pipeline.step().finished == [gone]


def test_a_job_that_is_cancelled_before_its_first_pass_costs_nothing(pipeline):
    gone = Job(IMAGES, ballot(), cancelled=True)
    (step,) = run(pipeline, [gone])
    assert (step.finished, step.first_passes, step.rows) == ([gone], 0, 0)
    assert gone.probabilities is None


def test_a_deadline_ends_the_open_elections_with_the_votes_they_have(pipeline):
    job = Job(IMAGES, ballot(risk=1e-3, seed=4), deadline=time.monotonic() + 3600)
    other = Job(IMAGES[:2], ballot(risk=1e-3, seed=4))
    pipeline.admit([job, other])
    for _ in range(4):
        pipeline.step()
    decided = [outcome for outcome in job.outcomes if outcome]
    assert 0 < len(decided) < len(IMAGES)
    job.deadline = time.monotonic()
    assert job in pipeline.step().finished
    late = [outcome for outcome in job.outcomes if outcome.rule == "deadline"]
    assert len(late) == len(IMAGES) - len(decided)
    for outcome in late:
        assert 0 < sum(outcome.tally) == outcome.votes < 1500
        assert outcome.label == outcome.tally.index(max(outcome.tally))
    assert all(outcome in job.outcomes for outcome in decided)

    run(pipeline)
    assert other.outcomes == pipeline.classify(IMAGES[:2], ballot(risk=1e-3, seed=4))  # others do not notice


def test_a_deadline_holds_however_long_the_queue(sessions):
    pipeline = pipeline_of(sessions, round_rows=16)
    late = Job(IMAGES[:4], ballot(risk=0), deadline=time.monotonic() + 3600)
    pipeline.admit([Job(IMAGES, ballot(risk=0)), late])
    pipeline.step()
    pipeline.step()
    late.deadline = time.monotonic()
    assert pipeline.step().finished == [late]


def test_a_deadline_that_is_past_at_the_start_leaves_an_empty_tally(pipeline):
    job = Job(IMAGES[:1], ballot(seed=1), deadline=time.monotonic() - 1)
    run(pipeline, [job])
    assert job.outcomes == [Outcome(label=0, votes=0, tally=CLASSES * [0], rule="deadline", seed=1)]
    assert job.probabilities is not None  # the fast path's answer is there all the same


def test_first_passes_of_the_fast_path_go_ahead_of_all_others_that_wait(sessions):
    pipeline = pipeline_of(sessions, round_rows=len(IMAGES))
    fast = Job(IMAGES[:3])
    pipeline.admit([*(Job(IMAGES, ballot()) for _ in range(10)), fast])
    assert pipeline.first_passes().finished == [fast]


# --- what is owed -----------------------------------------------------------------------------------------------------


def test_the_rows_of_a_job_are_its_first_passes_and_the_votes_it_may_need():
    assert Job(IMAGES[:3]).rows == 3
    assert Job(IMAGES[:3], ballot(samples=1500)).rows == 3 * 1501


def test_images_that_ask_for_few_votes_are_priced_at_some_rows_as_they_take_memory_all_the_same():
    assert Job(IMAGES[:3], ballot(samples=1)).rows == 3 * LEAST_PRICE


@pytest.mark.parametrize("samples", [1, 40, 200])
@pytest.mark.parametrize("leaves", ["answered", "late", "cancelled before", "cancelled after"])
def test_all_that_a_job_owes_is_settled_once_however_it_leaves(pipeline, samples, leaves):
    job = Job(IMAGES, ballot(samples=samples, risk=0))
    fast = Job(IMAGES[:5])
    job.cancelled = leaves == "cancelled before"
    job.deadline = 0.0 if leaves == "late" else None
    pipeline.admit([job, fast])
    steps = [pipeline.first_passes()]
    job.cancelled = leaves.startswith("cancelled")
    steps += run(pipeline)
    assert sum((step.settled for step in steps), Counter()) == {"robust": job.rows, "fast": fast.rows}
    voted = sum(step.rows for step in steps)
    assert sum(sum(step.spared.values()) for step in steps) == len(IMAGES) * samples - voted
