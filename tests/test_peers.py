"""What the comparison with other servers rests on: the system behind each, and what the load makes of their answers."""

from __future__ import annotations

import http.server
import importlib
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.inference.vote import StoppingRule

from benchmarks.load import Load, drive, request
from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG


@pytest.fixture
def system(monkeypatch):
    """The system of a framework, with the small bundle."""
    monkeypatch.setenv("PEER_BUNDLE", str(shared_bundle(SMALL)))
    return importlib.import_module("benchmarks.peers.system").System()


def test_the_system_behind_a_peer_stops_where_the_rule_lets_it_and_no_sooner_than_the_service(system):
    """Each count of a batch is as far as the rule needs, whatever the others of the batch need."""
    rule = StoppingRule(samples=system.samples, classes=system.classes, risk=1e-3)
    images = np.random.default_rng(0).random((8, *system.input["shape"]), np.float32)
    probabilities = system.first_pass.run(["probabilities"], {"images": images})[0]
    for found, expected in zip(system.classify(images), probabilities.argmax(1), strict=True):
        tally = found["tally"]
        *_, runner_up, leader = sorted(tally)
        count = {"leader": leader, "runner_up": runner_up, "cast": sum(tally), "expected": tally[expected] == leader}
        assert found["fast_label"] == expected
        assert tally[found["label"]] == leader
        assert rule.ended_by(**count)
        assert sum(tally) >= rule.first_ballot


def test_the_system_behind_a_peer_reads_what_the_service_reads(system):
    manifest = Bundle.load(shared_bundle(SMALL)).manifest
    image = system.read(PNG)
    assert image.shape == (1, *manifest.input.shape)
    assert manifest.input.low <= image.min() < image.max() <= manifest.input.high


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers in chunks, every second time with 429."""

    protocol_version = "HTTP/1.1"
    count = 0

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        type(self).count += 1
        self.send_response(429 if self.count % 2 == 0 else 200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"2\r\nok\r\n0\r\n\r\n")

    def log_message(self, *args):
        pass


@contextmanager
def answering():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_load_reads_answers_in_chunks_and_counts_them_by_status():
    with answering() as port:
        load = Load(port=port, requests=[request("/", b"x", content_type="text/plain")], connections=1)
        (measured,) = drive([load], seconds=0.2, warm_up=0.0)
    assert measured.statuses.keys() == {200, 429}
    assert measured.statuses[429] == measured.failures
    assert measured.statuses[200] == len(measured.latencies)
    assert (measured.lost, measured.unanswered) == (0, 0)
