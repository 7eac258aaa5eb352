"""What operators ask: /info, probes, /metrics."""

from __future__ import annotations

import signal

import pytest
from carso.api.answers import Info
from carso.bundle import Bundle
from carso.version import __version__

from tests.bundles import COLOUR, SMALL, shared_bundle
from tests.calls import BATCH, ENDLESS, VALUES, as_npy, as_png, sample, under_way
from tests.server import serving
from tests.waiting import comes_to, eventually

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
    counted = {
        'carso_requests_total{endpoint="/classify",status="200"}': 1,
        'carso_requests_total{endpoint="/classify/fast",status="200"}': 1,
        'carso_requests_total{endpoint="other",status="404"}': 1,
        'carso_request_duration_seconds_count{endpoint="/classify",status="200"}': 1,
        **{
            f'carso_stage_duration_seconds_count{{path="{path}",stage="{stage}"}}': 1
            for path, stages in {"fast": FIRST_STAGES, "robust": (*FIRST_STAGES, "vote")}.items()
            for stage in stages
        },
        "carso_first_pass_images_total": 4,
        "carso_votes_per_image_count": 3,
    }

    def difference() -> dict[str, float]:
        page = client.get("/metrics").text
        return {name: sample(page, name) - sample(before, name) for name in counted}

    comes_to(difference, counted)  # a request is counted when its answer is out
    after = client.get("/metrics").text
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


def test_probes_and_metrics_answer_beside_a_full_queue_and_the_end_of_work_is_counted(endless_client, endless_server):
    def shown(name: str) -> float:
        return sample(endless_client.get("/metrics").text, name)

    gone, cancelled = 'carso_cancellations_total{reason="client_gone"}', 'carso_votes_saved_total{reason="cancelled"}'
    before = {name: shown(name) for name in (gone, cancelled)}
    with under_way(endless_server):
        assert as_npy("/classify", endless_client, BATCH, **ENDLESS).status_code == 429
        for probe in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert endless_client.get(probe).status_code == 200
        assert as_png("/classify/fast", endless_client).status_code == 200
        assert shown('carso_queue_rows{path="robust"}') > 0
        # a fresh service has to work for a moment before it knows its pace
        eventually(lambda: shown('carso_estimated_wait_seconds{path="robust"}') > 0)
        assert shown('carso_in_flight_requests{path="robust"}') == 1  # so all of this was beside the work
    comes_to(lambda: shown(gone), before[gone] + 1)
    assert shown(cancelled) > before[cancelled]


def test_a_count_that_a_deadline_ends_is_counted(endless_client):
    name = 'carso_cancellations_total{reason="deadline"}'
    before = sample(endless_client.get("/metrics").text, name)
    as_npy("/classify", endless_client, BATCH, **ENDLESS, deadline_ms=50)
    comes_to(lambda: sample(endless_client.get("/metrics").text, name), before + 1)


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_stop_ends_with_exit_code_0(tmp_path, asked_by):
    with serving(shared_bundle(SMALL), tmp_path / "log") as server:
        server.process.send_signal(asked_by)
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()
