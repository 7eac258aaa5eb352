"""Sessions: the device that was asked for, told by the built session, and tested before it is used."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from carso.bundle import Bundle
from carso.choices import CPU, CUDA, PRECISIONS
from carso.inference import processors
from carso.inference.abilities import DeviceError
from carso.inference.processors import usable_cpus
from carso.inference.sessions import SCORE_TOLERANCE, VOTE_TOLERANCE, Sessions

from tests.bundles import COLOUR, REFERENCE, SMALL, random_images, shared_bundle
from tests.cuda import CudaOnTheCpu, pretend


def cuda_works() -> bool:
    try:
        Sessions(Bundle.load(shared_bundle()), device="cuda")
    except DeviceError:
        return False
    return True


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.load(shared_bundle())


@pytest.fixture
def sessions(bundle) -> Sessions:
    return Sessions(bundle, device="cpu", threads=1)


class SilentlyOnTheCpu(ort.InferenceSession):
    """What ONNX Runtime does where a CUDA library is missing: a session on the CPU, and no exception."""

    def __init__(self, graph, options, providers):
        super().__init__(graph, options, providers=[CPU])


@pytest.fixture
def driver_but_no_cuda_libraries(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(ort, "InferenceSession", SilentlyOnTheCpu)


@pytest.mark.parametrize("config", [SMALL, COLOUR, REFERENCE], ids=["small", "colour", "reference"])
def test_a_bundle_of_any_shape_runs_on_the_cpu(config):
    bundle = Bundle.load(shared_bundle(config))
    sessions = Sessions(bundle, device="cpu", threads=1)
    assert sessions.provider == CPU
    first = sessions.first_pass(random_images(3, config))
    assert first.probabilities.shape == (3, config.classifier.classes)
    assert first.codes.shape == (3, config.purifier.code)


def test_auto_takes_the_cpu_where_there_is_no_gpu(bundle):
    if cuda_works():
        pytest.skip("there is a GPU")
    assert Sessions(bundle, device="auto").provider == CPU


def test_cuda_refuses_where_there_is_no_gpu_and_says_what_to_set(bundle):
    if cuda_works():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="CARSO_DEVICE=cpu"):
        Sessions(bundle, device="cuda")


def test_cuda_refuses_a_runtime_that_was_built_without_it(bundle, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(DeviceError, match=r"built without CUDA; install carso\[gpu\] instead, or set CARSO_DEVICE=cpu"):
        Sessions(bundle, device="cuda")


@pytest.mark.usefixtures("driver_but_no_cuda_libraries")
def test_cuda_refuses_a_session_that_silently_runs_on_the_cpu(bundle):
    with pytest.raises(DeviceError, match=rf"the session runs on {CPU}"):
        Sessions(bundle, device="cuda")


@pytest.mark.usefixtures("driver_but_no_cuda_libraries")
def test_auto_tells_the_provider_that_was_got_and_not_the_one_that_was_listed(bundle):
    assert Sessions(bundle, device="auto").provider == CPU


def test_a_runtime_that_cannot_start_cuda_is_a_device_error(bundle, monkeypatch, driver_but_no_cuda_libraries):
    def out_of_memory(graph, options, providers):
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(ort, "InferenceSession", out_of_memory)
    with pytest.raises(DeviceError, match=r"CUDA cannot be used: CUDA failure 2: out of memory\. Check the driver"):
        Sessions(bundle, device="cuda")


KNOWN_ANSWERS = {
    "other probabilities": lambda test: replace(test, probabilities=test.probabilities + 0.01),
    "other codes": lambda test: replace(test, codes=test.codes[::-1]),
    "answers that are not numbers": lambda test: replace(test, probabilities=test.probabilities * np.nan),
    "other votes": lambda test: replace(test, votes=(test.votes + (np.arange(len(test.votes)) < 16)) % 10),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_a_device_that_gives_other_answers_than_the_known_ones_is_refused(bundle, name):
    failed = rf"self-test of bundle .* failed on {CPU}: in float32, scores .*; in float32, .* of the votes differ"
    with pytest.raises(DeviceError, match=failed) as e:
        Sessions(replace(bundle, self_test=KNOWN_ANSWERS[name](bundle.self_test)), device="cpu")
    assert str(bundle.folder) in str(e.value)


def test_a_single_vote_that_falls_the_other_way_is_no_failure(bundle):
    test = bundle.self_test
    votes = test.votes.copy()
    votes[0] = (votes[0] + 1) % 10
    Sessions(replace(bundle, self_test=replace(test, votes=votes)), device="cpu")


@pytest.mark.parametrize("rows", [1, 2, 17, 1000])
def test_any_number_of_rows_gives_each_row_its_own_answer(sessions, rows):
    """The same as in one batch of 1000: no row depends on its neighbours."""
    images = random_images(1000)
    latents = np.random.default_rng(1).standard_normal((1000, SMALL.purifier.latent), dtype=np.float32)
    code_index = np.arange(1000) % 7
    first = sessions.first_pass(images)
    votes = sessions.vote(first.codes[:7], code_index, latents)
    own_votes = sessions.vote(first.codes[:7], code_index[-rows:], latents[-rows:])
    own_first = sessions.first_pass(images[-rows:])
    np.testing.assert_allclose(own_first.probabilities, first.probabilities[-rows:], atol=1e-6)
    np.testing.assert_allclose(own_first.codes, first.codes[-rows:], atol=1e-6)
    np.testing.assert_array_equal(own_votes, votes[-rows:])


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 32, 33, 100])
def test_batches_padded_to_fixed_sizes_give_the_same_answers(bundle, sessions, rows):
    """To 4 or 32 rows; larger ones run as they are."""
    padding = Sessions(bundle, device="cpu", threads=1, buckets=(4, 32))
    images = random_images(rows)
    latents = np.random.default_rng(1).standard_normal((rows, SMALL.purifier.latent), dtype=np.float32)
    plain, padded = sessions.first_pass(images), padding.first_pass(images)
    np.testing.assert_allclose(padded.probabilities, plain.probabilities, atol=1e-6)
    np.testing.assert_allclose(padded.codes, plain.codes, atol=1e-6)
    votes = [s.vote(plain.codes, np.arange(rows)[::-1].copy(), latents) for s in (sessions, padding)]
    np.testing.assert_array_equal(*votes)
    purified = [s.purify(plain.codes, np.arange(rows), latents) for s in (sessions, padding)]
    np.testing.assert_allclose(*purified, atol=1e-6)


def test_a_smaller_batch_sees_nothing_of_a_larger_one_in_the_same_buffers(bundle, sessions):
    bound = Sessions(bundle, device="cpu", threads=1, buckets=(4, 32))
    latents = np.random.default_rng(1).standard_normal((32, SMALL.purifier.latent), dtype=np.float32)
    codes = sessions.first_pass(random_images(32)).codes
    earlier = bound.first_pass(random_images(32))
    kept = earlier.codes.copy()
    for images, rows in ((32, 32), (1, 5), (3, 17), (32, 31), (2, 4)):
        code_index = np.arange(rows) % images
        arguments = codes[:images], code_index, latents[:rows]
        np.testing.assert_array_equal(bound.vote(*arguments), sessions.vote(*arguments))
        np.testing.assert_allclose(bound.first_pass(random_images(rows)).codes, codes[:rows], atol=1e-6)
    np.testing.assert_array_equal(earlier.codes, kept)  # answers are no views of the buffers


def test_probabilities_and_purified_images_are_in_their_ranges(sessions):
    images = random_images(50)
    first = sessions.first_pass(images)
    np.testing.assert_allclose(first.probabilities.sum(axis=1), 1, atol=1e-5)
    latents = np.random.default_rng(1).standard_normal((50, SMALL.purifier.latent), dtype=np.float32)
    purified = sessions.purify(first.codes, np.arange(50), latents)
    assert purified.shape == images.shape
    assert purified.min() >= 0
    assert purified.max() <= 1


@pytest.mark.parametrize(
    ("quota", "cpus"), [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 64), (None, 64)]
)
def test_usable_cpus_are_bounded_by_affinity_and_by_the_cgroups_quota(monkeypatch, tmp_path, quota, cpus):
    """The affinity mask has 64 processors."""
    path = tmp_path / "cpu.max"
    if quota:
        path.write_text(quota + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(processors, "Path", lambda _: Path(path))
    assert usable_cpus() == cpus


def test_affinity_bounds_a_larger_quota(monkeypatch, tmp_path):
    path = tmp_path / "cpu.max"
    path.write_text("6400000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5})
    monkeypatch.setattr(processors, "Path", lambda _: Path(path))
    assert usable_cpus() == 2


def test_int8_is_refused_by_name_where_the_bundle_has_no_such_graph(bundle):
    with pytest.raises(DeviceError, match=r"vote_int8\.onnx.*CARSO_PRECISION=float32"):
        Sessions(replace(bundle, vote_int8=None), device="cpu", precision="int8")


def test_a_precision_that_the_device_cannot_do_is_refused_with_those_that_it_can(bundle):
    can = r"cannot be cast in tf32 on CPUExecutionProvider: set CARSO_PRECISION to float32 or int8, or choose another"
    with pytest.raises(DeviceError, match=can):
        Sessions(bundle, device="cpu", precision="tf32")


def test_every_precision_of_every_device_has_a_tolerance_of_its_own():
    assert VOTE_TOLERANCE.keys() == {(device, each) for device, able in PRECISIONS.items() for each in able}
    assert SCORE_TOLERANCE.keys() == PRECISIONS.keys()


@pytest.mark.parametrize(("precision", "use_tf32"), [("float32", ["0", "0"]), ("tf32", ["0", "1"])])
def test_cuda_is_told_which_products_may_be_rounded_and_those_of_first_passes_never_are(
    bundle, monkeypatch, driver_but_no_cuda_libraries, precision, use_tf32
):
    told = []

    class CallsItselfCuda(ort.InferenceSession):
        def __init__(self, graph, options, providers):
            ((_, cuda_options),) = providers
            told.append(cuda_options["use_tf32"])
            super().__init__(graph, options, providers=[CPU])

        def get_providers(self):
            return [CUDA]

    monkeypatch.setattr(ort, "InferenceSession", CallsItselfCuda)
    with contextlib.suppress(DeviceError):  # there is no memory of a GPU here
        Sessions(bundle, device="cuda", precision=precision)
    assert told == use_tf32


@pytest.fixture
def cuda_on_the_cpu(monkeypatch) -> type[CudaOnTheCpu]:
    pretend(monkeypatch.setattr)
    return CudaOnTheCpu


def test_without_cuda_graphs_cuda_is_told_of_none(bundle, cuda_on_the_cpu):
    sessions = Sessions(bundle, device="cuda", buckets=(4, 32))
    assert not sessions.cuda_graphs
    assert [options["enable_cuda_graph"] for options in cuda_on_the_cpu.built] == ["0", "0"]
    assert {run.graph for run in cuda_on_the_cpu.runs} == {None}


def test_every_combination_of_fixed_sizes_has_a_cuda_graph_and_buffers_of_its_own(bundle, sessions, cuda_on_the_cpu):
    replaying = Sessions(bundle, device="cuda", buckets=(4, 32), cuda_graphs=True)
    assert replaying.cuda_graphs
    assert [options["enable_cuda_graph"] for options in cuda_on_the_cpu.built] == ["1", "1"]
    images, latents = (
        random_images(32),
        np.random.default_rng(1).standard_normal((32, SMALL.purifier.latent), np.float32),
    )
    codes = sessions.first_pass(images).codes
    seen: dict[str | None, set[tuple[int, ...]]] = {}
    for rows, of in ((3, 1), (4, 2), (20, 1), (32, 3), (32, 30), (3, 1), (20, 1), (32, 30)):
        cuda_on_the_cpu.runs.clear()
        arguments = codes[:of], np.arange(rows) % of, latents[:rows]
        np.testing.assert_array_equal(replaying.vote(*arguments), sessions.vote(*arguments))
        (run,) = cuda_on_the_cpu.runs  # they were captured at the start
        seen.setdefault(run.graph, set()).add(run.outputs)
    assert len(seen) == 3  # 4 rows of 4 codes, 32 of 4, 32 of 32
    assert not seen.keys() & {None, "-1", "0"}
    assert all(len(buffers) == 1 for buffers in seen.values())
    assert len(set().union(*seen.values())) == 3


def test_a_run_before_each_capture_makes_its_buffers_and_is_told_to_capture_nothing(bundle, cuda_on_the_cpu):
    Sessions(bundle, device="cuda", buckets=(4,), cuda_graphs=True)
    graphs = [run.graph for run in cuda_on_the_cpu.runs]
    # the first pass; votes and purified images, whose ids are those of another session
    assert graphs[:6] == ["-1", "1", "-1", "1", "-1", "2"]


def test_a_batch_of_no_fixed_size_is_told_to_capture_nothing(bundle, sessions, cuda_on_the_cpu):
    replaying = Sessions(bundle, device="cuda", buckets=(4,), cuda_graphs=True)
    cuda_on_the_cpu.runs.clear()
    found = replaying.first_pass(random_images(5))
    np.testing.assert_allclose(found.codes, sessions.first_pass(random_images(5)).codes, atol=1e-6)
    assert [run.graph for run in cuda_on_the_cpu.runs] == ["-1"]


def test_answers_from_cuda_graphs_are_no_views_of_their_buffers(bundle, cuda_on_the_cpu):
    replaying = Sessions(bundle, device="cuda", buckets=(4,), cuda_graphs=True)
    found = replaying.first_pass(random_images(4)).codes
    kept = found.copy()
    replaying.first_pass(random_images(4, seed=1))
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("broken", ["start", "capture"])
def test_where_cuda_graphs_do_not_work_the_sessions_do_without_and_say_why(bundle, cuda_on_the_cpu, caplog, broken):
    cuda_on_the_cpu.broken = broken
    sessions = Sessions(bundle, device="auto", buckets=(4,), cuda_graphs=True)
    assert sessions.provider == CUDA
    assert not sessions.cuda_graphs
    assert cuda_on_the_cpu.built[-1]["enable_cuda_graph"] == "0"
    (told,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert told.startswith("no CUDA graphs are used: ")
    assert "not all nodes are on CUDA" in told or "not permitted when stream is capturing" in told


def test_cuda_graphs_that_are_asked_for_on_the_cpu_are_left_out_and_the_log_says_so(bundle, caplog):
    sessions = Sessions(bundle, device="cpu", cuda_graphs=True)
    assert sessions.provider == CPU
    assert not sessions.cuda_graphs
    assert "no CUDA graphs are used: the CPU was asked for" in caplog.messages
