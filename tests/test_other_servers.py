"""The application under other ASGI servers than our own: uvicorn's command, and gunicorn's workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG
from tests.server import environment
from tests.waiting import PATIENCE, PAUSE

NOT_OURS = "this server is not `carso serve`"
UVICORN = ("uvicorn", "--factory", "carso.app:create_app", "--port", "0")
GUNICORN = (
    "gunicorn",
    "carso.app:create_app()",
    "--worker-class",
    "uvicorn_worker.UvicornWorker",
    "--bind",
    "127.0.0.1:0",
)


@contextmanager
def started(log: Path, *command: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m command` in a process group that is ended with the block."""
    settings = {"bundle": shared_bundle(SMALL), "device": "cpu", "threads": 2} | settings
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment(**settings),
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait for the address that a server logs, and for its readiness."""
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(PAUSE)
    url = found[0]
    while True:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/readyz", timeout=PATIENCE).status_code == 200:
                return url
        except httpx.TransportError:
            time.sleep(PAUSE)


@pytest.mark.parametrize(
    "command", [UVICORN, GUNICORN, (*GUNICORN, "--workers", "2")], ids=["uvicorn", "gunicorn", "two"]
)
def test_another_server_classifies_says_what_it_lacks_and_stops(tmp_path, command):
    log = tmp_path / "log"
    with started(log, *command) as process:
        url = address(log, process)
        for path in ("/classify", "/classify/fast"):
            answer = httpx.post(f"{url}{path}", content=PNG, headers={"content-type": "image/png"}, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
        process.terminate()
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)  # uvicorn's command raises the signal once more
    assert NOT_OURS in log.read_text()


def test_settings_of_the_environment_hold_under_another_server(tmp_path):
    log = tmp_path / "log"
    with started(log, *UVICORN, evidence="label") as process:
        limits = httpx.get(f"{address(log, process)}/info", timeout=PATIENCE).json()["limits"]
    assert limits["evidence"] == "label"


@pytest.mark.parametrize("command", [UVICORN, GUNICORN], ids=["uvicorn", "gunicorn"])
def test_a_bad_setting_ends_another_server_with_the_same_message(tmp_path, command):
    log = tmp_path / "log"
    with started(log, *command, risk=2) as process:
        assert process.wait(PATIENCE) != 0
    assert "CARSO_RISK: '2' is not allowed" in log.read_text()


def test_an_application_that_was_built_before_a_fork_is_refused_and_does_not_hang(tmp_path):
    log = tmp_path / "log"
    with started(log, *GUNICORN, "--preload") as process:
        assert process.wait(PATIENCE) != 0
    assert "forked after the application was built" in log.read_text()
    assert "without --preload" in log.read_text()
