"""Which path leads where, and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from carso.api import openapi
from carso.api.answers import FastAnswer, FastLabels, Health, Info, RobustAnswer, RobustLabels
from carso.api.native import Native
from carso.api.open_inference import Model, ModelMetadata, ServerMetadata
from carso.api.tensors import InferResponse
from carso.bundle import InputSpec
from carso.errors import (
    ConflictingParameters,
    DeadlineExceeded,
    InternalError,
    InvalidTensor,
    MethodNotAllowed,
    MissingImages,
    NotFound,
    NotReady,
    ObjectArray,
    SeedRefused,
    Unauthorized,
    UndecodableMultipart,
    UndecodableNpy,
    UnexpectedPart,
    UnknownOutput,
    UnsupportedDtype,
)
from carso.options import FastOptions, RobustOptions
from carso.settings import Evidence
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import Probes

_ELSEWHERE = (NotFound, MethodNotAllowed)
_ROBUST_ONLY = (SeedRefused, DeadlineExceeded)
_TENSORS_ONLY = (InvalidTensor, UnknownOutput)
_NATIVE_ONLY = (
    MissingImages,
    ObjectArray,
    UndecodableMultipart,
    UndecodableNpy,
    UnexpectedPart,
    UnsupportedDtype,
)

_HEALTH = openapi.responses(InternalError, NotReady)
_GUARDED = openapi.responses(InternalError, Unauthorized)


def add_native(
    app: FastAPI,
    native: Native,
    options: type[RobustOptions],
    spec: InputSpec,
    *,
    max_images: int,
    evidence: Evidence,
) -> None:
    full = evidence == "full"
    but = _ELSEWHERE + _TENSORS_ONLY
    app.router.add_api_route(
        "/classify",
        native.robust,
        methods=["POST"],
        summary="Classify by vote over purified images (the robust path)",
        responses={
            200: {"model": RobustAnswer if full else RobustLabels},
            **openapi.responses(*openapi.all_errors(but=but)),
        },
        openapi_extra=openapi.operation(options, spec, max_images=max_images),
        route_class_override=_DirectRoute,
    )
    app.router.add_api_route(
        "/classify/fast",
        native.fast,
        methods=["POST"],
        summary="Classify by the first pass alone (the fast path)",
        responses={
            200: {"model": FastAnswer if full else FastLabels},
            **openapi.responses(*openapi.all_errors(but=but + _ROBUST_ONLY)),
        },
        openapi_extra=openapi.operation(FastOptions, spec, max_images=max_images),
        route_class_override=_DirectRoute,
    )


class _DirectRoute(APIRoute):
    """A route whose handler takes the request and returns the response itself, with no dependencies to solve."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def add_operations(app: FastAPI, probes: Probes, metrics: Metrics, info: Info) -> None:
    """/info, and what touches no queue and waits for nothing: probes and metrics."""

    @app.get("/info", summary="What is served, with which limits, on what", responses=_GUARDED)
    async def show_info() -> Info:
        return info

    @app.get("/livez", summary="Whether this process should go on", responses=_HEALTH)
    async def live() -> Health:
        probes.live()
        return Health(status="live")

    @app.get("/readyz", summary="Whether this process should be sent requests", responses=_HEALTH)
    async def ready() -> Health:
        probes.ready()
        return Health(status="ready")

    text = {"content": {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}}

    @app.get(
        "/metrics",
        summary="Metrics in Prometheus' text format",
        response_class=Response,
        responses={200: text, **openapi.responses(InternalError)},
    )
    async def show_metrics() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)


def add_open_inference(app: FastAPI, probes: Probes, models: Iterable[Model]) -> None:
    """Every path is spelt out, so that metrics can name it; of all others the protocol's clients learn why not."""

    @app.get("/v2", summary="The server, in the Open Inference Protocol", responses=_GUARDED)
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata()

    @app.get("/v2/health/live", summary="As /livez", responses=_HEALTH)
    async def live() -> dict[str, bool]:
        probes.live()
        return {"live": True}

    @app.get("/v2/health/ready", summary="As /readyz", responses=_HEALTH)
    async def ready() -> dict[str, bool]:
        probes.ready()
        return {"ready": True}

    names = []
    for model in models:
        names.append(model.name)
        for at in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
            _add_model(app, probes, model, at)

    @app.api_route("/v2/models/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    async def no_such_model(rest: str) -> None:
        raise NotFound(f"there is nothing at this path: the models here are {' and '.join(names)}")


def _add_model(app: FastAPI, probes: Probes, model: Model, at: str) -> None:
    async def metadata() -> ModelMetadata:
        return model.metadata

    async def ready() -> dict[str, Any]:
        probes.ready()
        return {"name": model.name, "ready": True}

    never = _ELSEWHERE + _NATIVE_ONLY + ((*_ROBUST_ONLY, ConflictingParameters) if model.path == "fast" else ())
    app.get(at, summary=f"The model {model.name}", responses=_GUARDED)(metadata)
    app.get(f"{at}/ready", summary=f"Whether {model.name} takes requests", responses=_GUARDED | _HEALTH)(ready)
    app.router.add_api_route(
        f"{at}/infer",
        model.infer,
        methods=["POST"],
        summary=f"Classify, as the model {model.name} of the Open Inference Protocol",
        responses={200: {"model": InferResponse}, **openapi.responses(*openapi.all_errors(but=never))},
        openapi_extra=openapi.operation_on_tensors(),
        route_class_override=_DirectRoute,
    )
