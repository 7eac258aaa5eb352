"""HTTP at its edges: HEAD, slashes, a prefix, browsers of other origins; no file descriptor left; the log."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, as_png, logged, refused, sample
from tests.server import environment, serving
from tests.waiting import PATIENCE, comes_to, eventually

KEY = "a-key-for-the-tests"


@pytest.mark.parametrize(
    "path",
    [
        "/info",
        "/livez",
        "/readyz",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v2",
        "/v2/health/ready",
        "/v2/models/random",
    ],
)
def test_head_is_answered_wherever_get_is_and_without_a_body(client, path):
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))


def test_head_elsewhere_is_refused_as_get_is_and_logged_by_its_name(client, server):
    for path, status in (("/classify", 405), ("/nothing", 404)):
        answer = client.head(path, headers={"x-request-id": f"head-of-{path[1:]}"})
        assert (answer.status_code, answer.content) == (status, b"")
        (line,) = logged(server, f"head-of-{path[1:]}")
        assert (line["method"], line["status"]) == ("HEAD", status)
    assert client.put("/info").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/classify/", "/info/", "/docs/", "/v2/"])
def test_a_slash_too_many_is_no_redirect(client, path):
    answer = client.get(path, headers={"host": "elsewhere.example"})
    assert answer.status_code == 404
    assert "elsewhere" not in f"{answer.headers} {answer.text}"


def test_below_a_prefix_every_path_is_served_whether_or_not_the_proxy_cuts_it_off(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"tests: {KEY}\n")
    settings = {"root_path": "/vision/carso", "api_keys_file": keys}
    with serving(shared_bundle(SMALL), tmp_path / "log", **settings) as server, server.client() as client:
        for prefix in ("", "/vision/carso"):
            assert client.get(f"{prefix}/livez").status_code == 200  # which needs no key
            refused(client.get(f"{prefix}/info"), 401, "unauthorized")
        client.headers["authorization"] = f"Bearer {KEY}"
        for prefix in ("", "/vision/carso"):
            assert as_png(f"{prefix}/classify", client).status_code == 200
            assert "invalid_tensor: " in client.post(f"{prefix}/v2/models/random/infer", json={}).json()["error"]
            document = client.get(f"{prefix}/openapi.json").json()
            assert document["servers"] == [{"url": "/vision/carso"}]
        for path in ("/vision/info", "/vision/carsoinfo", "/vision/carso/vision/carso/info", "/carso/info"):
            assert client.get(path).status_code == 404
        comes_to(lambda: sample(server.metrics(), 'carso_requests_total{endpoint="/classify",status="200"}'), 2)


@pytest.mark.parametrize("prefix", ["carso", "/carso/", "/a//b", "/a b", "http://a.example/"])
def test_a_prefix_that_is_none_stops_the_start(monkeypatch, prefix):
    from carso.settings import Settings, SettingsError

    monkeypatch.setenv("CARSO_ROOT_PATH", prefix)
    with pytest.raises(SettingsError, match="CARSO_ROOT_PATH"):
        Settings.read()


def test_scripts_of_other_origins_may_call_only_if_the_operator_lets_them(tmp_path, client):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization, content-type"
    assert "access-control-allow-origin" not in client.options("/classify", headers=asked).headers
    keys = tmp_path / "keys"
    keys.write_text(f"tests: {KEY}\n")
    settings = {"cors_origins": "https://a.example,https://b.example:8443", "api_keys_file": keys}
    with serving(shared_bundle(SMALL), tmp_path / "log", **settings) as server, server.client() as allowing:
        preflight = allowing.options("/classify", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        for key, status in ((KEY, 200), ("another-key-of-nobody", 401)):
            allowing.headers["authorization"] = f"Bearer {key}"
            answer = allowing.post(
                "/classify", content=PNG, headers={"content-type": "image/png", "origin": "https://b.example:8443"}
            )
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://b.example:8443"
            assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        other = allowing.options("/classify", headers=asked | {"origin": "https://c.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origins", ["a.example", "https://a.example/", "https://a.example, https://b.example"])
def test_what_is_no_list_of_origins_stops_the_start(monkeypatch, origins):
    from carso.settings import Settings, SettingsError

    monkeypatch.setenv("CARSO_CORS_ORIGINS", origins)
    with pytest.raises(SettingsError, match="CARSO_CORS_ORIGINS"):
        Settings.read()


def test_a_process_without_file_descriptors_says_so_once_and_goes_on_when_it_has_some(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log") as server:
        limit = len(os.listdir(f"/proc/{server.process.pid}/fd")) + 20  # noqa: PTH208
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with ExitStack() as held:
            for _ in range(40):
                with suppress(OSError):
                    held.enter_context(server.connect())
            eventually(lambda: "no file descriptor is left" in server.log.read_text())
        with server.client() as client:

            def goes_on() -> bool:
                with suppress(httpx.TransportError):
                    return client.get("/livez").status_code == 200
                return False

            eventually(goes_on)
    (line,) = (line for line in server.log.read_text().splitlines() if "no file descriptor" in line)
    assert json.loads(line)["level"] == "error"
    assert "ulimit -n" in line


def test_the_log_is_text_on_a_terminal_and_json_elsewhere(tmp_path):
    missing = tmp_path / "none"
    for form, as_text in (("auto", True), ("json", False), ("text", True)):
        ours, theirs = pty.openpty()
        variables = environment(bundle=missing, log_format=form, prot=1)
        with subprocess.Popen(
            [sys.executable, "-m", "carso.command", "serve"], env=variables, stderr=theirs
        ) as process:
            assert process.wait(PATIENCE) == 1
        os.close(theirs)
        told = b""
        with suppress(OSError):  # the end of a terminal
            while received := os.read(ours, 65536):
                told += received
        os.close(ours)
        first = told.decode().splitlines()[0]
        assert "CARSO_PROT is in the environment" in first
        assert first.startswith("{") != as_text


def test_a_line_of_text_has_what_a_line_of_json_has(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", log_format="text") as server, server.client() as client:
        client.headers["x-request-id"] = "find-me"
        assert as_png("/classify", client, samples=9).status_code == 200

        def line() -> str:
            return next((line for line in server.log.read_text().splitlines() if "request_id=find-me" in line), "")

        found = eventually(line)
        assert " info    request " in found
        assert all(part in found for part in ("method=POST", "endpoint=/classify", "status=200", "images=1", "agree="))
