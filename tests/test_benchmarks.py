"""The servers that benchmarks and tests start: they end with them, whatever ends them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import SMALL, shared_bundle
from tests.server import environment

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
