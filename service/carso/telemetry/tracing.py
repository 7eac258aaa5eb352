"""OpenTelemetry traces: a span per request, and below it one per stage. This needs `carso[tracing]`.

Where they go, and how many, is up to OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER,
OTEL_SERVICE_NAME, ... (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
"""

from __future__ import annotations

import os
import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from carso.inference.jobs import Job, Result
from carso.telemetry.probes import PROBES
from carso.version import __version__

NOT_TRACED = ",".join(f"{path}$" for path in sorted(PROBES))  # what is asked every few seconds would drown the rest


class Tracing:
    """The tracer of one process. Spans are sent in the background, and dropped if nobody takes them."""

    def __init__(self) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "carso")
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("carso", __version__)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return `app` with a span around each request: a child of the caller's `traceparent` if there is one."""
        traced: ASGIApp = OpenTelemetryMiddleware(
            _handed_down(app),
            excluded_urls=NOT_TRACED,
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )
        return traced

    def result(self, job: Job, result: Result) -> None:
        """Record the stages of a finished job, below the span of the request that awaited it."""
        times = result.times
        stages = {"queue": (times.submitted, times.started), "first_pass": (times.started, times.first_pass_done)}
        if job.path == "robust":
            stages["vote"] = (times.first_pass_done, times.finished)
        to_wall_clock = time.time() - time.monotonic()
        for stage, (began, ended) in stages.items():
            span = self._tracer.start_span(stage, start_time=round((began + to_wall_clock) * 1e9))
            if stage == "vote":
                span.set_attribute("carso.votes", sum(outcome.votes for outcome in result.outcomes))
            span.end(end_time=round((ended + to_wall_clock) * 1e9))

    def shutdown(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _handed_down(app: ASGIApp) -> ASGIApp:
    """Return `app` that sees the span in `traceparent` as if the caller had sent it: so the log names every trace."""
    propagator = TraceContextTextMapPropagator()

    async def handed_down(scope: Scope, receive: Receive, send: Send) -> None:
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        if carrier and scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if name != b"traceparent"]
            scope["headers"] = [*headers, (b"traceparent", carrier["traceparent"].encode())]
        await app(scope, receive, send)

    return handed_down
