"""Benchmarks: their servers, and those of tests, end with them; and that of a GPU is rehearsed on the CPU."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import benchmarks.servers
from benchmarks import gpu
from benchmarks.device_steps import Rig, StepError, answers, growing, steps
from benchmarks.memory import growth
from tests.bundles import SMALL, shared_bundle
from tests.server import Server, environment

ROOT = Path(__file__).parents[1]
BENCHMARK = """
import sys, time
from pathlib import Path
from benchmarks.servers import carso
with carso(Path(sys.argv[1]), CARSO_THREADS="1") as server:
    print(server.pid, flush=True)
    time.sleep(1e6)
"""
TEST = """
import sys, time
from pathlib import Path
from tests.server import serving
with serving(Path(sys.argv[1]), Path(sys.argv[2])) as server:
    print(server.process.pid, flush=True)
    time.sleep(1e6)
"""


@pytest.mark.parametrize(
    ("program", "number"),
    [(BENCHMARK, signal.SIGINT), (BENCHMARK, signal.SIGTERM), (BENCHMARK, signal.SIGKILL), (TEST, signal.SIGKILL)],
    ids=["benchmark-SIGINT", "benchmark-SIGTERM", "benchmark-SIGKILL", "test-SIGKILL"],
)
def test_a_benchmark_or_test_that_is_interrupted_leaves_no_server_running(program, number, tmp_path):
    command = [sys.executable, "-c", program, str(shared_bundle(SMALL)), str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as benchmark:
        pid = int(benchmark.stdout.readline())
        server = os.pidfd_open(pid)
        benchmark.send_signal(number)
        benchmark.wait()
    try:
        wait_for_the_end(server)
    finally:
        os.close(server)


def wait_for_the_end(process: int) -> None:
    """Wait for a process that is not a child, by its descriptor. Fails after two minutes."""
    ended, _, _ = select.select([process], [], [], 120)
    assert ended


NAMES = ("start float32", "start int8", "votes", "votes by PyTorch", "pipeline int8")


@pytest.fixture
def rig() -> Rig:
    return Rig(
        folder=shared_bundle(SMALL),
        device="cpu",
        seconds=0.01,
        leak_seconds=0.2,
        rows=(16, 40),
        images=2,
        connections=(1, 3),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_benchmark_of_a_gpu_can_be_rehearsed_on_the_cpu(rig, name):
    figures = steps(rig)[name](rig)
    assert figures
    assert all(figures.values())


def test_a_service_is_asked_for_single_images_and_for_batches_on_both_paths(rig, server):
    figures = answers(rig, benchmarked(server))
    assert {(name, size) for name in ("fast", "robust") for size in ("1", "3")} <= {
        tuple(row.removesuffix(" at a time").split(", ")) for row in figures
    }
    assert figures["robust, 8 at a time, batches of 64"]["p50, ms"] > 0
    assert figures["after these loads"]["host, MB"] > 10


def test_the_growth_of_a_services_memory_is_watched_under_load(rig, server):
    figures = growing(rig, benchmarked(server))
    assert figures["host"]["MB first"] > 10
    assert figures["load"]["p50, ms"] > 0


def benchmarked(server: Server) -> benchmarks.servers.Server:
    return benchmarks.servers.Server(httpx.URL(server.url).port, server.process.pid)


def test_a_step_that_fails_is_told_with_the_reason_of_its_own_process(rig, tmp_path):
    nowhere = replace(rig, folder=tmp_path / "none")
    with pytest.raises(StepError, match=r"BundleError: (.|\n)*none(.|\n)*exit status 1"):
        gpu.in_a_process("start float32", nowhere, limit=120)


def test_a_step_that_hangs_is_ended_when_the_time_is_over(rig):
    with pytest.raises(StepError, match="not done after 0 s"):
        gpu.in_a_process("leak", rig, limit=0.1)


def test_steps_for_which_no_time_is_left_are_told_by_name(rig):
    found, failed, _ = gpu.run_all(rig, limit=0)
    assert not found
    assert failed == dict.fromkeys(steps(rig), "it was not run, because no time was left")


def test_the_growth_of_memory_is_the_slope_of_a_line_through_all_looks():
    assert growth([100, 130, 160], [50, 51, 52]) == pytest.approx(2)  # MB a minute
    assert growth([0, 1, 2, 3], [7, 7, 7, 7]) == pytest.approx(0)
