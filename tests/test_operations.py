"""What operators ask: /info, probes, /metrics."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from carso.api.answers import Info
from carso.bundle import Bundle
from carso.version import __version__

from tests.bundles import COLOUR, SMALL, shared_bundle
from tests.calls import VALUES, as_npy, as_png, sample
from tests.server import serving

FIRST_STAGES = ("decode", "queue", "first_pass")


def test_info_shows_bundle_device_and_limits(client, strict_client):
    info = Info.model_validate_json(client.get("/info").content)
    assert info.version == __version__
    assert info.bundle.checksum == Bundle.load(shared_bundle(SMALL)).checksum
    assert info.bundle.input.shape == (1, 8, 8)
    assert (info.bundle.samples, info.risk) == (1500, 1e-3)
    assert (info.device.asked, info.device.provider) == ("cpu", "CPUExecutionProvider")
    assert (info.limits.max_images, info.limits.allow_seed) == (64, True)
    strict = Info.model_validate_json(strict_client.get("/info").content)
    assert strict.bundle.classes == tuple(str(index) for index in range(COLOUR.classifier.classes))
    assert (strict.limits.max_images, strict.limits.allow_seed, strict.risk) == (2, False, 0)


def test_the_probes_answer(client):
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_metrics_count_what_was_done(client):
    before = client.get("/metrics").text
    as_npy("/classify", client, VALUES, risk=0.1)
    as_png("/classify/fast", client)
    client.get("/no/such/path")
    after = client.get("/metrics").text
    for name, by in {
        'carso_requests_total{code="200",endpoint="/classify"}': 1,
        'carso_requests_total{code="200",endpoint="/classify/fast"}': 1,
        'carso_requests_total{code="404",endpoint="other"}': 1,
        'carso_request_duration_seconds_count{code="200",endpoint="/classify"}': 1,
        **{
            f'carso_stage_duration_seconds_count{{path="{path}",stage="{stage}"}}': 1
            for path, stages in {"fast": FIRST_STAGES, "robust": (*FIRST_STAGES, "vote")}.items()
            for stage in stages
        },
        "carso_first_pass_images_total": 4,
        "carso_votes_per_image_count": 3,
    }.items():
        assert sample(after, name) - sample(before, name) == by, name
    saved = sum(
        sample(after, name) - sample(before, name)
        for name in ('carso_votes_saved_total{reason="early_stop"}', 'carso_votes_saved_total{reason="deadline"}')
    )
    rows = sample(after, "carso_round_rows_sum") - sample(before, "carso_round_rows_sum")
    votes = sample(after, "carso_votes_per_image_sum") - sample(before, "carso_votes_per_image_sum")
    assert rows == votes == 3 * 1500 - saved > 0
    for family in ("carso_elections_total", "carso_path_agreement_total"):
        series = {line.rpartition(" ")[0] for line in after.splitlines() if line.startswith(family)}
        assert sum(sample(after, name) - sample(before, name) for name in series) == 3
    assert f'version="{__version__}"' in after


def test_probes_and_metrics_answer_beside_a_full_queue_and_the_end_of_work_is_counted(client, server):
    images = np.repeat(VALUES, 21, axis=0)
    endless = {"samples": 100_000, "risk": 0}

    def shown(name: str) -> float:
        return sample(client.get("/metrics").text, name)

    gone, cancelled = 'carso_cancellations_total{reason="client_gone"}', 'carso_votes_saved_total{reason="cancelled"}'
    before = {name: shown(name) for name in (gone, cancelled)}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=2) as impatient:
        pool.submit(as_npy, "/classify", impatient, images, **endless)
        while shown('carso_in_flight_requests{path="robust"}') == 0:
            time.sleep(0.01)
        assert as_npy("/classify", client, images, **endless).status_code == 429
        for probe in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
            began = time.monotonic()
            assert client.get(probe).status_code == 200
            assert time.monotonic() - began < 1
        assert as_png("/classify/fast", client).status_code == 200
        assert shown('carso_queue_rows{path="robust"}') > 0
        give_up = time.monotonic() + 1
        while not (wait := shown('carso_estimated_wait_seconds{path="robust"}')) and time.monotonic() < give_up:
            time.sleep(0.01)  # a fresh service has to work for a moment before it knows its pace
        assert wait > 0
    give_up = time.monotonic() + 10
    while shown('carso_queue_rows{path="robust"}') and time.monotonic() < give_up:
        time.sleep(0.05)
    assert shown(gone) == before[gone] + 1
    assert shown(cancelled) > before[cancelled]


def test_a_count_that_a_deadline_ends_is_counted(client):
    name = 'carso_cancellations_total{reason="deadline"}'
    before = sample(client.get("/metrics").text, name)
    as_npy("/classify", client, np.repeat(VALUES, 21, axis=0), samples=100_000, risk=0, deadline_ms=300)
    assert sample(client.get("/metrics").text, name) == before + 1


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_stop_ends_with_exit_code_0(tmp_path, asked_by):
    with serving(shared_bundle(SMALL), tmp_path / "log") as server:
        server.process.send_signal(asked_by)
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()
