"""The servers that benchmarks start: they end with the benchmark, whatever ends it."""

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_benchmark_that_is_interrupted_leaves_no_server_running(number):
    command = [sys.executable, "-c", BENCHMARK, str(shared_bundle(SMALL))]
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
