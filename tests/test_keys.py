"""API keys."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from carso import Client, RequestRefused
from carso.errors import Overloaded, Unauthorized
from carso.http import keys
from carso.http.keys import SAVED_UP, ApiKeys, BadKeys, Caller

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, VALUES, as_npy, as_png, logged, refused, sample
from tests.server import serving
from tests.test_settings import start
from tests.waiting import PATIENCE, comes_to, eventually

OLD, NEW = "old-key-0123456789", "bmV3/key+0123456789=="


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of the gateway\ngateway: {OLD}\n\n  gateway:{NEW}  \n")
    return path


def test_with_keys_only_probes_metrics_and_the_documentation_are_open(tmp_path, keys_file):
    log = tmp_path / "log"
    with serving(shared_bundle(SMALL), log, api_keys_file=keys_file) as server, server.client() as client:
        for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/info", "/v2", "/no/such/path"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        refused(as_png("/classify", client), 401, "unauthorized")
        for key in (OLD, NEW):
            client.headers["authorization"] = f"Bearer {key}"
            assert as_png("/classify", client).status_code == 200
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
        assert document["paths"]["/classify"]["post"]["security"] == [{"key": []}]
        assert "security" not in document["paths"]["/livez"]["get"]
        client.headers["authorization"] = f"Bearer {OLD}x"
        assert OLD not in refused(as_png("/classify", client), 401, "unauthorized")
        comes_to(lambda: sample(server.metrics(), 'carso_rejections_total{reason="unauthorized"}'), 5)
    assert not any(key in log.read_text() for key in (OLD, NEW))


def test_the_client_sends_its_key_and_understands_answers_without_evidence(tmp_path, keys_file):
    settings = {"api_keys_file": keys_file, "evidence": "label"}
    with serving(shared_bundle(SMALL), tmp_path / "log", **settings) as server:
        with Client(server.url, api_key=NEW) as client:
            (prediction,) = client.classify(PNG).predictions
            assert (prediction.complete, prediction.tally) == (True, None)
            (prediction,) = client.classify_fast(PNG).predictions
            assert prediction.probabilities is None
            assert client.info().limits.allow_seed
        with Client(server.url, api_key="another-key-of-nobody") as client, pytest.raises(RequestRefused) as refusal:
            client.classify(PNG)
        assert (refusal.value.status, refusal.value.error) == (401, "unauthorized")


def test_a_refused_body_is_not_read(tmp_path, keys_file):
    """The answer comes while the body is still on its way, as it never is complete."""
    log = tmp_path / "log"
    with serving(shared_bundle(SMALL), log, api_keys_file=keys_file) as server, server.connect() as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nx")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "header", [b"", OLD.encode(), b"Basic " + OLD.encode(), b"Bearer ", b"Bearer \xff", b"Bearer " + b"x" * 2000]
)
def test_a_header_that_is_no_bearer_token_is_refused(keys_file, header):
    with pytest.raises(Unauthorized):
        ApiKeys(keys_file).check(header)


def test_the_scheme_is_read_in_any_case(keys_file):
    ApiKeys(keys_file).check(b"bearer " + NEW.encode())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds no key"),
        (b"# nothing\n", "holds no key"),
        (b"a: short\n", "line 1"),
        (b"a b: " + OLD.encode() + b"\n", "line 1"),
        (b"a: " + OLD.encode() + b"\nb: with spaces in the key\n", "line 2"),
        (b"a: " + OLD.encode() + b"\nb: " + OLD.encode() + b"\n", "line 2"),
        (b"a: " + OLD.encode() + b" rate=0\n", "line 1"),
        (b"a: " + OLD.encode() + b" rate=many\n", "line 1"),
        (b"a: " + OLD.encode() + b" rate=5\na: " + NEW.encode() + b"\n", "line 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_showing_it(tmp_path, content, part):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(BadKeys, match=part) as refusal:
        ApiKeys(path)
    assert "spaces in" not in str(refusal.value)


def test_a_missing_file_stops_the_start(tmp_path):
    ended = start(bundle=shared_bundle(SMALL), device="cpu", api_keys_file=tmp_path / "none")
    assert ended.returncode == 2
    assert "CARSO_API_KEYS_FILE" in ended.stderr
    assert "none cannot be read" in ended.stderr


def test_a_key_has_a_name_in_the_log_and_in_the_metrics(tmp_path, keys_file):
    log = tmp_path / "log"
    with serving(shared_bundle(SMALL), log, api_keys_file=keys_file) as server, server.client() as client:
        client.headers.update({"authorization": f"Bearer {NEW}", "x-request-id": "find-me"})
        votes = as_png("/classify", client).json()["predictions"][0]["votes"]
        (line,) = logged(server, "find-me")
        assert line["caller"] == "gateway"
        as_png("/classify/fast", client)
        client.headers["authorization"] = "Bearer nobody-0123456789"
        as_png("/classify", client)
        comes_to(lambda: sample(server.metrics(), 'carso_caller_requests_total{caller="gateway",status="200"}'), 2)
        assert sample(server.metrics(), 'carso_caller_rows_total{caller="gateway"}') == 1 + votes + 1
        assert server.metrics().count("carso_caller_requests_total{") == 1


def test_a_caller_of_a_rate_gets_no_more_rows_and_nobody_else_notices(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"slow: {OLD} rate=1\nfree: {NEW}\n")
    log = tmp_path / "log"
    with serving(shared_bundle(SMALL), log, api_keys_file=path) as server, server.client() as client:
        client.headers["authorization"] = f"Bearer {OLD}"
        assert as_npy("/classify", client, VALUES, samples=1500, risk=0).status_code == 200  # more than it has saved up
        for path in ("/classify", "/classify/fast"):
            refusal = as_png(path, client)
            assert "slow" in refused(refusal, 429, "overloaded")
            assert int(refusal.headers["retry-after"]) > 100  # hundreds of votes, at one a second
        assert client.get("/info").status_code == 200
        client.headers["authorization"] = f"Bearer {NEW}"
        assert as_png("/classify", client).status_code == 200


def test_rows_are_saved_up_and_come_back_at_the_rate(monkeypatch):
    now = 0.0
    monkeypatch.setattr(keys, "monotonic", lambda: now)
    caller = Caller("a", 10)
    caller.check()
    caller.take(150)
    with pytest.raises(Overloaded) as refusal:
        caller.check()
    assert refusal.value.retry_after == 5
    now = 5.1
    caller.check()
    now = 1000.0
    caller.check()
    caller.take(int(10 * SAVED_UP))
    with pytest.raises(Overloaded):
        caller.check()
    caller.settle(-1)
    caller.check()


def test_a_signal_reads_the_keys_again_and_drops_no_request(tmp_path, keys_file):
    log = tmp_path / "log"
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000}
    with (
        serving(shared_bundle(SMALL), log, per_second=20_000, api_keys_file=keys_file, **limits) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.headers["authorization"] = f"Bearer {OLD}"
        waiting = pool.submit(as_npy, "/classify", client, VALUES[:1], samples=20_000, risk=0)
        comes_to(lambda: sample(server.metrics(), 'carso_in_flight_requests{path="robust"}'), 1)
        keys_file.write_text(f"another: {'n' * 20} rate=7\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "keys were read again" in log.read_text())
        assert waiting.result(PATIENCE).status_code == 200  # which was let in
        refused(as_png("/classify", client), 401, "unauthorized")
        client.headers["authorization"] = f"Bearer {'n' * 20}"
        assert as_png("/classify/fast", client).status_code == 200
        keys_file.write_text("nonsense\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "keys stay as they were" in log.read_text())
        assert as_png("/classify/fast", client).status_code == 200


def test_keys_without_a_name_are_those_of_one_caller(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{OLD}\n{NEW}\n")
    known = ApiKeys(path)
    assert known.check(b"Bearer " + OLD.encode()) is known.check(b"Bearer " + NEW.encode())
    assert known.check(b"Bearer " + OLD.encode()).name == "unnamed"


def test_what_a_caller_has_used_up_survives_a_reload(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"a: {OLD} rate=1\n")
    known = ApiKeys(path)
    known.check(b"Bearer " + OLD.encode()).take(1000)
    path.write_text(f"a: {NEW} rate=2\n")
    known.reload()
    with pytest.raises(Overloaded):
        known.check(b"Bearer " + NEW.encode()).check()


def test_the_signal_does_not_end_a_service_without_keys(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, server.client() as client:
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "this service has none" in server.log.read_text())
        assert client.get("/readyz").status_code == 200
