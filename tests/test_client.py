"""The Python client, sync and async, against the real service, and against servers that refuse, break off and hang."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Self

import httpx
import numpy as np
import pytest
from carso import (
    AsyncClient,
    CarsoError,
    Client,
    DeadlineExceeded,
    RequestRefused,
    Unavailable,
    UnexpectedAnswer,
    UnusableVariable,
)
from carso.api import answers
from carso.client import results
from carso.client.call import GRACE
from carso.client.connections import route_to
from PIL import Image

from tests.bundles import SMALL, shared_bundle
from tests.calls import BATCH, COLOUR_PNG, ENDLESS, FEW, PIXELS, PNG, VALUES, in_flight, sample
from tests.pictures import encoded
from tests.scripted import DRIP, LABEL_ONLY, Reply, refusal, scripted
from tests.server import serving, silent_port, url_of
from tests.socks import HOST_UNREACHABLE, socks_proxy
from tests.waiting import PATIENCE, comes_to

Calls = Callable[..., Any]


class Awaited:
    """An AsyncClient whose methods return what they would be awaited for, as Client's do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._client = AsyncClient(*args, **options)
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Calls:
        method = getattr(self._client, name)
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def __enter__(self) -> Self:
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.__aexit__(*error))
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def connect(request) -> Callable[..., Any]:
    """Either client's class."""
    return request.param


@pytest.fixture
def carso(connect, server) -> Iterator[Any]:
    """Either client, of the real service."""
    with connect(server.url) as connected:
        yield connected


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    proxies = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]
    ours = ["CARSO_URL", "CARSO_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR"]
    for name in (*ours, *proxies, *map(str.upper, proxies)):
        monkeypatch.delenv(name, raising=False)


def test_both_clients_have_the_same_methods():
    def interface(kind: type) -> dict[str, str]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: str(inspect.signature(method).replace(return_annotation=None))
            for name, method in methods
            if not name.startswith("_")
        }

    # but for frames, which an asynchronous iterable may give too
    more = "AsyncIterable[Frame | Image | Any] | "
    assert interface(Client) == {name: found.replace(more, "") for name, found in interface(AsyncClient).items()}
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


# what is sent, and what comes back


