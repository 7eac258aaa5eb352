"""What only a GPU can show. Without one, each of these tests is skipped, with the reason.

They need pytest and what the service needs, so that they run on a bare machine: benchmarks/gpu.py runs them there.
CARSO_TEST_BUNDLE is the bundle that they use; by default, the shipped one.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.choices import CUDA, PRECISIONS
from carso.inference.abilities import DeviceError
from carso.inference.jobs import VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import CUDA_BUCKETS, Sessions
from carso.settings import REFERENCE_BUNDLE

pytestmark = pytest.mark.gpu

ROWS = 4096
DIFFERING = 0.02  # of the votes, at most: those between two almost equal classes


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(Path(os.environ.get("CARSO_TEST_BUNDLE", REFERENCE_BUNDLE)))


@pytest.fixture(scope="module", params=product(PRECISIONS[CUDA], (False, True)), ids=str)
def sessions(bundle, request) -> Sessions:
    precision, cuda_graphs = request.param
    try:
        return Sessions(bundle, device="cuda", precision=precision, cuda_graphs=cuda_graphs)
    except DeviceError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def cpu(bundle) -> Sessions:
    return Sessions(bundle, device="cpu", precision="float32")


def rows_of(bundle: Bundle, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The known codes in turn, with latents that are the same every time."""
    latents = np.random.default_rng(0).standard_normal((rows, bundle.manifest.latent), np.float32)
    return bundle.self_test.codes, np.arange(rows) % len(bundle.self_test.codes), latents


def test_auto_takes_the_gpu_and_the_sessions_tell_so(bundle, sessions):
    assert sessions.provider == CUDA
    assert Sessions(bundle, device="auto").provider == CUDA


def test_votes_and_first_passes_are_those_of_the_cpu(bundle, sessions, cpu):
    here, there = (each.first_pass(bundle.self_test.images) for each in (cpu, sessions))
    np.testing.assert_allclose(there.probabilities, here.probabilities, atol=1e-3)
    np.testing.assert_allclose(there.codes, here.codes, atol=1e-3)
    arrays = rows_of(bundle)
    assert (sessions.vote(*arrays) != cpu.vote(*arrays)).mean() <= DIFFERING


@pytest.mark.parametrize("rows", [1, CUDA_BUCKETS[0], CUDA_BUCKETS[0] + 1, 500, 2000])
def test_a_vote_is_nearly_always_the_same_in_a_batch_of_another_size(bundle, sessions, rows):
    codes, code_index, latents = rows_of(bundle)
    alone = sessions.vote(codes, code_index[:rows], latents[:rows])
    together = sessions.vote(codes, code_index, latents)[:rows]
    assert (alone != together).sum() <= DIFFERING * rows


def test_the_same_batch_gets_the_same_votes_again(bundle, sessions):
    arrays = rows_of(bundle)
    first = sessions.vote(*arrays)
    sessions.vote(*rows_of(bundle, CUDA_BUCKETS[0]))
    np.testing.assert_array_equal(sessions.vote(*arrays), first)


def test_a_batch_beyond_the_largest_bucket_runs_as_it_is(bundle, sessions, cpu):
    arrays = rows_of(bundle, CUDA_BUCKETS[-1] + 1)
    assert (sessions.vote(*arrays) != cpu.vote(*arrays)).mean() <= DIFFERING


def test_purified_images_are_those_of_the_cpu(bundle, sessions, cpu):
    codes, code_index, latents = rows_of(bundle, 64)
    purified = [each.purify(codes, code_index, latents) for each in (cpu, sessions)]
    np.testing.assert_allclose(*purified, atol=5e-3)
    votes, images = sessions.vote_and_purify(codes, code_index, latents, purified=8)
    assert len(votes) == 56
    np.testing.assert_allclose(images, purified[1][56:], atol=5e-3)


def test_the_vote_on_a_gpu_elects_the_labels_that_the_cpu_elects(bundle, sessions, cpu):
    manifest = bundle.manifest
    plan = VotePlan(samples=manifest.samples, risk=1e-6, seed=1)
    labels = [
        [
            outcome.label
            for outcome in Pipeline(
                each, latent=manifest.latent, classes=len(manifest.classes), round_rows=8192
            ).classify(bundle.self_test.images, plan)
        ]
        for each in (cpu, sessions)
    ]
    assert labels[0] == labels[1]


def test_cuda_graphs_work_in_the_thread_that_built_the_sessions_and_in_another(bundle, cpu):
    """CUDA's provider keeps the graphs of each thread by themselves. The service never changes threads."""
    try:
        Sessions(bundle, device="cuda")
    except DeviceError as e:
        pytest.skip(str(e))
    sessions = Sessions(bundle, device="cuda", cuda_graphs=True)
    assert sessions.cuda_graphs
    arrays = rows_of(bundle, 100)
    expected = cpu.vote(*arrays)
    found = [sessions.vote(*arrays)]
    thread = Thread(target=lambda: found.extend(sessions.vote(*arrays) for _ in range(3)))
    thread.start()
    thread.join()
    assert len(found) == 4
    for votes in found:
        assert (votes != expected).sum() <= DIFFERING * len(expected)
