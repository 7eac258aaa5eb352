"""The settings, from the environment: CARSO_HOST, CARSO_PORT, CARSO_BUNDLE, ..."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema
from pydantic_settings import BaseSettings, SettingsConfigDict

from carso.complaints import complaint
from carso.inference.sessions import Device, Precision
from carso.inference.vote import MAX_RISK, MIN_RISK

PREFIX = "CARSO_"
OF_THE_CLIENT = frozenset(("CARSO_URL", "CARSO_API_KEY"))
REFERENCE_BUNDLE = Path("models/mnist-fcn")


class SettingsError(Exception):
    """A setting that cannot be used. The message has a line for each: its name, its value, the allowed range."""


def _sound_risk(risk: float) -> float:
    if risk and not MIN_RISK <= risk <= MAX_RISK:
        raise ValueError(f"neither 0 nor from {MIN_RISK} to {MAX_RISK}")
    return risk


Risk = Annotated[
    float,
    AfterValidator(_sound_risk),
    WithJsonSchema({"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_RISK, "maximum": MAX_RISK}]}),
]


Evidence = Literal["full", "label"]


def _reference_bundle() -> Path:
    """Below the working folder; failing that, below the source tree that holds this package."""
    beside = Path(__file__).parents[1] / REFERENCE_BUNDLE
    return beside if beside.is_dir() and not REFERENCE_BUNDLE.is_dir() else REFERENCE_BUNDLE


class Settings(BaseSettings):
    """Every setting with its default. `Settings.read()` reads the environment; the constructor does too."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one, shown in the log.")
    bundle: Path = Field(
        default_factory=_reference_bundle, description="Folder of the bundle to serve; default: models/mnist-fcn."
    )
    device: Device = Field(
        default="auto", description="auto: CUDA where it is there. cuda: refuse to start without it."
    )
    precision: Precision = Field(
        default="float32",
        description="Of the votes. int8, on the CPU only, casts them faster, and a few in a thousand fall otherwise; "
        "first passes are float32 always.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of ONNX Runtime on the CPU; default: the processors it may use.",
    )
    spin: bool = Field(
        default=False, description="Let idle threads of ONNX Runtime burn their processors for a shorter wake-up."
    )
    round_rows: int = Field(
        default=128,  # as fast as 512 on a CPU, and the fast path waits half as long beside it (docs/speed.md)
        ge=16,
        le=65536,
        description="Votes of one round at most, or one election's ballot if that is larger, over all in flight.",
    )
    risk: Risk = Field(
        default=1e-3,
        description="Default chance, per image, that early stopping elects another class than the full count would. "
        "0: count until the outcome is certain.",
    )
    max_samples: int = Field(
        default=10_000, ge=1, le=100_000, description="Votes that a caller may ask for, per image."
    )
    max_images: int = Field(default=64, ge=1, le=4096, description="Images of one request at most.")
    max_body_bytes: int = Field(
        default=8 * 2**20, ge=1024, le=2**30, description="Bytes of one request's body at most."
    )
    bodies_bytes: int = Field(
        default=64 * 2**20,  # a byte of body is held up to three times while it is read
        ge=1024,
        le=2**40,
        description="Bytes that the bodies of all requests in flight may have together, those of up to 64 KiB not "
        "counted; more is refused with 429.",
    )
    max_pixels: int = Field(
        # Measured: decoding so many takes up to 76 MB for a grey bundle and 120 MB for a colour one (WebP), and each of
        # decode_threads may be at it: beside the 130 MB of the process, two stay well inside a container's 512 MB.
        default=2**22,
        ge=1,
        le=2**26,  # Pillow warns at 1.3 times that
        description="Pixels to which the encoded images of one request may decode, all together.",
    )
    receive_timeout_s: float = Field(
        default=30, ge=0.1, le=3600, description="Seconds that a client has to send a request's headers, and its body."
    )
    decode_threads: int = Field(
        default=2, ge=1, le=64, description="Threads that decode bodies too large to decode at once."
    )
    queue_rows: int = Field(
        default=2**20,
        ge=1,
        le=2**40,
        description="Rows of work (images x samples, or 64 an image) that the robust path may owe; more gets 429.",
    )
    fast_queue_rows: int = Field(
        default=2**14, ge=1, le=2**40, description="Images that the fast path may owe; more is refused with 429."
    )
    drain_delay_s: float = Field(
        default=0,
        ge=0,
        le=3600,
        description="Seconds between a signal to stop, from which on readiness fails, and the closing of the port: as "
        "long as whoever routes requests here takes to notice.",
    )
    drain_timeout_s: float = Field(
        default=30, ge=0, le=3600, description="Seconds that requests in flight then have to finish."
    )
    watchdog_s: float = Field(
        default=30,
        ge=0.1,
        le=3600,
        description="Seconds without a step of the engine, while it has work, after which liveness fails.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of API keys, one a line, of which callers must send one; default: none is asked for. Read "
        "at the start.",
    )
    allow_seed: bool = Field(
        default=True,
        description="Let callers choose the seed of the latents. On: who may ask for 1 sample or the fast path can "
        "have a weaker answer anyway. Turn it off where callers are not trusted: with a seed of their choice the "
        "answer holds no randomness that they do not know.",
    )
    evidence: Evidence = Field(
        default="full",
        description="label: answers hold labels only, and neither tallies, scores nor timings, which an attacker who "
        "learns from answers lives on.",
    )
    tracing: bool = Field(
        default=False,
        description="Send OpenTelemetry traces; needs carso[tracing]. Where to: OTEL_EXPORTER_OTLP_ENDPOINT.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )

    @classmethod
    def read(cls) -> Settings:
        """Out of the environment. Raises SettingsError."""
        try:
            return cls()
        except ValidationError as e:
            lines = [f"{PREFIX}{str(error['loc'][0]).upper()}: {complaint(cls, error)}" for error in e.errors()]
            raise SettingsError("\n".join(lines)) from None


def unknown_variables() -> list[str]:
    """Names in the environment that begin like a setting's but are none: most likely misspelt."""
    known = {f"{PREFIX}{field}".upper() for field in Settings.model_fields} | OF_THE_CLIENT
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
