"""Small requests that would cost much: in memory, in time of the decoders, in time of the event loop."""

from __future__ import annotations

import json
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest
from carso.bundle import InputSpec
from carso.errors import TooManyPixels, UndecodableImage
from carso.images.encoded import MAX_READS
from carso.images.jpeg import MAX_SCANS
from carso.images.reader import Reader
from carso.options import ImageOptions
from PIL import Image
from pydantic_core import from_json

from tests.bundles import SMALL, shared_bundle
from tests.calls import PATHS, PNG, as_png, refused, request, sample, started_body
from tests.pictures import saved
from tests.server import Server, serving
from tests.waiting import eventually

LIMITS = {"max_body_bytes": 600_000, "bodies_bytes": 1_000_000, "decode_threads": 1}


@pytest.fixture(scope="module")
def small_server(tmp_path_factory) -> Iterator[Server]:
    with serving(shared_bundle(SMALL), tmp_path_factory.mktemp("small") / "log", **LIMITS) as server:
        yield server


@pytest.fixture
def small_client(small_server) -> Iterator[httpx.Client]:
    with small_server.client() as client:
        yield client


# files that take long to decode

READER = Reader(InputSpec(shape=(1, 8, 8)), max_images=4, max_pixels=2**22)
RESIZED = ImageOptions(resize=True)
GRADIENT = Image.linear_gradient("L")
JPEG = saved(GRADIENT.resize((8, 8)), "JPEG", progressive=True)


def with_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG with its last scan over and over again."""
    data = saved(GRADIENT.resize((side, side)), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * (scans - data.count(b"\xff\xda")) + data[end:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def cost_of(call: Callable[[], object]) -> float:
    """Seconds of this process's processor time."""
    began = time.process_time()
    call()
    return time.process_time() - began


@pytest.fixture(scope="module")
def honest_cost() -> float:
    """What the largest honest image costs."""
    honest = saved(Image.effect_noise((2048, 2048), 50))
    return cost_of(lambda: READER.read([honest], RESIZED))


def test_a_jpeg_of_several_scans_is_read_and_one_of_very_many_refused_undecoded():
    many, too_many = with_scans(2048, MAX_SCANS), with_scans(2048, MAX_SCANS + 1)
    assert READER.read([saved(GRADIENT.resize((2048, 2048)), "JPEG", progressive=True)], RESIZED).shape == (1, 1, 8, 8)
    with pytest.raises(UndecodableImage, match="progression"):  # encoders write no scan twice
        READER.read([many], RESIZED)

    def refused() -> None:
        with pytest.raises(UndecodableImage, match=f"{MAX_SCANS + 1} scans"):
            READER.read([too_many], RESIZED)

    assert cost_of(refused) < cost_of(lambda: READER.read([saved(GRADIENT.resize((2048, 2048)))], RESIZED)) / 5


PNG_WITH = PNG.index(b"IDAT") - 4
EXIF = b"\xff\xe1" + struct.pack(">H", 1030) + b"Exif\0\0" + b"\0" * 1022
PIECES = {
    "PNG chunks": PNG[:PNG_WITH] + chunk(b"abCd") * MAX_READS + PNG[PNG_WITH:],
    "PNG chunks behind the pixels": PNG[: PNG.index(b"IEND") - 4] + chunk(b"abCd") * MAX_READS + PNG[-12:],
    "JPEG comments": JPEG[:2] + b"\xff\xfe\0\2" * MAX_READS + JPEG[2:],
    "JPEG fill bytes": JPEG[:2] + b"\xff" * 2**23 + JPEG[2:],
}


@pytest.mark.parametrize("data", PIECES.values(), ids=PIECES)
def test_an_image_in_very_many_pieces_is_refused_before_they_are_all_read(data, honest_cost):
    def refused() -> None:
        with pytest.raises(UndecodableImage, match="pieces"):
            READER.read([data])

    assert cost_of(refused) < 10 * honest_cost


def test_a_jpeg_of_very_many_exif_segments_costs_no_more_than_an_honest_one(honest_cost):
    data = JPEG[:2] + EXIF * 8000 + JPEG[2:]
    assert cost_of(lambda: READER.read([data])) < 10 * honest_cost


def test_a_photo_is_read_though_it_has_more_pixels_than_are_allowed_and_many_of_its_kind_are_refused():
    """A JPEG is decoded at a fraction of its size, so it is charged for a quarter of its pixels, or by its scans."""
    photo = saved(GRADIENT.resize((4000, 3000)), "JPEG")
    assert READER.read([photo], RESIZED).shape == (1, 1, 8, 8)
    for sources in ([photo, photo], [with_scans(4000, 40)], [saved(Image.new("1", (4000, 3000)))]):
        with pytest.raises(TooManyPixels):
            READER.read(sources, RESIZED)


def test_an_honest_large_image_is_read():
    noise = Image.effect_noise((2048, 2048), 50)
    for data in (saved(noise), saved(noise, "JPEG", progressive=True), saved(noise, "BMP")):
        assert READER.read([data], RESIZED).shape == (1, 1, 8, 8)


