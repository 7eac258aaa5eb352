"""Ten thousand requests that nobody would write by hand: none may be a fault of the service, or leave memory behind."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import COLOUR_PNG, PNG, VALUES, sample
from tests.pictures import encoded, npy
from tests.server import Server, serving

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
PACKED = {
    "name": "images",
    "shape": [3, 1, 8, 8],
    "datatype": "FP32",
    "parameters": {"binary_data_size": VALUES.nbytes},
}
BINARY = json.dumps({"inputs": [PACKED]}).encode()

REQUESTS = 10_000
OPERATIONS = 6  # that take a body, and get nearly all of what schemathesis makes up
EXAMPLES = 100  # per operation, in each half of the test
MUTANTS = 4800  # in each half of the test
LEAK = 16 * 2**20  # bytes: less than the second half's bodies, and more than an allocator's moods

MULTIPART = (
    b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\ncontent-type: image/png\r\n\r\n'
    + PNG
    + b"\r\n--x--\r\n"
)
TENSOR = {"inputs": [{"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": VALUES[0].ravel().tolist()}]}
SEEDS = [
    ("/classify", "image/png", PNG),
    ("/classify/fast", "image/png", COLOUR_PNG),
    ("/classify?resize=true&samples=20", "image/png", COLOUR_PNG),
    ("/classify?risk=0.1&seed=3", "application/x-npy", npy(VALUES)),
    ("/classify/fast", "application/json", json.dumps({"images": VALUES.tolist()}).encode()),
    ("/classify", "multipart/form-data; boundary=x", MULTIPART),
    ("/classify/fast", "image/jpeg", encoded(IMAGE, "JPEG", progressive=True)),
    ("/classify/fast", "image/webp", encoded(IMAGE, "WEBP", lossless=True)),
    ("/classify/fast", "image/bmp", encoded(IMAGE, "BMP")),
    ("/v2/models/random/infer", "application/json", json.dumps(TENSOR).encode()),
    (
        "/v2/models/random/infer",
        f"application/octet-stream\r\ninference-header-content-length: {len(BINARY)}",
        BINARY + VALUES.tobytes(),
    ),
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    with serving(shared_bundle(SMALL), folder / "log", receive_timeout_s=2, max_samples=2000) as server:
        yield server


def test_ten_thousand_odd_requests_get_no_5xx_and_leave_no_memory_behind(fuzzed, tmp_path):
    with fuzzed.client() as client:
        half(fuzzed, tmp_path, seed=1)
        before = sample(client.get("/metrics").text, "process_resident_memory_bytes")
        half(fuzzed, tmp_path, seed=2)
        page = client.get("/metrics").text
    codes = {int(code): 0.0 for code in re.findall(r'carso_requests_total\{code="(\d+)"', page)}
    for code in codes:
        codes[code] = sum(map(float, re.findall(rf'carso_requests_total\{{code="{code}".*\}} (.*)', page)))
    # a caller's own deadline of a few milliseconds is no fault
    assert codes.pop(504, 0) == sample(page, 'carso_rejections_total{reason="deadline_exceeded"}')
    assert not {code for code in codes if code >= 500}
    assert sum(codes.values()) >= REQUESTS
    assert codes[200] > REQUESTS / 50
    log = fuzzed.log.read_text()
    assert "Traceback" not in log and '"traceback"' not in log
    assert sample(page, "process_resident_memory_bytes") - before < LEAK
    assert sample(page, 'carso_queue_rows{path="robust"}') == 0


def half(server: Server, folder: Path, *, seed: int) -> None:
    from_schema(server, folder, seed=seed)
    rng = random.Random(seed)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda request: send(server, request), [mutant(rng) for _ in range(MUTANTS)]))


def from_schema(server: Server, folder: Path, *, seed: int) -> None:
    """Requests made up from /openapi.json, whose answers must be as it says."""
    checks = "status_code_conformance,content_type_conformance,response_schema_conformance"
    arguments = ["--checks", checks, "--phases", "fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(seed)]
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:]


def mutant(rng: random.Random) -> bytes:
    """A valid request with some of its bytes changed, lost, doubled, or made up."""
    path, content_type, body = rng.choice(SEEDS)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {content_type}\r\n"
    if rng.random() < 0.8:  # the head stays as it is, and fits
        body = changed(rng, body)
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    return changed(rng, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def changed(rng: random.Random, data: bytes) -> bytes:
    array = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(array) + 1), rng.choice((1, 4, 32))
        match rng.randrange(4):
            case 0:
                array[at : at + size] = rng.randbytes(size)
            case 1:
                del array[at : at + size]
            case 2:
                array[at:at] = array[at : at + size]
            case _:
                array[at : at + 1] = rng.choice((b"\0", b"\xff", b"-1", b"1e999", b"NaN", b"[", b'"', b"\r\n"))
    return bytes(array)


def send(server: Server, request: bytes) -> None:
    """What comes back is counted at /metrics; a request that never ends is left after a moment."""
    address = httpx.URL(server.url)
    try:
        with socket.create_connection((address.host, address.port), timeout=0.5) as connection:
            connection.sendall(request)
            while connection.recv(65536):
                pass
    except (TimeoutError, ConnectionResetError, BrokenPipeError):
        pass
