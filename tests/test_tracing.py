"""Traces, as a collector receives them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.bundles import SMALL, shared_bundle
from tests.calls import as_png
from tests.server import serving

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector():
    """A receiver of OTLP over HTTP; its attribute `spans` has what has come in."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            request = ExportTraceServiceRequest.FromString(body)
            spans.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.spans = spans
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_request_is_a_span_below_the_callers_with_one_for_each_stage(tmp_path, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    log = tmp_path / "log"
    with serving(shared_bundle(SMALL), log, tracing=True) as server, server.client() as client:
        client.headers["traceparent"] = f"00-{TRACE}-{CALLER}-01"
        assert as_png("/classify", client).status_code == 200
        del client.headers["traceparent"]
        assert as_png("/classify/fast", client).status_code == 200
        server.process.terminate()
        assert server.leaves() == 0  # what is left is sent before the end
    spans = {(span.trace_id.hex() == TRACE, span.name): span for span in collector.spans}
    request = spans[True, "POST /classify"]
    assert request.parent_span_id.hex() == CALLER
    for stage in ("queue", "first_pass", "vote"):
        span = spans[True, stage]
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    names = sorted(name for _, name in spans)
    assert names == ["POST /classify", "POST /classify/fast", "first_pass", "first_pass", "queue", "queue", "vote"]
    robust, fast = (json.loads(line) for line in log.read_text().splitlines() if '"message":"request"' in line)
    assert robust["trace_id"] == TRACE
    assert fast["trace_id"] == spans[False, "POST /classify/fast"].trace_id.hex()


def test_a_collector_that_is_not_there_disturbs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(shared_bundle(SMALL), tmp_path / "log", tracing=True) as server, server.client() as client:
        assert as_png("/classify", client).status_code == 200
