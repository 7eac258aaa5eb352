"""Small requests that would cost much: in memory, in time of the decoders, in time of the event loop."""

from __future__ import annotations

import itertools
import json
import struct
import time
import zlib
from collections.abc import Iterator

import httpx
import pytest
from carso.bundle import InputSpec
from carso.errors import UndecodableImage
from carso.images.encoded import MAX_READS, MAX_SCANS
from carso.images.reader import Reader
from PIL import Image

from tests.bundles import SMALL, shared_bundle
from tests.calls import PATHS, PNG, as_png, refused, sample
from tests.pictures import saved
from tests.server import Server, serving

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
JPEG = saved(Image.new("L", (8, 8), 7), "JPEG", progressive=True)


def with_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG with its last scan over and over again."""
    data = saved(Image.new("L", (side, side), 7), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * (scans - data.count(b"\xff\xda")) + data[end:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_jpeg_of_many_scans_is_read_and_one_of_very_many_refused_undecoded():
    assert READER.read([with_scans(8, MAX_SCANS)], resize=False).shape == (1, 1, 8, 8)
    began = time.monotonic()
    with pytest.raises(UndecodableImage, match=f"{MAX_SCANS + 1} scans"):
        READER.read([with_scans(2048, MAX_SCANS + 1)], resize=True)
    assert time.monotonic() - began < 1


PNG_WITH = PNG.index(b"IDAT") - 4
EXIF = b"\xff\xe1" + struct.pack(">H", 1030) + b"Exif\0\0" + b"\0" * 1022
PIECES = {
    "PNG chunks": PNG[:PNG_WITH] + chunk(b"abCd") * MAX_READS + PNG[PNG_WITH:],
    "PNG chunks behind the pixels": PNG[: PNG.index(b"IEND") - 4] + chunk(b"abCd") * MAX_READS + PNG[-12:],
    "JPEG comments": JPEG[:2] + b"\xff\xfe\0\2" * MAX_READS + JPEG[2:],
    "JPEG fill bytes": JPEG[:2] + b"\xff" * 2**23 + JPEG[2:],
    "JPEG Exif segments": JPEG[:2] + EXIF * 8000 + JPEG[2:],
}


@pytest.mark.parametrize("data", PIECES.values(), ids=PIECES)
def test_an_image_in_very_many_pieces_is_refused_before_they_are_all_read(data):
    began = time.monotonic()
    with pytest.raises(UndecodableImage, match=r"pieces|Exif segments"):
        READER.read([data], resize=False)
    assert time.monotonic() - began < 2


def test_an_honest_large_image_is_read():
    noise = Image.effect_noise((2048, 2048), 50)
    for data in (saved(noise), saved(noise, "JPEG", progressive=True), saved(noise, "BMP")):
        assert READER.read([data], resize=True).shape == (1, 1, 8, 8)


def test_images_of_clients_that_have_hung_up_are_not_decoded(small_server, small_client):
    """One thread decodes; it would have been busy with them for seconds."""
    heavy = with_scans(2048, MAX_SCANS)
    head = (
        b"POST /classify/fast?resize=true HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n"
    )
    gone = 'carso_requests_total{code="499",endpoint="/classify/fast"}'
    spent = "process_cpu_seconds_total"
    began = time.process_time()
    READER.read([heavy], resize=True)
    cost = time.process_time() - began
    before = small_client.get("/metrics").text
    connections = [small_server.connect(timeout=10) for _ in range(25)]
    for connection in connections:
        connection.sendall(head % len(heavy) + heavy)
    time.sleep(0.3)
    for connection in connections:
        connection.close()
    answer = small_client.post("/classify/fast?resize=true", files={"file": PNG})
    assert answer.status_code == 200
    after = small_client.get("/metrics").text
    assert sample(after, gone) >= sample(before, gone) + 20  # the first may have been answered
    assert sample(after, spent) - sample(before, spent) < 15 * cost


# bodies that take much memory, or long to parse


def hold(server: Server, size: int) -> object:
    """A connection whose request has a body of so many bytes that does not come."""
    connection = server.connect(timeout=10)
    connection.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
    time.sleep(0.1)
    return connection


def test_all_bodies_in_flight_share_one_budget(small_server, small_client):
    body, headers = b"x" * 500_000, {"content-type": "image/png"}
    with hold(small_server, 600_000):
        answer = small_client.post("/classify", content=body, headers=headers)
        message = refused(answer, 429, "overloaded")
        assert "600000" in message and "500000" in message and "1000000" in message
        assert answer.headers["retry-after"] == "1"
        with small_server.connect(timeout=10) as stated:  # before any of it is sent
            stated.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n")
            assert stated.recv(100).startswith(b"HTTP/1.1 429 ")
        chunks = (body[at : at + 1000] for at in range(0, len(body), 1000))
        refused(small_client.post("/classify", content=chunks, headers=headers), 429, "overloaded")
        assert as_png("/classify", small_client).status_code == 200  # small bodies are not counted
    time.sleep(0.1)
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
    """Lists in lists, as many as are taken, in a body of the largest size."""
    text = "[" + ",".join(["[" * 60 + "]" * 60] * (VALUES // 61 - 1)) + "]"
    body = f'{{"images": {text}}}'.encode()
    assert len(body) < LIMITS["max_body_bytes"]
    head = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
        body
    )
    with small_server.connect(timeout=10) as connection:
        connection.sendall(head + body)
        slowest = 0.0
        connection.setblocking(False)
        for _ in itertools.repeat(None, 100_000):
            began = time.monotonic()
            assert small_client.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
            try:
                answer = connection.recv(1000)
                break
            except BlockingIOError:
                pass
    assert answer.startswith(b"HTTP/1.1 413 ")  # too many images
    assert slowest < 1  # 0.1 s on a quiet machine; 2 s and more without the bound
