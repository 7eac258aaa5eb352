"""/info, and what touches no queue and waits for nothing: probes and metrics."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from carso import errors
from carso.api import openapi
from carso.api.answers import Health, Info
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import LIVE, METRICS, READY, Probes


def add_to(app: FastAPI, probes: Probes, metrics: Metrics, info: Info) -> None:
    """Add the endpoints to an application."""

    @app.get("/info", summary="What is served, with which limits, on what", responses=openapi.GUARDED)
    async def show_info() -> Info:
        return info

    @app.get(LIVE, summary="Whether this process should go on", responses=openapi.HEALTH)
    async def live() -> Health:
        probes.live()
        return Health(status="live")

    @app.get(READY, summary="Whether this process should be sent requests", responses=openapi.HEALTH)
    async def ready() -> Health:
        probes.ready()
        return Health(status="ready")

    text = {"content": {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}}

    @app.get(
        METRICS,
        summary="Metrics in Prometheus' text format",
        response_class=Response,
        responses={200: text, **openapi.responses(errors.InternalError)},
    )
    async def show_metrics() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
