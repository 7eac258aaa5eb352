"""The application: builds every part out of the settings, and joins them."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, get_args

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from carso.api import openapi, routes
from carso.api.answers import DeviceInfo, Info, Limits, bundle_info, bundle_name
from carso.api.classification import Classifier
from carso.api.native import Native
from carso.api.open_inference import Model
from carso.bundle import Bundle
from carso.errors import RequestError
from carso.http.envelope import PROBES, Envelope, refuse, unread
from carso.http.keys import ApiKeys, BadKeys
from carso.http.offload import Decoder
from carso.http.server import Lifecycle
from carso.images.bodies import MEDIA_TYPES
from carso.images.reader import Reader
from carso.inference.admission import QueueFull
from carso.inference.engine import Engine, EngineError
from carso.inference.pipeline import Ballot, Path, Pipeline
from carso.inference.processors import give_way
from carso.inference.sessions import Sessions
from carso.options import FastOptions, robust_options
from carso.settings import Settings, SettingsError
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import Probes
from carso.version import __version__

if TYPE_CHECKING:
    from carso.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Adversarially robust image classification: `/classify` counts votes over purified versions of an image, "
    "`/classify/fast` answers with the classifier alone."
)


def create_app(settings: Settings) -> FastAPI:
    """Load and self-test the bundle, and build the application that serves it.

    Whatever can fail fails here, before a port is opened. Raises BundleError, DeviceError, SettingsError.
    """
    keys = _keys(settings.api_keys_file)
    tracing = _tracing() if settings.tracing else None
    bundle = Bundle.load(settings.bundle)
    manifest = bundle.manifest
    if manifest.samples > settings.max_samples:
        raise SettingsError(
            f"CARSO_MAX_SAMPLES: {settings.max_samples} is not allowed with bundle {manifest.name}; it must be at "
            f"least {manifest.samples}, the votes that the bundle counts by default"
        )
    largest = settings.max_images * Ballot(samples=settings.max_samples, risk=0).price
    if settings.queue_rows < largest or settings.fast_queue_rows < settings.max_images:
        raise SettingsError(
            f"CARSO_QUEUE_ROWS: {settings.queue_rows}, CARSO_FAST_QUEUE_ROWS: {settings.fast_queue_rows} are not "
            f"allowed with these limits; they must be at least {largest} = CARSO_MAX_IMAGES x rows of an image "
            f"and {settings.max_images} = CARSO_MAX_IMAGES, or the largest request would never be taken"
        )
    if settings.bodies_bytes < settings.max_body_bytes:
        raise SettingsError(
            f"CARSO_BODIES_BYTES: {settings.bodies_bytes} is not allowed with these limits; it must be at least "
            f"{settings.max_body_bytes} = CARSO_MAX_BODY_BYTES, or the largest request would never be taken"
        )
    with ThreadPoolExecutor(1, initializer=give_way) as builder:  # ONNX Runtime's own threads take after it
        sessions = builder.submit(
            Sessions,
            bundle,
            device=settings.device,
            precision=settings.precision,
            threads=settings.threads,
            spin=settings.spin,
        ).result()
    provider = sessions.provider
    metrics = Metrics(bundle, device=settings.device, provider=provider, precision=settings.precision)
    pipeline = Pipeline(sessions, latent=manifest.latent, classes=len(manifest.classes), round_rows=settings.round_rows)
    engine = Engine(
        pipeline,
        observe=metrics.step,
        queue_rows={"robust": settings.queue_rows, "fast": settings.fast_queue_rows},
    )
    lifecycle = Lifecycle()
    probes = Probes(engine, lifecycle, watchdog=settings.watchdog_s)
    metrics.watch(engine, probes)
    pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="carso-decode")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        fields = {"version": __version__, "bundle": bundle_name(bundle), "provider": provider}
        log.info("ready", extra={"fields": fields})
        yield
        await engine.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        if tracing:
            tracing.shutdown()

    app = FastAPI(title="CARSO", version=__version__, description=DESCRIPTION, lifespan=lifespan, redoc_url=None)
    app.state.engine, app.state.lifecycle = engine, lifecycle
    app.state.unread = partial(unread, metrics)
    options = robust_options(samples=manifest.samples, max_samples=settings.max_samples, risk=settings.risk)
    classifier = Classifier(
        engine,
        metrics=metrics,
        trace=tracing.job if tracing else lambda job: None,
        classes=manifest.classes,
        allow_seed=settings.allow_seed,
        evidence=settings.evidence,
    )
    decoder = Decoder(Reader(manifest.input, max_images=settings.max_images, max_pixels=settings.max_pixels), pool)
    native = Native(classifier, decoder, bundle, options, provider=provider, max_images=settings.max_images)
    models = [
        Model(
            path,
            classifier,
            decoder,
            manifest,
            options if path == "robust" else FastOptions,
            provider=provider,
            max_images=settings.max_images,
            evidence=settings.evidence,
        )
        for path in get_args(Path)
    ]
    routes.add_native(app, native, options, manifest.input, max_images=settings.max_images, evidence=settings.evidence)
    routes.add_operations(app, probes, metrics, _info(settings, bundle, provider=provider))
    routes.add_open_inference(app, probes, models)
    if keys:
        app.openapi = openapi.guarded(app, but=PROBES)  # type: ignore[method-assign]  # FastAPI's own way to do it
    for kind in (RequestError, EngineError, QueueFull, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(
        Envelope,
        max_body_bytes=settings.max_body_bytes,
        bodies_bytes=settings.bodies_bytes,
        receive_timeout=settings.receive_timeout_s,
        keys=keys,
        endpoints=[path for route in app.routes if (path := getattr(route, "path", None))],
        metrics=metrics,
        lifecycle=lifecycle,
    )
    if tracing:
        app.add_middleware(tracing.around)
    return app


def _keys(path: pathlib.Path | None) -> ApiKeys | None:
    if path is None:
        return None
    try:
        return ApiKeys.read(path)
    except BadKeys as e:
        raise SettingsError(f"CARSO_API_KEYS_FILE: {e}") from None


def _tracing() -> Tracing:
    try:
        from carso.telemetry.tracing import Tracing
    except ImportError as e:
        raise SettingsError(
            f"CARSO_TRACING: True is not allowed without its libraries ({e}): pip install 'carso[tracing]'"
        ) from None
    return Tracing()


def _info(settings: Settings, bundle: Bundle, *, provider: str) -> Info:
    return Info(
        version=__version__,
        bundle=bundle_info(bundle),
        device=DeviceInfo(asked=settings.device, provider=provider, precision=settings.precision),
        limits=Limits(**settings.model_dump(include=set(Limits.model_fields))),
        risk=settings.risk,
        media_types=MEDIA_TYPES,
    )
