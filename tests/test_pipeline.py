"""The pipeline on a real bundle and real sessions: the same answers however the work is mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.choices import LEAST_PRICE, MAX_SEED
from carso.inference.jobs import Certify, Job, Outcome, Result, Step, Ticket, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.vote import LARGEST_BALLOT, SMALLEST_BALLOT

from tests.bundles import SMALL, random_images, shared_bundle

LATENT, CLASSES = SMALL.purifier.latent, SMALL.classifier.classes
IMAGES = random_images(24)
ROUND_ROWS = (1, 64, 300, 4096)
FAR = 1e6  # seconds: a deadline that is never near
COST = 1e-3  # seconds of a vote, on the clock of `Costly`
EPS = 0.3
PROVEN = 2.0**-10  # random networks are steep: some images are proven within it, and some are not


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Costly:
    """Sessions whose votes take time on a test's clock, and no other."""

    def __init__(self, sessions: Sessions, clock: Clock) -> None:
        self._sessions, self._clock = sessions, clock
        self.first_pass, self.purify = sessions.first_pass, sessions.purify

    def vote(self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        self._clock.now += COST * len(latents)
        return self._sessions.vote(codes, code_index, latents)


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
    pipeline.classify(IMAGES[:1], plan())  # the pace is known from now on
    tickets = admitted(pipeline, *(Job(image[None], plan(risk=0), deadline=FAR) for image in IMAGES))
    pipeline.first_passes()
    assert [pipeline.round().elections for _ in range(36)] == 36 * [1]
    clock.now = FAR
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
    empty = Outcome(label=0, votes=0, tally=CLASSES * [0], ending="deadline", risk_reached=1.0, seed=1)
    assert result.outcomes == (empty,)
    assert len(result.probabilities) == 1  # the fast path's answer is there all the same


@pytest.mark.parametrize("others", [0, 30])
def test_near_a_deadline_every_election_has_votes_in_time_and_answers_are_late_by_one_small_round_at_most(
    sessions, others
):
    """60 elections of 512 votes a ballot would take 31 s one after the other, and there is half a second."""
    clock = Clock()
    pipeline = pipeline_of(Costly(sessions, clock), round_rows=128, clock=clock)
    admitted(pipeline, *(Job(random_images(1, seed=seed), plan(risk=0)) for seed in range(others)))
    pipeline.first_passes()
    pipeline.round()
    deadline = clock.now + 0.5
    tickets = admitted(
        pipeline, *(Job(random_images(1, seed=seed), plan(risk=0), deadline=deadline) for seed in range(60))
    )
    pipeline.first_passes()
    found: dict[Ticket, Result | None] = {}
    while not found.keys() >= set(tickets):
        step = pipeline.round()
        assert step.rows <= 128
        found |= results([step])
    assert clock.now <= deadline + 128 * COST
    votes = [found[ticket].outcomes[0].votes for ticket in tickets]
    assert min(votes) >= SMALLEST_BALLOT


def test_with_too_little_time_for_all_the_earliest_deadlines_get_their_first_votes_first(sessions):
    clock = Clock()
    pipeline = pipeline_of(Costly(sessions, clock), round_rows=64, clock=clock)
    later, sooner = (
        admitted(pipeline, *(Job(image[None], plan(risk=0), deadline=deadline) for image in IMAGES[:16]))
        for deadline in (10.0, 0.05)
    )
    pipeline.first_passes()
    pipeline.round()
    found = results([pipeline.round()])
    assert found.keys() == set(sooner)
    assert {found[ticket].outcomes[0].votes for ticket in sooner} == {SMALLEST_BALLOT}
    assert len(later) == 16


def test_an_answer_to_a_seed_is_the_same_if_its_ballots_were_cast_in_parts(sessions):
    asked = plan(samples=200, risk=1e-3, seed=9)
    whole = pipeline_of(sessions, round_rows=512).classify(IMAGES, asked)
    clock = Clock()
    pipeline = pipeline_of(Costly(sessions, clock), round_rows=32, clock=clock)
    late, parted = admitted(pipeline, Job(IMAGES, plan(risk=0), deadline=2.0), Job(IMAGES, asked))
    steps = run(pipeline)
    assert any(0 < step.rows / step.elections <= SMALLEST_BALLOT for step in steps if step.elections)
    assert results(steps)[parted].outcomes == whole
    assert {outcome.ending for outcome in results(steps)[late].outcomes} == {"deadline"}


def test_an_outcome_tells_the_risk_that_its_tally_reached(sessions):
    clock = Clock()
    pipeline = pipeline_of(Costly(sessions, clock), round_rows=512, clock=clock)
    for risk in (0, 1e-6, 1e-2):
        for outcome in pipeline.classify(IMAGES, plan(risk=risk)):
            assert (outcome.risk_reached == 0) if outcome.ending == "exact" else (0 < outcome.risk_reached <= risk)
    (late,) = admitted(pipeline, Job(IMAGES, plan(risk=0), deadline=clock.now + 0.2))
    cut = [o for o in results(run(pipeline))[late].outcomes if o.ending == "deadline"]
    assert cut
    assert all(0 < outcome.risk_reached <= 1 for outcome in cut)


# --- typical images ---------------------------------------------------------------------------------------------------


def figures_of(sessions: Sessions, images: np.ndarray) -> list[tuple[float, float]]:
    """Excess and contrast, from their definitions."""
    zeros = np.zeros((len(images), LATENT), np.float32)
    purified = sessions.purify(sessions.first_pass(images).codes, np.arange(len(images)), zeros)
    excess = np.maximum(np.abs(images - purified) - EPS, 0).mean(axis=(1, 2, 3))
    return list(zip(excess.tolist(), np.ptp(images, axis=(1, 2, 3)).tolist(), strict=True))


def shown(result: Result) -> list[tuple[float, float]]:
    return [(found.excess, found.contrast) for found in result.typicalities]


@pytest.mark.parametrize("round_rows", ROUND_ROWS)
def test_both_paths_give_the_figures_of_every_image_and_no_vote_changes(sessions, round_rows):
    without = pipeline_of(sessions, round_rows=round_rows).classify(IMAGES, plan())
    pipeline = pipeline_of(sessions, round_rows=round_rows, eps=EPS, typical_on=("fast", "robust"))
    robust, fast, robust_again = pipeline.run([Job(IMAGES, plan()), Job(IMAGES), Job(IMAGES[:3], plan(seed=5))])
    expected = figures_of(sessions, IMAGES)
    np.testing.assert_allclose(shown(robust), expected, atol=2e-6)
    np.testing.assert_allclose(shown(fast), expected, atol=2e-6)
    np.testing.assert_allclose(shown(robust_again), expected[:3], atol=2e-6)  # another seed, the same figures
    assert robust.outcomes == without


class Spied:
    """Sessions that note how many rows each run has, by the name of the method."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.runs: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> object:
        method = getattr(self._sessions, name)

        def noted(*arrays: np.ndarray, **options: object) -> object:
            self.runs.append((name, len(arrays[0])))
            return method(*arrays, **options)

        return noted


@pytest.mark.parametrize("typical_on", [("robust",), ("fast", "robust")])
def test_the_figures_of_all_images_of_a_batch_that_get_no_vote_come_from_one_run(sessions, typical_on):
    spied = Spied(sessions)
    pipeline = pipeline_of(spied, round_rows=512, eps=EPS, typical_on=typical_on)
    fast = [Job(IMAGES[:2]), Job(IMAGES[2:3])]
    robust = [Job(IMAGES[i : i + 2], plan(), certify=Certify("decide", PROVEN)) for i in range(0, len(IMAGES), 2)]
    *answers, last = pipeline.run(fast + robust)
    outcomes = [outcome for result in (*answers, last) for outcome in result.outcomes]
    decided = [outcome.votes == 0 for outcome in outcomes]
    assert 3 < sum(decided) < len(IMAGES) - 3
    without_a_vote = sum(decided) + (3 if "fast" in typical_on else 0)
    assert [rows for name, rows in spied.runs if name == "purify"] == [without_a_vote]
    found = [figures for result in (*answers[2:], last) for figures in shown(result)]
    np.testing.assert_allclose(found, figures_of(sessions, IMAGES), atol=2e-6)
    assert [result.typicalities is None for result in answers[:2]] == ["fast" not in typical_on] * 2


@pytest.mark.parametrize("mode", ["report", "decide", "max"])
def test_proofs_and_what_they_decide_are_the_same_alone_and_under_mixed_load(sessions, mode):
    certify = Certify(mode, PROVEN)
    alone = [
        answered(pipeline_of(sessions, round_rows=512, eps=EPS), Job(IMAGES[i : i + 1], plan(), certify=certify))
        for i in range(len(IMAGES))
    ]
    pipeline = pipeline_of(sessions, round_rows=7, eps=EPS)
    others = [Job(IMAGES, plan(seed=3)), Job(IMAGES[:3], certify=Certify("report", 0.5)), Job(IMAGES[:1])]
    *_, mixed = pipeline.run([*others, Job(IMAGES, plan(), certify=certify)])
    assert mixed.outcomes == tuple(outcome for result in alone for outcome in result.outcomes)
    assert [found and found.eps for found in mixed.certificates] == [
        found and found.eps for result in alone for found in result.certificates
    ]
    for image, outcome in enumerate(mixed.outcomes):
        proven = mixed.certificates[image] is not None
        assert (outcome.votes == 0) == (mode == "decide" and proven)
        if outcome.votes == 0:
            assert outcome.label == mixed.probabilities[image].argmax()
            assert (outcome.ending, outcome.tally, outcome.seed) == ("certificate", [0] * CLASSES, 0)


@pytest.mark.parametrize("mode", ["report", "decide", "max"])
def test_what_was_proven_of_images_is_taken_over_and_neither_computed_nor_charged_again(sessions, mode):
    certify = Certify(mode, PROVEN)
    once = answered(pipeline_of(sessions, round_rows=512), Job(IMAGES, plan(), certify=certify))
    spied = Spied(sessions)
    again = Job(IMAGES, plan(), certify=certify, proven=once.certificates)
    assert again.rows == Job(IMAGES, plan()).rows
    result = answered(pipeline_of(spied, round_rows=512), again)
    assert (result.outcomes, result.certificates) == (once.outcomes, once.certificates)
    assert "first_pass_with_bounds" not in {name for name, _ in spied.runs}


def test_a_device_that_does_both_apart_gives_the_same_votes_and_images(sessions):
    codes = sessions.first_pass(IMAGES).codes
    latents = np.random.default_rng(2).standard_normal((40, LATENT), dtype=np.float32)
    code_index = np.arange(40) % len(IMAGES)
    one_run = sessions.vote_and_purify(codes, code_index, latents, purified=7)
    apart = sessions.vote(codes, code_index[:33], latents[:33]), sessions.purify(codes, code_index[33:], latents[33:])
    np.testing.assert_array_equal(one_run[0], apart[0])
    np.testing.assert_allclose(one_run[1], apart[1], atol=1e-6)


def test_a_path_that_is_not_asked_for_figures_has_none_and_costs_no_row(sessions):
    nobody = pipeline_of(sessions, round_rows=64)
    robust_only = pipeline_of(sessions, round_rows=64, eps=EPS)
    for pipeline, job in ((nobody, Job(IMAGES, plan())), (nobody, Job(IMAGES)), (robust_only, Job(IMAGES))):
        (result,) = pipeline.run([job])
        assert result.typicalities is None


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
    assert sum((Counter(step.settled) for step in steps), Counter()) == {"robust": job.rows, "fast": fast.rows}
    voted = sum(step.rows for step in steps)
    assert sum(sum(step.spared.values()) for step in steps) == len(IMAGES) * samples - voted


def test_the_answer_to_a_seed_does_not_depend_on_how_many_threads_draw_its_latents(sessions):
    images = random_images(40)
    found = [
        pipeline_of(sessions, round_rows=4096, draw_threads=threads).classify(images, plan(risk=0))
        for threads in (1, 3)
    ]
    assert found[0] == found[1]
