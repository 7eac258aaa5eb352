"""What surrounds every request: its id, headers, the limit on its body, hanging up, the log."""

from __future__ import annotations

import time

import httpx
import pytest
from carso.app import build
from carso.images.reader import Reader
from carso.settings import Settings
from carso.telemetry.metrics import Metrics

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, as_png, logged, refused, sample, under_way
from tests.lifespan import started
from tests.waiting import comes_to, eventually


@pytest.mark.parametrize("given", ["abc-123", "A" * 128, "9f2545551c8df2285eebc280f7e4c295", "a:b.c_d"])
def test_a_request_id_is_echoed(client, given):
    response = client.post("/classify/fast", content=PNG, headers={"content-type": "image/png", "x-request-id": given})
    assert response.headers["x-request-id"] == response.json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "A" * 129, "with space", 'quo"te', "{}"])
def test_a_request_id_that_is_malformed_or_long_is_replaced(client, given):
    response = client.get("/livez", headers={"x-request-id": given})
    made = response.headers["x-request-id"]
    assert made != given
    assert len(made) == 32


def test_no_answer_is_to_be_sniffed_stored_or_framed(client):
    for response in (client.get("/info"), client.get("/nothing"), as_png("/classify/fast", client)):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert "server" not in response.headers


def test_a_compressed_body_is_refused(client):
    headers = {"content-type": "image/png", "content-encoding": "gzip"}
    message = refused(client.post("/classify", content=PNG, headers=headers), 415, "unsupported_media_type")
    assert "gzip" in message


def test_a_body_over_the_limit_is_refused_whether_its_length_is_stated_or_not(strict_client):
    body = b"x" * 20_001
    headers = {"content-type": "image/png"}
    stated = refused(strict_client.post("/classify", content=body, headers=headers), 413, "body_too_large")
    assert "20001" in stated and "20000" in stated
    chunks = (body[start : start + 1000] for start in range(0, len(body), 1000))
    refused(strict_client.post("/classify", content=chunks, headers=headers), 413, "body_too_large")


def test_a_stated_length_over_the_limit_is_refused_before_any_of_the_body_is_sent(strict_server):
    with strict_server.connect() as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_the_work_for_a_client_that_hangs_up_is_dropped(endless_server):
    def shown(name: str) -> float:
        return sample(endless_server.metrics(), name)

    gone, rounds = 'carso_requests_total{endpoint="/classify",status="499"}', "carso_rounds_total"
    before = {name: shown(name) for name in (gone, rounds)}
    with under_way(endless_server):
        eventually(lambda: shown(rounds) > before[rounds])
    comes_to(lambda: shown(gone), before[gone] + 1)
    done = shown(rounds)
    time.sleep(0.3)  # in which there would be some more
    assert shown(rounds) == done


def test_a_client_that_hangs_up_before_its_body_is_complete_disturbs_nothing(client, server):
    with server.connect() as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nxx"
        )
    assert as_png("/classify", client).status_code == 200


def test_every_request_has_one_line_of_json_in_the_log(client, server):
    response = client.post(
        "/classify?samples=9", content=PNG, headers={"content-type": "image/png", "x-request-id": "find-me"}
    )
    (line,) = logged(server, "find-me")
    assert (line["endpoint"], line["status"], line["images"]) == ("/classify", 200, 1)
    (prediction,) = response.json()["predictions"]
    assert (line["votes"], line["labels"]) == (prediction["votes"], [prediction["label"]])
    assert line["agree"] == int(prediction["agree"])
    assert line["timings"] == response.json()["timings"]
    assert "trace_id" not in line


def test_probes_are_not_logged_and_a_trace_is_named(client, server):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    for path, parent in (
        ("/livez", f"00-{trace}-00f067aa0ba902b7-01"),
        ("/info", f"00-{trace}-00f067aa0ba902b7-01"),
        ("/info", f"00-{trace}-0000000000000000-01"),
        ("/info", "nonsense"),
    ):
        client.get(path, headers={"traceparent": parent, "x-request-id": "traced"})
    traced = logged(server, "traced", lines=3)
    assert [line["endpoint"] for line in traced] == ["/info"] * 3
    assert [line.get("trace_id") for line in traced] == [trace, None, None]


@pytest.mark.parametrize(
    ("kind", "part", "method", "path"),
    [(Reader, "read", "POST", "/classify/fast"), (Metrics, "page", "GET", "/metrics")],
    ids=["an endpoint called directly", "an endpoint of FastAPI"],
)
async def test_a_fault_is_answered_as_any_error_and_logged_once(monkeypatch, caplog, kind, part, method, path):
    def fails(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(kind, part, fails)
    app = build(Settings(bundle=shared_bundle(SMALL), device="cpu", threads=1, canary_s=0)).app
    async with (
        started(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://carso") as client,
    ):
        answer = await client.request(method, path, content=PNG)
    assert "secret" not in refused(answer, 500, "internal_error")
    failed = [record for record in caplog.records if record.message == "request failed"]
    assert [record.fields["request_id"] for record in failed] == [answer.headers["x-request-id"]]
