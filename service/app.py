"""The application: builds every part out of the settings, and joins them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service import __version__, openapi
from service.admission import QueueFull
from service.answers import DeviceInfo, FastAnswer, Health, Info, Limits, RobustAnswer, bundle_info, bundle_name
from service.bodies import MEDIA_TYPES
from service.bundle import Bundle
from service.classify import Classification
from service.engine import Engine, EngineError
from service.envelope import Envelope, refuse
from service.errors import (
    DeadlineExceeded,
    InternalError,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RequestError,
    SeedRefused,
)
from service.images import Reader
from service.metrics import Metrics
from service.options import FastOptions, robust_options
from service.pipeline import Pipeline
from service.server import Lifecycle
from service.sessions import Sessions
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Adversarially robust image classification: `/classify` counts votes over purified versions of an image, "
    "`/classify/fast` answers with the classifier alone."
)


def create_app(settings: Settings) -> FastAPI:
    """Load and self-test the bundle, and build the application that serves it.

    Whatever can fail fails here, before a port is opened. Raises BundleError, DeviceError, SettingsError.
    """
    bundle = Bundle.load(settings.bundle)
    manifest = bundle.manifest
    if manifest.samples > settings.max_samples:
        raise SettingsError(
            f"CARSO_MAX_SAMPLES: {settings.max_samples} is not allowed with bundle {manifest.name}; it must be at "
            f"least {manifest.samples}, the votes that the bundle counts by default"
        )
    largest = settings.max_images * (settings.max_samples + 1)
    if settings.queue_rows < largest or settings.fast_queue_rows < settings.max_images:
        raise SettingsError(
            f"CARSO_QUEUE_ROWS: {settings.queue_rows}, CARSO_FAST_QUEUE_ROWS: {settings.fast_queue_rows} are not "
            f"allowed with these limits; they must be at least {largest} = CARSO_MAX_IMAGES x (CARSO_MAX_SAMPLES + 1) "
            f"and {settings.max_images} = CARSO_MAX_IMAGES, or the largest request would never be taken"
        )
    sessions = Sessions(
        bundle,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        spin=settings.spin,
    )
    provider = sessions.provider
    metrics = Metrics(bundle, provider=provider)
    pipeline = Pipeline(sessions, latent=manifest.latent, classes=len(manifest.classes), round_rows=settings.round_rows)
    engine = Engine(
        pipeline,
        observe=metrics.step,
        queue_rows={"robust": settings.queue_rows, "fast": settings.fast_queue_rows},
    )
    lifecycle = Lifecycle()
    metrics.watch(engine, lifecycle)
    pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="carso-decode")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        fields = {"version": __version__, "bundle": bundle_name(bundle), "provider": provider}
        log.info("ready", extra={"fields": fields})
        yield
        await engine.stop()
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="CARSO", version=__version__, description=DESCRIPTION, lifespan=lifespan, redoc_url=None)
    app.state.engine, app.state.lifecycle = engine, lifecycle
    options = robust_options(samples=manifest.samples, max_samples=settings.max_samples, risk=settings.risk)
    _add_classification(
        app,
        settings,
        bundle,
        Classification(
            bundle,
            engine,
            provider=provider,
            reader=Reader(manifest.input, max_images=settings.max_images, max_pixels=settings.max_pixels),
            pool=pool,
            metrics=metrics,
            robust_options=options,
            allow_seed=settings.allow_seed,
        ),
    )
    _add_info(app, settings, bundle, provider=provider)
    _add_operations(app, engine, metrics, lifecycle, watchdog=settings.watchdog_s)
    for kind in (RequestError, EngineError, QueueFull, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(
        Envelope,
        max_body_bytes=settings.max_body_bytes,
        endpoints=[path for route in app.routes if (path := getattr(route, "path", None))],
        metrics=metrics,
        lifecycle=lifecycle,
    )
    return app


def _add_classification(app: FastAPI, settings: Settings, bundle: Bundle, classification: Classification) -> None:
    spec, max_images = bundle.manifest.input, settings.max_images
    elsewhere = (NotFound, MethodNotAllowed)
    app.router.add_api_route(
        "/classify",
        classification.robust,
        methods=["POST"],
        summary="Classify by vote over purified images (the robust path)",
        responses={200: {"model": RobustAnswer}, **openapi.responses(*openapi.all_errors(but=elsewhere))},
        openapi_extra=openapi.operation(classification.robust_options, spec, max_images=max_images),
        route_class_override=_DirectRoute,
    )
    robust_only = (SeedRefused, DeadlineExceeded)
    app.router.add_api_route(
        "/classify/fast",
        classification.fast,
        methods=["POST"],
        summary="Classify by the first pass alone (the fast path)",
        responses={200: {"model": FastAnswer}, **openapi.responses(*openapi.all_errors(but=elsewhere + robust_only))},
        openapi_extra=openapi.operation(FastOptions, spec, max_images=max_images),
        route_class_override=_DirectRoute,
    )


class _DirectRoute(APIRoute):
    """A route whose handler takes the request and returns the response itself, with no dependencies to solve."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def _add_info(app: FastAPI, settings: Settings, bundle: Bundle, *, provider: str) -> None:
    info = Info(
        version=__version__,
        bundle=bundle_info(bundle),
        device=DeviceInfo(asked=settings.device, provider=provider, precision=settings.precision),
        limits=Limits(**settings.model_dump(include=set(Limits.model_fields))),
        risk=settings.risk,
        media_types=MEDIA_TYPES,
    )

    @app.get("/info", summary="What is served, with which limits, on what", responses=openapi.responses(InternalError))
    async def show_info() -> Info:
        return info


def _add_operations(app: FastAPI, engine: Engine, metrics: Metrics, lifecycle: Lifecycle, *, watchdog: float) -> None:
    """Probes and metrics: they touch no queue and wait for nothing."""
    health = openapi.responses(InternalError, NotReady)

    @app.get("/livez", summary="Whether this process should go on", responses=health)
    async def live() -> Health:
        _check(engine)
        if engine.stalled(watchdog):
            raise NotReady(f"the engine has been in one step for more than {watchdog:g} s: restart this process")
        return Health(status="live")

    @app.get("/readyz", summary="Whether this process should be sent requests", responses=health)
    async def ready() -> Health:
        if lifecycle.draining:
            raise NotReady("this process is stopping: send requests to another replica")
        _check(engine)  # loading and the self-test were over before the port was opened
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


def _check(engine: Engine) -> None:
    if not engine.alive:
        raise NotReady("the engine is not running: restart this process, and see its log for the reason")
