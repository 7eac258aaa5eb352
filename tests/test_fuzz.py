"""Requests that nobody would write by hand: none may be a fault of the service, or leave memory behind.

Some hundred by default; ten thousand with `pytest -m slow`.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import COLOUR_PNG, PNG, VALUES, sample
from tests.pictures import encoded, npy
from tests.server import Server, serving
from tests.waiting import eventually

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
PACKED = {
    "name": "images",
    "shape": [3, 1, 8, 8],
    "datatype": "FP32",
    "parameters": {"binary_data_size": VALUES.nbytes},
}
BINARY = json.dumps({"inputs": [PACKED]}).encode()


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many requests there are at least, and what each half of the test makes."""

    requests: int
    examples: int  # by schemathesis, for each of the 6 operations that take a body
    mutants: int


WHOLE = Size(requests=10_000, examples=100, mutants=4800)
SHORT = Size(requests=500, examples=5, mutants=240)
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


@pytest.mark.parametrize("size", [SHORT, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["short", "whole"])
def test_odd_requests_get_no_5xx_and_leave_no_memory_behind(fuzzed, tmp_path, size):
    half(fuzzed, tmp_path, size, seed=1)
    before = sample(settled(fuzzed), "process_resident_memory_bytes")
    half(fuzzed, tmp_path, size, seed=2)
    # what a client has left is counted when the service has noticed
    eventually(lambda: sum(statuses(settled(fuzzed)).values()) >= size.requests)
    page = settled(fuzzed)
    found = statuses(page)
    # a caller's own deadline of a few milliseconds is no fault
    assert found.pop(504, 0) == sample(page, 'carso_rejections_total{reason="deadline_exceeded"}')
    assert not {status for status in found if status >= 500}
    assert found[200] > size.requests / 50
    log = fuzzed.log.read_text()
    assert "Traceback" not in log and '"traceback"' not in log
    assert sample(page, "process_resident_memory_bytes") - before < LEAK


def settled(server: Server) -> str:
    """The metrics when nothing is owed any more."""

    def idle() -> str:
        page = server.metrics()
        assert sample(page, 'carso_queue_rows{path="robust"}') == sample(page, 'carso_queue_rows{path="fast"}') == 0
        return page

    return eventually(idle)


def statuses(page: str) -> dict[int, float]:
    """How many answers had each HTTP status."""
    found = Counter()
    for status, count in re.findall(r'^carso_requests_total\{.*status="(\d+)".*\} (.*)$', page, re.MULTILINE):
        found[int(status)] += float(count)
    return found


def half(server: Server, folder: Path, size: Size, *, seed: int) -> None:
    if size is WHOLE or seed == 1:  # schemathesis takes seconds to start
        from_schema(server, folder, size, seed=seed)
    rng = random.Random(seed)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda request: send(server, request), [mutant(rng) for _ in range(size.mutants)]))


def from_schema(server: Server, folder: Path, size: Size, *, seed: int) -> None:
    """Requests made up from /openapi.json, whose answers must be as it says."""
    checks = "status_code_conformance,content_type_conformance,response_schema_conformance"
    amount = ["--max-examples", str(size.examples), "--seed", str(seed), "--suppress-health-check", "too_slow"]
    arguments = ["--checks", checks, "--phases", "fuzzing", *amount]
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", *arguments]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("schemathesis_hooks.py"))}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
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
    try:
        with server.connect() as connection:
            connection.sendall(request)
            connection.settimeout(0.5)
            while connection.recv(65536):
                pass
    except (TimeoutError, ConnectionResetError, BrokenPipeError):
        pass
