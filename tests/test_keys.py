"""API keys."""

from __future__ import annotations

import pytest
from carso import Client, RequestRefused
from carso.errors import Unauthorized
from carso.http.keys import ApiKeys, BadKeys

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, as_png, refused, sample
from tests.server import serving
from tests.test_settings import start
from tests.waiting import comes_to

OLD, NEW = "old-key-0123456789", "bmV3/key+0123456789=="


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of the gateway\n{OLD}\n\n  {NEW}  \n")
    return path


def test_with_keys_only_probes_and_metrics_are_open(tmp_path, keys_file):
    log = tmp_path / "log"
    with serving(shared_bundle(SMALL), log, api_keys_file=keys_file) as server, server.client() as client:
        for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        for path in ("/info", "/docs", "/openapi.json", "/v2", "/no/such/path"):
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
        comes_to(lambda: sample(server.metrics(), 'carso_rejections_total{reason="unauthorized"}'), 7)
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
        ApiKeys.read(keys_file).check(header)


def test_the_scheme_is_read_in_any_case(keys_file):
    ApiKeys.read(keys_file).check(b"bearer " + NEW.encode())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds no key"),
        (b"# nothing\n", "holds no key"),
        (b"short\n", "line 1"),
        (OLD.encode() + b"\nwith spaces in the key\n", "line 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_showing_it(tmp_path, content, part):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(BadKeys, match=part) as refusal:
        ApiKeys.read(path)
    assert "spaces in" not in str(refusal.value)


def test_a_missing_file_stops_the_start(tmp_path):
    ended = start(bundle=shared_bundle(SMALL), device="cpu", api_keys_file=tmp_path / "none")
    assert ended.returncode == 2
    assert "CARSO_API_KEYS_FILE" in ended.stderr
    assert "none cannot be read" in ended.stderr
