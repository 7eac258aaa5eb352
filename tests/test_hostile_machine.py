"""What a machine may do to the service: a full disk, a clock that jumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.calls import as_png, sample
from tests.server import Server, serving
from tests.waiting import comes_to, eventually


def test_nothing_is_written_but_the_log_and_that_may_fail(tmp_path, monkeypatch):
    """Standard error on a full disk, and not one folder that may be written to."""
    bundle = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    with (
        serving(bundle, Path("/dev/full"), tmpdir="/proc/none", home="/proc/none") as server,
        server.client() as client,
    ):
        for path in ("/classify", "/classify/fast"):
            assert as_png(path, client).status_code == 200
        large = client.post("/classify", files=[("file", (str(i), b"x" * 100_000, "image/png")) for i in range(9)])
        assert large.status_code == 400
        assert client.get("/readyz").status_code == 200


def test_the_runtime_below_reports_nothing(tmp_path, monkeypatch):
    """Where ONNX Runtime sends usage data, it first writes an identifier of the machine into the home folder."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):  # it is silent there anyway
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, server.client() as client:
        assert as_png("/classify", client).status_code == 200
    assert list(home.rglob("*")) == []


def faketime() -> Path | None:
    return next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


def years(server: Server) -> set[str]:
    """In which the lines of the log were written."""
    return {line.partition('"time":"')[2][:4] for line in server.log.read_text().splitlines() if '"time"' in line}


@pytest.mark.skipif(faketime() is None, reason="needs Debian's faketime")
@pytest.mark.parametrize("jump", ["+400d", "-400d"])
def test_a_clock_that_jumps_disturbs_neither_answers_nor_measurements(tmp_path, monkeypatch, jump):
    """The wall clock jumps by more than a year while requests are served; deadlines and durations do not notice."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    for name, value in {
        "LD_PRELOAD": str(faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, server.client() as client:
        assert as_png("/classify", client).status_code == 200
        clock.write_text(jump)
        answers = [as_png("/classify", client, deadline_ms=600_000) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5
        assert all(answer.json()["predictions"][0]["complete"] for answer in answers)
        assert all(0 <= answer.json()["timings"]["total_ms"] < 86_400_000 for answer in answers)
        assert client.get("/livez").status_code == 200
        name = 'carso_request_duration_seconds_{}{{endpoint="/classify",status="200"}}'
        comes_to(lambda: sample(server.metrics(), name.format("count")), 6)
        assert 0 < sample(server.metrics(), name.format("sum")) < 86_400  # a day, where the clock jumps by 400
        eventually(lambda: len(years(server)) > 1)  # so the clock did jump
