"""What computes gives way to the event loop."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from carso.inference.processors import LESS, give_way

from tests.bundles import SMALL, shared_bundle
from tests.calls import as_png
from tests.server import serving


def test_the_engine_and_the_threads_of_onnx_runtime_are_nicer_than_the_event_loop(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", threads=3) as server, server.client() as client:
        assert as_png("/classify", client).status_code == 200
        main = server.process.pid
        nicer = [
            os.getpriority(os.PRIO_PROCESS, int(task.name)) - os.getpriority(os.PRIO_PROCESS, main)
            for task in Path(f"/proc/{main}/task").iterdir()
        ]
    assert nicer.count(LESS) >= 3  # the engine, and two that help it
    assert 0 in nicer


def test_a_thread_that_is_as_nice_as_can_be_stays_so():
    def priority() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        give_way()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(priority).result() == 19