def test_images_of_clients_that_have_hung_up_are_not_decoded(small_server, small_client):
    """One thread decodes; it would have been busy with them for seconds, however fast it is."""
    heavy = saved(GRADIENT.resize((2048, 2048)).convert("RGBA"))
    cost = cost_of(lambda: READER.read([heavy], RESIZED))
    clients = max(25, math.ceil(5 / cost))
    gone = 'carso_requests_total{endpoint="/classify/fast",status="499"}'
    spent = "process_cpu_seconds_total"
    before = small_server.metrics()
    with ExitStack() as open_until_here:
        connections = [open_until_here.enter_context(small_server.connect()) for _ in range(clients)]
        for connection in connections:
            connection.sendall(request("/classify/fast", heavy, content_type="image/png", resize="true"))
        assert connections[0].recv(100).startswith(b"HTTP/1.1 200")  # so the others wait for their turn
    answer = small_client.post("/classify/fast?resize=true", files={"file": PNG})
    assert answer.status_code == 200
    eventually(lambda: sample(small_server.metrics(), gone) >= sample(before, gone) + 0.6 * clients)
    assert sample(small_server.metrics(), spent) - sample(before, spent) < 0.6 * clients * cost


# bodies that take much memory, or long to parse


def test_all_bodies_in_flight_share_one_budget(small_server, small_client):
    body, headers = b"x" * 500_000, {"content-type": "image/png"}
    with started_body(small_server, "/classify", 600_000):
        answer = small_client.post("/classify", content=body, headers=headers)
        message = refused(answer, 429, "overloaded")
        assert "600000" in message and "500000" in message and "1000000" in message
        assert answer.headers["retry-after"] == "1"
        with small_server.connect() as stated:  # before any of it is sent
            stated.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n")
            assert stated.recv(100).startswith(b"HTTP/1.1 429 ")
        chunks = (body[at : at + 1000] for at in range(0, len(body), 1000))
        refused(small_client.post("/classify", content=chunks, headers=headers), 429, "overloaded")
        assert as_png("/classify", small_client).status_code == 200  # small bodies are not counted
    eventually(lambda: small_client.post("/classify", content=body, headers=headers).status_code == 400)
    for _ in range(4):  # what was held is given back, whatever the answer
        refused(small_client.post("/classify", content=body, headers=headers), 400, "undecodable_image")
        chunks = (body[at : at + 1000] for at in range(0, len(body), 1000))
        refused(small_client.post("/classify", content=chunks, headers=headers), 400, "undecodable_image")


VALUES = 2**17
TEXTS = {
    "numbers": "0," * VALUES + "0",
    "lists": "[]," * VALUES + "0",
    "nested lists": ("[" * 100 + "]" * 100 + ",") * (VALUES // 100) + "0",
    "objects": "{}," * (VALUES // 2) + "0",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_json_of_very_many_values_is_refused_unparsed(small_client, text):
    for path in PATHS:
        answer = small_client.post(
            path, content=f'{{"images": [{text}]}}', headers={"content-type": "application/json"}
        )
        assert ".npy" in refused(answer, 413, "body_too_large")
    tensor = f'{{"inputs": [{{"name": "images", "shape": [1], "datatype": "FP32", "data": [{text}]}}]}}'
    answer = small_client.post("/v2/models/random/infer", content=tensor)
    assert answer.status_code == 413
    assert answer.json()["error"].startswith("body_too_large: ")


def test_json_of_very_many_names_is_refused_unparsed(small_client):
    names = json.dumps({str(number): 0 for number in range(10_000)})
    refused(
        small_client.post("/classify", content=names, headers={"content-type": "application/json"}),
        413,
        "body_too_large",
    )
    assert small_client.post("/v2/models/random/infer", content=names).status_code == 413


def test_a_query_of_very_many_options_is_refused_as_one(small_client):
    query = "&".join(f"o{number}=1" for number in range(5000))
    answer = small_client.post(f"/classify?{query}", content=PNG, headers={"content-type": "image/png"})
    assert "5000 options" in refused(answer, 422, "invalid_parameter")


def test_the_costliest_json_that_is_read_does_not_stop_the_event_loop(small_client, small_server):
    """Lists in lists, as many as are taken. Without the bound on them, a body of a service's default size stops it for
    thirty times as long as it takes to parse this one."""
    text = "[" + ",".join(["[" * 60 + "]" * 60] * (VALUES // 61 - 1)) + "]"
    body = f'{{"images": {text}}}'.encode()
    assert len(body) < LIMITS["max_body_bytes"]

    def to_parse() -> float:
        began = time.monotonic()
        from_json(body)
        return time.monotonic() - began

    parsing = to_parse()
    with small_server.connect() as connection:
        connection.sendall(request("/classify", body, content_type="application/json"))
        slowest = 0.0
        connection.setblocking(False)
        answer = b""
        while not answer:
            began = time.monotonic()
            assert small_client.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
            with suppress(BlockingIOError):
                answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 413 ")  # too many images
    assert slowest < 15 * max(parsing, to_parse())
