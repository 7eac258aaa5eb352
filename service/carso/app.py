"""The application: build every part out of the settings, and join them."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from carso.api import docs, open_inference, openapi, operations, page
from carso.api.answers import CERTIFICATE, DeviceInfo, Info, Limits, bundle_info, bundle_name
from carso.api.classification import Classification
from carso.api.intake import Intake
from carso.api.native import Native
from carso.api.open_inference import Model
from carso.api.streams import PATH as STREAM
from carso.api.streams import Answering, Bounds, Streams
from carso.board.seat import Seat
from carso.board.whole import Whole
from carso.bundle import Bundle
from carso.choices import CHECKED, CUDA, PathName
from carso.http.direct import Direct
from carso.http.envelope import Bodies, Envelope, unread
from carso.http.keys import ApiKeys, BadKeys
from carso.http.refusals import EXPECTED, fail, refuse
from carso.http.server import Service
from carso.images.media_types import MEDIA_TYPES
from carso.images.reader import Reader
from carso.inference.abilities import Abilities
from carso.inference.canary import Canary, canary_of, canary_ratio
from carso.inference.duplicates import Recent
from carso.inference.engine import Engine
from carso.inference.jobs import Outcome, VotePlan
from carso.inference.remote import Remote
from carso.inference.runtime import check_runtime
from carso.inference.shadow import Shadow
from carso.inference.thread import InThread
from carso.options import ExplainedOptions, RobustOptions, StreamOptions, fast_options, robust_options
from carso.settings import Settings, SettingsError
from carso.signing import PublicKey, public_key
from carso.telemetry.alarms import Alarms
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import PROBES, Lifecycle, Probes
from carso.telemetry.workers import registries
from carso.version import __version__

if TYPE_CHECKING:
    from carso.grpc.server import GrpcServer
    from carso.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

_FORKED = 3  # exit status of a worker that cannot start; gunicorn then ends too

DESCRIPTION = (
    "Adversarially robust image classification: `/classify` counts votes over purified versions of an image, "
    "`/classify/fast` answers with the classifier alone."
)


def create_app() -> ASGIApp:
    """Build the application out of the environment's settings, for any ASGI server.

        uvicorn --factory carso.app:create_app

    `carso serve` adds a drain at the stop and time limits for slow clients. Other servers do without, and the log warns
    of it. Raises InstallationError, and what `build` raises.
    """
    check_runtime()
    return build(Settings.read()).app


def build(settings: Settings, whole: Whole | None = None, shared: socket.socket | None = None) -> Service:
    """Load and self-test the bundle, and build the application that serves it.

    Whatever can fail fails here, before a port is opened. `whole`: the service that this process is a worker of; None:
    it is alone. `shared`: a connection to the engine of all workers; None: this process has its own. Raises
    BundleError, DeviceError, SettingsError, EngineLost.
    """
    whole = whole or Whole()
    keys = _keys(settings, whole)
    tracing = _tracing(settings) if settings.tracing else None
    key = public_key(settings)
    bundle = Bundle.load(settings.bundle, key=key)
    manifest = bundle.manifest
    if manifest.samples > settings.max_samples:
        raise SettingsError(
            f"{settings.called('max_samples')}: {settings.max_samples} is not allowed with bundle {manifest.name}; it "
            f"must be at least {manifest.samples}, the votes that the bundle counts by default"
        )
    if settings.untypical == "refuse" and manifest.typical is None:
        raise SettingsError(
            f"{settings.called('untypical')}: refuse is not allowed with bundle {manifest.name}: it has no thresholds "
            "of typical images. Add them with `carso-train typical`, or set it to mark"
        )
    recent = _recent(bundle, settings)
    if shared is None:
        from carso.inference.loading import pipeline_of  # loads ONNX Runtime

        pipeline, thread = pipeline_of(bundle, settings)
        abilities = pipeline.sessions.abilities
    else:
        remote = Remote(shared, share=1 / whole.workers)
        abilities = remote.abilities
    _check_abilities(abilities, settings, whole, shared=shared is not None)
    provider, precision = abilities.provider, abilities.precision.precision
    shown = registries(whole)
    metrics = Metrics(bundle, abilities, device=settings.device, whole=whole, registries=shown)
    alarms = Alarms(manifest, certify_eps=settings.certify_eps, whole=whole, registry=shown.shown)
    engine = Engine(
        InThread(pipeline, thread=thread, observe=metrics.step) if shared is None else remote,
        queue_rows={"robust": settings.queue_rows, "fast": settings.fast_queue_rows},
        whole=whole,
    )
    lifecycle = Lifecycle()
    probes = Probes(engine, lifecycle, watchdog=settings.watchdog_s, whole=whole)
    metrics.watch(admission=engine.admission, is_ready=lambda: probes.is_ready)
    canary = canary_of(bundle, engine, every=settings.canary_s, whole=whole) if shared is None else None
    if bundle.samples is not None and settings.canary_s:  # also where another process asks
        metrics.watch_canary(partial(canary_ratio, whole))
    pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="carso-decode")
    served: dict[str, object] = {"bundle": bundle_name(bundle), "provider": provider}
    app = FastAPI(
        title="CARSO",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(
            engine,
            canary,
            lifecycle,
            pool,
            tracing,
            served=None if isinstance(whole, Seat) else served,
            grpc=lambda: grpc,
        ),
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
        redirect_slashes=False,  # a redirect would repeat the Host that the client sent, and forget https
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours does this
    )
    defaults: dict[str, Any] = {"certify": settings.certify, "certify_eps": settings.certify_eps}
    of_robust = defaults | {"samples": manifest.samples, "max_samples": settings.max_samples, "risk": settings.risk}
    options = robust_options(RobustOptions, **of_robust)
    explained_options = robust_options(ExplainedOptions, **of_robust)
    of_fast = fast_options(**defaults)
    reader = Reader(manifest.input, max_images=settings.max_images, max_pixels=settings.max_pixels)
    _, height, width = manifest.input.shape
    intake = Intake(reader.read, pool, pixels=height * width)

    def shadowed(outcome: Outcome, agrees: bool, caller: str | None) -> None:
        metrics.shadowed(outcome, agrees)
        alarms.elections([outcome], agree=[agrees], caller=caller)

    classification = Classification(
        engine,
        metrics=metrics,
        alarms=alarms,
        trace=tracing.result if tracing else lambda job, result: None,
        classes=manifest.classes,
        allow_seed=settings.allow_seed,
        evidence=settings.evidence,
        bounds=manifest.typical,
        untypical=settings.untypical,
        duplicates=settings.duplicates,
        recent=recent,
        shadow=Shadow(
            engine,
            share=settings.shadow,
            plan=VotePlan(samples=manifest.samples, risk=settings.risk),
            counted=shadowed,
            dropped=metrics.shadow_dropped,
        ).offer,
        unproven=abilities.unproven,
    )
    native = Native(
        classification,
        intake,
        bundle,
        explained_options,
        of_fast,
        provider=provider,
        precision=precision,
        max_images=settings.max_images,
        evidence=settings.evidence,
    )
    native.add_to(app)
    tells_typical = manifest.typical is not None
    answering = Answering(
        classification=classification,
        intake=intake,
        metrics=metrics,
        lifecycle=lifecycle,
        wait=lambda: engine.admission["robust"].wait,
        spec=manifest.input,
        served={**served, "precision": precision},
        evidence=settings.evidence,
        tells_typical=tells_typical and "fast" in CHECKED[settings.typical],
        bounds=Bounds(
            streams=settings.max_streams,
            in_flight=settings.stream_frames,
            longest_line=settings.stream_line_bytes,
            idle=settings.stream_idle_s,
        ),
        whole=whole,
    )
    Streams(answering, robust_options(StreamOptions, **of_robust)).add_to(app)
    operations.add_to(app, probes, metrics, _info(settings, bundle, abilities, key, whole.workers))
    models = [
        Model(
            path,
            classification,
            intake,
            manifest,
            options if path == "robust" else of_fast,
            provider=provider,
            max_images=settings.max_images,
            evidence=settings.evidence,
            tells_typical=tells_typical and path in CHECKED[settings.typical],
            tells_near=recent is not None,
            proves=abilities.unproven is None,
            whole=whole,
        )
        for path in get_args(PathName)
    ]
    open_inference.add_to(app, models, probes)
    docs.add_to(app)
    page.add_samples_to(app, bundle)
    keyless = PROBES | docs.PATHS
    if settings.page:
        page.add_to(app)
        keyless |= page.paths()
    # FastAPI's own way to do it
    app.openapi = openapi.documented(app, keys=keys is not None, but=keyless)  # type: ignore[method-assign]
    app.add_exception_handler(Exception, fail)
    for kind in EXPECTED:
        app.add_exception_handler(kind, refuse)
    bodies = Bodies(settings.bodies_bytes, whole)
    origins = settings.cors_origins.split(",") if settings.cors_origins else []
    # Around all of FastAPI. What add_middleware gets has FastAPI's own layers around it, which take time.
    around: ASGIApp = Envelope(
        Direct(app, endpoints=openapi.direct(app)),
        max_body_bytes=settings.max_body_bytes,
        bodies=bodies,
        receive_timeout=settings.receive_timeout_s,
        keys=keys,
        keyless=keyless,
        endless=(STREAM,),
        endpoints=[path for route in app.routes if (path := getattr(route, "path", None))],
        metrics=metrics,
        lifecycle=lifecycle,
        origins=origins,
    )
    grpc = _grpc(settings, models, probes, keys=keys, bodies=bodies, metrics=metrics)
    if tracing:
        around = tracing.around(around)
    if origins:
        around = CORSMiddleware(
            around,  # a browser's preflight carries no key
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-ID", "Retry-After"),
        )
    if settings.root_path:
        around = _below(settings.root_path, around)
    return Service(
        around,
        lifecycle,
        abandon=engine.abandon,
        reload=partial(_reload, keys),
        unread=partial(unread, metrics),
        state=lambda: probes.state,
        served=served,
        web_socket=STREAM,
        grpc=grpc,
    )


def _below(prefix: str, app: ASGIApp) -> ASGIApp:
    """Return `app` told of the path that it is below. FastAPI's own setting tells only what is inside of FastAPI."""

    async def below(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": prefix}, receive, send)

    return below


def _check_abilities(abilities: Abilities, settings: Settings, whole: Whole, *, shared: bool) -> None:
    """Raise SettingsError if the engine cannot do what the settings ask for."""
    log.info("votes are cast in %s: %s", abilities.precision.precision, abilities.precision.because)
    if whole.workers > 1 and abilities.provider == CUDA and not shared:
        raise SettingsError(
            f"{settings.called('engine')}: {settings.engine} is not allowed here with {whole.workers} workers, because "
            "one process owns the GPU: set it to shared, or set CARSO_DEVICE=cpu"
        )
    if settings.certify != "off" and abilities.unproven is not None:
        raise SettingsError(
            f"{settings.called('certify')}: {settings.certify} is not allowed here; it must be off: "
            f"{abilities.unproven}"
        )


def _recent(bundle: Bundle, settings: Settings) -> Recent | None:
    """Return what images are compared with. None: they are not. Raises SettingsError."""
    if settings.duplicates == "off":
        return None
    manifest = bundle.manifest
    if manifest.near_duplicates is None:
        raise SettingsError(
            f"{settings.called('duplicates')}: {settings.duplicates} is not allowed with bundle {manifest.name}: it "
            "does not say how near a near-duplicate is. Add that with `carso-train duplicates`, or set it to off"
        )
    return Recent(distance=manifest.near_duplicates.distance, code=manifest.code)


def _lifespan(
    engine: Engine,
    canary: Canary | None,
    lifecycle: Lifecycle,
    pool: ThreadPoolExecutor,
    tracing: Tracing | None,
    *,
    served: dict[str, object] | None,
    grpc: Callable[[], GrpcServer | None],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return what surrounds the time in which the application serves.

    `served` is logged when it is ready; None: somebody else logs it. Raises RuntimeError at the start if the process
    was forked since the application was built.
    """
    built_in = os.getpid()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if os.getpid() != built_in:  # threads do not survive a fork, and ONNX Runtime would wait for its own
            atexit.register(os._exit, _FORKED)  # at the exit too, which is therefore cut short
            raise RuntimeError(
                "this process was forked after the application was built, and its threads are gone: let each worker "
                "build its own (gunicorn: without --preload)"
            )
        if not lifecycle.managed:
            log.warning(
                "this server is not `carso serve`: CARSO_HOST, CARSO_PORT, CARSO_GRPC_PORT, CARSO_DRAIN_DELAY_S, "
                "CARSO_DRAIN_TIMEOUT_S and CARSO_LOG_LEVEL have no effect, readiness does not fail before the port is "
                "closed, the time for a request's headers is not limited, and the body of a request that offers an "
                "upgrade may be lost"
            )
        engine.start()
        watching = None if canary is None else asyncio.create_task(canary.run())
        if served is not None:
            log.info("ready", extra={"fields": {"version": __version__, **served}})
        yield
        if watching is not None:
            watching.cancel()
        if (calls := grpc()) is not None:
            await calls.ended()
        await engine.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        if tracing:
            tracing.shutdown()

    return lifespan


def _keys(settings: Settings, whole: Whole) -> ApiKeys | None:
    if settings.api_keys_file is None:
        return None
    try:
        return ApiKeys(settings.api_keys_file, whole)
    except BadKeys as e:
        raise SettingsError(f"{settings.called('api_keys_file')}: {e}") from None


def _grpc(
    settings: Settings,
    models: Sequence[Model],
    probes: Probes,
    *,
    keys: ApiKeys | None,
    bodies: Bodies,
    metrics: Metrics,
) -> GrpcServer | None:
    if settings.grpc_port is None:
        return None
    try:
        from carso.grpc.calls import Calls
        from carso.grpc.server import GrpcServer
    except ImportError as e:
        raise SettingsError(
            f"{settings.called('grpc_port')}: {settings.grpc_port} is not allowed without its libraries ({e}): "
            "pip install 'carso[grpc]'"
        ) from None
    return GrpcServer(
        models,
        probes,
        Calls(keys=keys, bodies=bodies, metrics=metrics).handler,
        max_message_bytes=settings.max_body_bytes,
        max_calls=settings.grpc_calls,
    )


def _reload(keys: ApiKeys | None) -> None:
    """Read the file of keys again. Requests in flight, which were let in, go on."""
    if keys is None:
        log.warning("SIGHUP reads the API keys again, and this service has none: restart it to change a setting")
        return
    try:
        keys.reload()
    except BadKeys as e:
        log.error("the API keys stay as they were: %s", e)
    else:
        log.info("the API keys were read again")


def _tracing(settings: Settings) -> Tracing:
    try:
        from carso.telemetry.tracing import Tracing
    except ImportError as e:
        raise SettingsError(
            f"{settings.called('tracing')}: True is not allowed without its libraries ({e}): "
            "pip install 'carso[tracing]'"
        ) from None
    return Tracing()


def _info(settings: Settings, bundle: Bundle, abilities: Abilities, key: PublicKey | None, workers: int) -> Info:
    return Info(
        version=__version__,
        bundle=bundle_info(bundle, signed_by=None if key is None else key.fingerprint),
        device=DeviceInfo(
            asked=settings.device,
            provider=abilities.provider,
            precision=abilities.precision.precision,
            precision_asked=settings.precision,
            precision_because=abilities.precision.because,
        ),
        limits=Limits(**settings.model_dump(include=set(Limits.model_fields))),
        workers=workers,
        risk=settings.risk,
        certifies=abilities.unproven is None,
        certificate=CERTIFICATE if abilities.unproven is None else f"None can be given: {abilities.unproven}",
        media_types=MEDIA_TYPES,
    )