def test_every_way_to_give_images_gets_the_services_answer(carso, client, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    npy = tmp_path / "image.npy"
    np.save(npy, PIXELS)
    options = {"seed": 5, "samples": 800, "risk": 1e-2}
    expected = [client.post("/classify", content=encoded(image), params=options, headers={"content-type": "image/png"})
                .json()["predictions"][0] for image in PIXELS]  # fmt: skip
    files = [encoded(PIXELS[0]), encoded(PIXELS[1], "BMP"), encoded(PIXELS[2], "WEBP", lossless=True)]
    for images, count in [
        (path, 1),
        (str(path), 1),
        (PNG, 1),
        ([path], 1),
        ((path, files[1], files[2]), 3),
        (files[:2], 2),
        (PIXELS, 3),
        (PIXELS[0], 1),
        (VALUES, 3),
        (VALUES.astype(np.float64), 3),
        (npy, 3),
        (bytearray(PNG), 1),
        (memoryview(PNG), 1),
        ([bytearray(file) for file in files], 3),
        (Image.fromarray(PIXELS[0]), 1),
        ([Image.fromarray(image) for image in PIXELS], 3),
        (Image.open(io.BytesIO(PNG)), 1),
    ]:
        result = carso.classify(images, **options)
        assert [p.model_dump(mode="json", exclude_unset=True) for p in result.predictions] == expected[:count]


def test_the_fast_path_gives_probabilities(carso, client):
    answer = client.post("/classify/fast", content=PNG, headers={"content-type": "image/png"}).json()
    result = carso.classify_fast(PNG)
    assert [p.model_dump(mode="json", exclude_unset=True) for p in result.predictions] == answer["predictions"]
    assert result.bundle.model_dump() == answer["bundle"]
    assert result.provider == answer["provider"]
    assert 0 < result.timings.first_pass_ms < result.timings.total_ms


def test_images_of_another_size_are_scaled_if_asked(carso):
    large = encoded(np.arange(400, dtype=np.uint8).reshape(20, 20))
    assert carso.classify(large, resize=True).predictions
    assert carso.classify_fast(large, resize=True).predictions
    with pytest.raises(RequestRefused, match="wrong_shape"):
        carso.classify_fast(large)


@pytest.mark.parametrize(
    ("images", "content_type"),
    [
        (encoded(PIXELS[0]), "image/png"),
        (encoded(PIXELS[0], "JPEG"), "image/jpeg"),
        (encoded(PIXELS[0], "WEBP"), "image/webp"),
        (encoded(PIXELS[0], "BMP"), "image/bmp"),
        (PIXELS, "application/x-npy"),
    ],
)
def test_one_image_and_arrays_are_sent_without_a_form(connect, images, content_type):
    with scripted(LABEL_ONLY) as server, connect(server.url) as client:
        client.classify(images)
    (request,) = server.received
    assert request.headers["content-type"] == content_type
    assert len(request.body) < (len(images) if isinstance(images, bytes) else images.nbytes + 200) + 1


def test_what_is_not_an_image_is_refused_before_anything_is_sent(carso, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        carso.classify([])
    with pytest.raises(TypeError, match=r"numpy\.stack"):
        carso.classify([PIXELS[0]])
    with pytest.raises(TypeError, match="path, bytes, an array"):
        carso.classify(3)
    with pytest.raises(TypeError, match="mode F"):
        carso.classify(Image.fromarray(VALUES[0, 0]))
    with pytest.raises(FileNotFoundError):
        carso.classify(tmp_path / "none.png")
    with pytest.raises(ValueError, match="pickle"):
        carso.classify(np.array([None]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"])
def test_an_image_of_pillows_is_sent_as_png_that_shows_the_same(connect, mode):
    image = Image.new(mode, (3, 2))
    with scripted(LABEL_ONLY) as server, connect(server.url) as client:
        client.classify(image)
    with Image.open(io.BytesIO(server.received[0].body)) as sent:
        assert sent.format == "PNG"
        assert np.array_equal(np.asarray(sent.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_an_image_of_pillows_keeps_its_orientation_and_no_other_trace_of_its_origin(connect, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "taken at home"
    path = tmp_path / "photo.jpg"
    Image.fromarray(PIXELS[0]).save(path, exif=exif)
    with scripted(LABEL_ONLY) as server, connect(server.url) as client, Image.open(path) as photo:
        client.classify(photo)
    with Image.open(io.BytesIO(server.received[0].body)) as sent:
        assert dict(sent.getexif()) == {0x0112: 6}


def test_options_that_are_not_given_are_not_sent(connect):
    with scripted(LABEL_ONLY) as server, connect(server.url) as client:
        client.classify(PNG)
        client.classify(PNG, samples=5, risk=0, seed=0, resize=True)
    first, second = server.received
    assert first.query == {}
    assert second.query == {"samples": "5", "risk": "0", "seed": "0", "resize": "true"}


def test_info_and_probes(carso, client):
    info = carso.info()
    assert info.model_dump(mode="json", exclude_unset=True) == client.get("/info").json()
    assert info.bundle.input.shape == (1, 8, 8)
    assert carso.ready() is True
    assert carso.live() is True


def test_probes_say_no_where_nobody_answers_or_the_service_does(connect):
    with silent_port() as port, connect(url_of(port)) as client:
        assert client.ready() is False
    with scripted(refusal(503, "not_ready", retry_after=1)) as server, connect(server.url) as client:
        assert client.ready() is False
        assert client.live() is False
        assert len(server.received) == 2
    with scripted(Reply(404)) as server, connect(server.url) as client, pytest.raises(RequestRefused):
        client.ready()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (results.RobustResult, answers.RobustAnswer),
        (results.RobustPrediction, answers.ExplainedPrediction),
        (results.Explanation, answers.Explanation),
        (results.ExplainedVote, answers.ExplainedVote),
        (results.ExplainedFirstPass, answers.ExplainedFirstPass),
        (results.FastResult, answers.FastAnswer),
        (results.FastPrediction, answers.FastPrediction),
        (results.Timings, answers.RobustTimings),
        (results.BundleName, answers.BundleName),
        (results.Info, answers.Info),
        (results.Limits, answers.Limits),
        (results.DeviceInfo, answers.DeviceInfo),
    ],
)
def test_results_have_the_fields_that_the_service_documents(ours, theirs):
    assert set(ours.model_fields) == set(theirs.model_fields)


def test_evidence_that_is_withheld_is_none(connect):
    with scripted(LABEL_ONLY) as server, connect(server.url) as client:
        result = client.classify(PNG)
    (prediction,) = result.predictions
    assert (prediction.label, prediction.class_name, prediction.complete) == (3, "three", True)
    assert prediction.tally is prediction.share is prediction.votes is prediction.agree is result.timings is None


def test_fields_of_a_newer_service_are_kept(connect):
    newer = LABEL_ONLY.content | {"mood": "good", "predictions": [LABEL_ONLY.content["predictions"][0] | {"why": 1}]}
    with scripted(Reply(200, newer)) as server, connect(server.url) as client:
        result = client.classify(PNG)
    assert result.mood == "good"
    assert result.predictions[0].why == 1


def test_an_async_client_has_many_calls_in_flight(server):
    async def run() -> list[results.RobustResult]:
        async with AsyncClient(server.url) as client:
            return await asyncio.gather(
                *(client.classify(image[None], seed=index) for index, image in enumerate(VALUES))
            )

    assert [result.predictions[0].seed for result in asyncio.run(run())] == [0, 1, 2]


def test_one_client_serves_many_threads(server):
    with Client(server.url) as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: client.classify(PNG, seed=seed).predictions[0].seed, range(20)))
    assert found == list(range(20))


# proxies and certificates, as the environment names them

SERVICE = "http://vision.example"  # which only a proxy finds


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_of_the_environment_is_used(connect, monkeypatch, variable, scheme):
    with scripted(LABEL_ONLY) as proxy:
        monkeypatch.setenv(variable, scheme + proxy.url.removeprefix("http://"))
        with connect(SERVICE) as client:
            client.classify(PNG)
    assert proxy.received[0].headers["host"] == "vision.example"


@pytest.mark.parametrize("url", ["http://127.0.0.1", "http://localhost", "http://[::1]", "http://127.1.2.3", SERVICE])
def test_this_machine_needs_no_proxy(connect, monkeypatch, url):
    monkeypatch.setenv("ALL_PROXY", "nonsense://nowhere")
    if url == SERVICE:
        with pytest.raises(UnusableVariable, match="ALL_PROXY"):
            connect(url)
    else:
        with connect(url):
            pass


@pytest.mark.parametrize(
    ("exceptions", "url", "direct"),
    [
        ("*", SERVICE, True),
        ("vision.example", SERVICE, True),
        ("example", SERVICE, True),
        (".example", SERVICE, True),
        ("*.example", SERVICE, True),
        ("other.test, vision.example", SERVICE, True),
        ("ision.example", SERVICE, False),
        ("vision.example:80", SERVICE, True),
        ("vision.example:8000", SERVICE, False),
        ("vision.example:8000", f"{SERVICE}:8000", True),
        ("::1,2001:db8::1", "http://[2001:db8::1]:8000", True),
        ("[2001:db8::1]", "http://[2001:db8::1]", True),
        ("[2001:db8::1]:8000", "http://[2001:db8::1]:8000", True),
        ("[2001:db8::1]:8000", "http://[2001:db8::1]", False),
        ("2001:db8:0:0::1", "http://[2001:db8::1]", True),
        ("2001:db8::/32", "http://[2001:db8::1]", True),
        ("2001:db9::/32", "http://[2001:db8::1]", False),
        ("fd00::/8,10.0.0.0/8", "http://10.1.2.3:8000", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("10.1.2.3", "http://10.1.2.3", True),
        (",, [::1], 300.1.1.1/99, [", SERVICE, False),
        ("", SERVICE, False),
    ],
)
def test_no_proxy_is_read_as_curl_reads_it(monkeypatch, exceptions, url, direct):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert (route_to(httpx.URL(url)).proxy is None) is direct


@pytest.mark.parametrize(
    ("variable", "value", "url", "part"),
    [
        ("ALL_PROXY", "socks4://proxy.test:1080", SERVICE, "begins with one of"),
        ("HTTP_PROXY", "ftp://user:secret@proxy.test", SERVICE, "begins with one of"),
        ("HTTPS_PROXY", "http://proxy:port", "https://vision.example", "not the URL of a proxy"),
        ("https_proxy", "http://", "https://vision.example", "has a host"),
        ("SSL_CERT_FILE", "/nowhere.pem", "https://vision.example", "No such file"),
        ("SSL_CERT_FILE", __file__, "https://vision.example", "name a PEM file"),
        ("SSL_CERT_DIR", "/nowhere", "https://vision.example", "not a folder"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(connect, monkeypatch, variable, value, url, part):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UnusableVariable, match=part) as caught:
        connect(url)
    assert str(caught.value).startswith(variable)
    assert "secret" not in str(caught.value)


def test_without_tls_no_certificates_are_looked_at(connect, monkeypatch, server):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://nowhere")
    with connect(server.url) as client:
        assert client.classify(PNG).predictions


def test_errors_name_the_proxy_but_not_its_password(connect, monkeypatch):
    with silent_port() as port:
        monkeypatch.setenv("HTTP_PROXY", url_of(port).replace("//", "//user:secret@"))
        with connect(SERVICE, retries=0) as client, pytest.raises(Unavailable) as caught:
            client.classify(PNG)
        assert f"through the proxy {url_of(port)}, which HTTP_PROXY names" in str(caught.value)
        assert "secret" not in str(caught.value)
    with scripted(Reply(407, "<html>")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with connect(SERVICE) as client, pytest.raises(RequestRefused, match="through the proxy"):
            client.classify(PNG)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
@pytest.mark.parametrize("password", [None, "secret"])
def test_a_service_is_reached_through_a_socks_proxy_which_resolves_its_name(
    connect, monkeypatch, server, scheme, password
):
    with socks_proxy(server.url, password=password) as proxy:
        user = f"me:{password}@" if password else ""
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://{user}127.0.0.1:{proxy.port}")
        with connect(SERVICE) as client:
            assert client.ready()
            assert len(client.classify(VALUES).predictions) == len(VALUES)
    assert set(proxy.asked) == {("vision.example", 80)}
    assert set(proxy.users) == ({("me", password)} if password else set())


ASK_BOTH = """
import asyncio, sys
from carso import AsyncClient, Client, Unavailable

here, there = Client(sys.argv[1], retries=0), AsyncClient(sys.argv[1], retries=0)

async def events():
    return [event async for event in there.votes(b"image")]

async def answers():
    return [answer async for answer in there.stream([b"image"])]

for ask in (
    here.info,
    lambda: list(here.votes(b"image")),
    lambda: asyncio.run(there.info()),
    lambda: asyncio.run(events()),
    lambda: list(here.stream([b"image"])),
    lambda: asyncio.run(answers()),
):
    try:
        ask()
    except Unavailable as e:
        print(e)
"""


@pytest.mark.parametrize(
    ("proxy_is", "part"),
    [
        ({"password": "other"}, "Invalid username/password"),
        ({"password": "secret", "reply": HOST_UNREACHABLE}, "Host unreachable"),
        ({}, "Requested USERNAME/PASSWORD"),
        ({"instead": b"HTTP/1.1 400 Bad Request\r\n\r\n"}, "does not speak SOCKS5"),
        ({"instead": b""}, "does not speak SOCKS5"),
    ],
    ids=["wrong password", "host unreachable", "no password wanted", "an HTTP server", "hangs up"],
)
def test_what_a_socks_proxy_refuses_is_an_error_that_names_the_proxy(server, proxy_is, part):
    # In a process of its own: httpcore leaves the socket of a failed handshake to the garbage collector, which warns.
    with socks_proxy(server.url, **proxy_is) as proxy:
        variables = os.environ | {"ALL_PROXY": f"socks5://me:secret@127.0.0.1:{proxy.port}"}
        program = [sys.executable, "-c", ASK_BOTH, SERVICE]
        done = subprocess.run(program, env=variables, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert part in line
        assert f"through the proxy socks5://127.0.0.1:{proxy.port}, which ALL_PROXY names" in line
        assert "secret" not in line


def test_a_netrc_file_does_not_replace_the_key(connect, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login mine password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with scripted(LABEL_ONLY) as server, connect(server.url, api_key="secret-of-mine") as client:
        client.classify(PNG)
    assert server.received[0].headers["authorization"] == "Bearer secret-of-mine"


# errors


def test_a_refusal_says_what_the_service_does(carso, strict_server, connect):
    with pytest.raises(RequestRefused) as caught:
        carso.classify(np.zeros((9, 8), np.uint8))
    error = caught.value
    assert (error.status, error.error) == (422, "wrong_shape")
    assert "[1, 8, 8]" in error.message
    for part in ("wrong_shape", error.message, "422", error.request_id):
        assert part in str(error)
    with connect(strict_server.url) as strict, pytest.raises(RequestRefused, match="seed_refused") as caught:
        strict.classify(COLOUR_PNG, seed=1)
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("reply", "kind", "error"),
    [
        (refusal(401, "unauthorized"), RequestRefused, "unauthorized"),
        (refusal(408, "body_timeout"), RequestRefused, "body_timeout"),
        (refusal(500, "engine_failed"), UnexpectedAnswer, "engine_failed"),
        (refusal(504, "deadline_exceeded"), DeadlineExceeded, "deadline_exceeded"),
        (Reply(502, "<html>"), UnexpectedAnswer, None),
        (Reply(404, "<html>"), RequestRefused, None),
        (Reply(504, '["x"]'), DeadlineExceeded, None),
        (Reply(301, "", {"Location": "http://127.0.0.1/"}), UnexpectedAnswer, None),
        (Reply(200, "<html>"), UnexpectedAnswer, None),
        (Reply(200, {"predictions": 3}), UnexpectedAnswer, None),
        (Reply(200, "\xff"), UnexpectedAnswer, None),
    ],
)
def test_what_would_not_get_better_is_not_sent_again(connect, reply, kind, error):
    with scripted(reply, LABEL_ONLY) as server, connect(server.url) as client, pytest.raises(CarsoError) as caught:
        client.classify(PNG)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.error) == (reply.status, error)
    (request,) = server.received
    assert caught.value.request_id == ("of-the-service" if error else request.headers["x-request-id"])


def test_errors_can_be_passed_between_processes():
    error = Unavailable("later", request_id="x", status=429, error="overloaded", retry_after=3.0)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(again), again.retry_after) == (str(error), 3.0)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", ""])
def test_what_is_not_a_url_is_refused_at_once(connect, url, monkeypatch):
    if not url:
        monkeypatch.setenv("CARSO_URL", "nonsense")
    with pytest.raises(ValueError, match="URL"):
        connect(url)


def test_url_and_key_come_from_the_environment(connect, server, monkeypatch):
    monkeypatch.setenv("CARSO_URL", server.url)
    with connect() as client:
        assert client.ready()


def test_a_url_may_have_a_path(connect):
    with scripted(LABEL_ONLY) as server, connect(f"{server.url}/vision/") as client:
        client.classify(PNG)
    assert server.received[0].path == "/vision/classify"


@pytest.mark.parametrize("given", ["argument", "environment", None])
def test_the_api_key_is_sent_and_never_shown(connect, given, monkeypatch):
    if given == "environment":
        monkeypatch.setenv("CARSO_API_KEY", "secret-of-mine")
    options = {"api_key": "secret-of-mine"} if given == "argument" else {}
    with scripted(refusal(401, "unauthorized")) as server, connect(server.url, **options) as client:
        with pytest.raises(RequestRefused) as caught:
            client.classify(PNG)
        assert "secret" not in f"{caught.value!r} {caught.value} {vars(caught.value)}"
    assert server.received[0].headers.get("authorization") == ("Bearer secret-of-mine" if given else None)


@pytest.mark.parametrize("key", ["two words", "line\n", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(connect, key):
    with pytest.raises(ValueError, match="API key") as caught:
        connect("http://127.0.0.1:8000", key)
    assert key not in str(caught.value)


# retries


@pytest.mark.parametrize(
    "failure",
    [refusal(429, "overloaded"), refusal(503, "not_ready", retry_after=0), Reply(503, "<html>"), "hang up"],
    ids=["429", "503", "a proxy's 503", "hang up"],
)
def test_what_may_get_better_is_sent_again_under_the_same_id(connect, failure):
    with scripted(failure, failure, LABEL_ONLY) as server, connect(server.url) as client:
        assert client.classify(PNG).predictions[0].label == 3
    assert len(server.received) == 3
    assert len({request.headers["x-request-id"] for request in server.received}) == 1
    assert {request.body for request in server.received} == {PNG}


def test_every_call_has_an_id_of_its_own(connect):
    with scripted(LABEL_ONLY) as server, connect(server.url) as client:
        client.classify(PNG)
        client.classify(PNG)
    first, second = server.received
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_the_id_of_a_call_is_the_services(carso, client):
    result = carso.classify(PNG)
    assert len(result.request_id) == 32
    with pytest.raises(RequestRefused) as caught:
        carso.classify(b"")
    assert len(caught.value.request_id) == 32 and caught.value.request_id != result.request_id


def test_retries_end(connect):
    with (
        scripted(refusal(429, "overloaded", "too much", retry_after=0)) as server,
        connect(server.url, retries=2) as client,
        pytest.raises(Unavailable, match="too much") as caught,
    ):
        client.classify(PNG)
    assert len(server.received) == 3
    assert (caught.value.status, caught.value.error, caught.value.retry_after) == (429, "overloaded", 0)


def test_without_retries_nothing_is_sent_twice(connect):
    for failure in (refusal(429, "overloaded"), "hang up"):
        with scripted(failure) as server, connect(server.url, retries=0) as client, pytest.raises(Unavailable):
            client.classify(PNG)
        assert len(server.received) == 1


def test_retry_after_in_seconds_is_waited_for(connect):
    with scripted(refusal(429, "overloaded", retry_after=1), LABEL_ONLY) as server, connect(server.url) as client:
        client.classify(PNG)
    first, second = server.received
    assert second.at - first.at >= 1


def test_with_a_deadline_retry_after_may_be_longer_than_the_timeout(connect):
    with (
        scripted(refusal(429, "overloaded", retry_after=1), LABEL_ONLY) as server,
        connect(server.url, timeout=0.9) as client,
    ):
        assert client.classify(PNG, deadline=600).predictions


def test_a_call_that_finds_no_free_connection_says_so():
    async def run(url: str) -> None:
        async with AsyncClient(url, timeout=0.3, connections=1) as client:
            holding = asyncio.create_task(client.classify(PNG, deadline=600))
            while not server.received:
                await asyncio.sleep(0.01)
            with pytest.raises(Unavailable, match="no free connection"):
                await client.classify_fast(PNG)
            holding.cancel()

    with scripted("silence") as server:
        asyncio.run(run(server.url))
        comes_to(lambda: len(server.received), 1)


def test_retry_after_as_a_date_is_waited_for(connect):
    date = (datetime.now(UTC) + timedelta(seconds=2)).replace(microsecond=0)  # dates have whole seconds
    late = refusal(503, "not_ready", retry_after=format_datetime(date, usegmt=True))
    with scripted(late, LABEL_ONLY) as server, connect(server.url) as client:
        client.classify(PNG)
    assert len(server.received) == 2
    assert datetime.now(UTC) >= date


@pytest.mark.parametrize(
    "retry_after",
    ["soon", "", "-5", "nan", "Wed, 99 Foo 2026", "Mon, 01 Jan 99999 00:00:00 GMT", "Mon, 01 Jan 2001 00:00:00 GMT"],
)
def test_retry_after_that_says_nothing_is_no_hindrance(connect, retry_after):
    failure = refusal(503, "not_ready", retry_after=retry_after)
    with scripted(failure, LABEL_ONLY) as server, connect(server.url) as client:
        assert client.classify(PNG).predictions


@pytest.mark.parametrize("limits", [{"deadline": 30}, {}], ids=["deadline", "timeout"])
def test_a_retry_after_beyond_the_deadline_or_the_timeout_is_raised_at_once(connect, limits):
    with (
        scripted(refusal(429, "overloaded", retry_after=600)) as server,
        connect(server.url, timeout=60) as client,
        pytest.raises(Unavailable) as caught,
    ):
        client.classify_fast(PNG, **limits)
    assert len(server.received) == 1
    assert caught.value.retry_after == 600


def test_a_service_that_starts_later_is_reached(connect):
    result = []

    def call(url: str) -> None:
        with connect(url, retries=1000) as client:
            result.append(client.classify(PNG))

    with silent_port() as port:
        calling = threading.Thread(target=call, args=[url_of(port)])
        calling.start()
        time.sleep(0.3)  # in which it is refused
        with scripted(LABEL_ONLY, bound=port):
            calling.join(PATIENCE)
    assert result


def test_without_a_service_the_error_says_where_it_was_looked_for(connect):
    with silent_port() as port:
        url = url_of(port)
        with connect(url, retries=1) as client, pytest.raises(Unavailable, match=url) as caught:
            client.classify(PNG)
    assert (caught.value.status, caught.value.retry_after) == (None, None)
    assert len(caught.value.request_id) == 32


def test_an_overloaded_service_serves_all_who_come_back(connect, tmp_path):
    """Room for one large request at a time, each of half a second, and three at once."""
    limits = {"max_images": 1, "max_samples": 10_000, "queue_rows": 10_001}
    with serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, **limits) as server:

        def call(seed: int) -> int:
            with connect(server.url, retries=1000) as client:
                return client.classify(PNG, samples=10_000, risk=0, seed=seed).predictions[0].seed

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(call, range(3))) == [0, 1, 2]
        comes_to(lambda: sample(server.metrics(), 'carso_requests_total{endpoint="/classify",status="200"}'), 3)


# deadlines


def test_at_the_deadline_the_votes_so_far_decide(connect, endless_server):
    predictions = ()
    with connect(endless_server.url) as client:
        for deadline in (0.5, 2, 8, 16):  # how soon the first vote is cast depends on the machine
            with suppress(DeadlineExceeded):
                predictions = client.classify(FEW, **ENDLESS, deadline=deadline).predictions
                break
    late = [p for p in predictions if p.rule == "deadline"]
    assert late
    assert not any(p.complete for p in late)
    assert all(0 < p.votes < 100_000 for p in late)


def test_the_service_is_told_what_is_left_of_the_deadline(connect):
    with (
        scripted(refusal(429, "overloaded", retry_after=1), LABEL_ONLY) as server,
        connect(server.url) as client,
    ):
        client.classify(PNG, deadline=500)
        client.classify_fast(PNG, deadline=500)
        client.classify(PNG, deadline=float("inf"))
        client.classify(PNG)
    first, second, fast, long, without = (request.query.get("deadline_ms") for request in server.received)
    assert 1000 < int(second) <= int(first) - 1000 < 500_000
    assert long == "600000"  # the most that the service takes
    assert fast is without is None


@pytest.mark.parametrize("method", ["classify", "classify_fast"])
def test_a_service_that_never_answers_costs_no_more_than_the_deadline(connect, method):
    with scripted("silence") as server, connect(server.url) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"deadline of 0\.3 s, after 1 attempt ") as caught:
            getattr(client, method)(PNG, deadline=0.3)
        waited = time.monotonic() - began
        comes_to(lambda: len(server.received), 1)
    assert waited >= (0.3 if method == "classify_fast" else 0.3 + GRACE)
    assert caught.value.status is None
    assert caught.value.request_id == server.received[0].headers["x-request-id"]


def test_a_service_that_never_answers_costs_no_more_than_the_timeout(connect):
    with (
        scripted("silence") as server,
        connect(server.url, timeout=0.3) as client,
    ):
        with pytest.raises(Unavailable, match="timeout"):
            client.classify(PNG)
        comes_to(lambda: len(server.received), 1)
    assert len(server.received) == 1  # a service that is slow is not helped by a second request


def test_an_answer_that_drips_is_not_waited_for_beyond_the_deadline():
    """Each wait is short, and their sum is not; of the async client only, as docs/client.md says."""
    content = LABEL_ONLY.content | {"padding": "x" * 10_000}
    with scripted(Reply(200, content, drips=True)) as server, Awaited(server.url) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.classify_fast(PNG, deadline=0.5)
        assert time.monotonic() - began < 10_000 * DRIP / 2


def test_retries_stop_at_the_deadline(connect):
    """A million of them would take weeks."""
    with scripted("hang up") as server, connect(server.url, retries=10**6) as client:
        for deadline in (0.5, 2, 8, 32):  # how soon the second attempt is made depends on the machine
            before = len(server.received)
            with pytest.raises((Unavailable, DeadlineExceeded)):
                client.classify_fast(PNG, deadline=deadline)
            if len(server.received) > before + 1:
                return
    raise AssertionError("nothing was sent twice")


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_a_deadline_that_is_over_sends_nothing(connect, deadline):
    with (
        scripted(LABEL_ONLY) as server,
        connect(server.url) as client,
        pytest.raises(DeadlineExceeded, match="after 0"),
    ):
        client.classify(PNG, deadline=deadline)
    assert not server.received


def test_a_cancelled_call_hangs_up_and_the_service_stops_its_count(endless_server):
    async def run() -> None:
        async with AsyncClient(endless_server.url) as client:
            calling = asyncio.create_task(client.classify(BATCH, **ENDLESS))
            await asyncio.to_thread(comes_to, lambda: in_flight(endless_server), 1)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await asyncio.to_thread(comes_to, lambda: in_flight(endless_server), 0)

    comes_to(lambda: in_flight(endless_server), 0)
    asyncio.run(run())


def test_the_client_imports_nothing_of_the_server():
    code = (
        "import sys, carso\n"
        "carso.Client('http://127.0.0.1:1').close()\n"
        "heavy = {'onnxruntime', 'fastapi', 'starlette', 'torch', 'numpy', 'PIL', 'carso_training', 'uvicorn'}\n"
        "print(*heavy & {name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
