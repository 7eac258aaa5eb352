"""The settings of the service: what they mean, what they allow, and how they are read.

Each one is an environment variable (CARSO_PORT) and an option of `carso serve` (--port); the option wins.
`python -m carso.settings` prints docs/settings.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from carso.choices import (
    DEFAULT_EPS,
    LEAST_EPS,
    MOST_CERTIFY_ROWS,
    Certifying,
    Checked,
    Device,
    Duplicates,
    EngineShare,
    Evidence,
    PrecisionAsked,
    Risk,
    Untypical,
    Workers,
    price_of,
)
from carso.complaints import allowed, complaint

PREFIX = "CARSO_"
OF_THE_CLIENT = frozenset(("CARSO_URL", "CARSO_API_KEY"))
SECURITY = "Security"  # the group of which a variable that is present but empty ends the start


def _reference_bundle() -> Path:
    """Find the bundle that an installed package carries; in a source tree it lies beside the package's folder."""
    package, bundle = Path(__file__).parent, "models/mnist-conv"
    packaged = package / bundle
    return packaged if packaged.is_dir() else package.parents[1] / bundle


REFERENCE_BUNDLE = _reference_bundle()


class SettingsError(Exception):
    """A setting that cannot be used. The message has a line for each: its name, its value, the allowed range."""


def _not_empty(path: object) -> object:
    if path == "":
        raise ValueError("empty")
    return path


FilePath = Annotated[
    Path, BeforeValidator(_not_empty), WithJsonSchema({"type": "string", "format": "path", "minLength": 1})
]


def _setting(group: str, *, shown: str | None = None, **field: Any) -> Any:
    """Describe a field. `group`: its heading in the help and the docs. `shown`: its default in words."""
    return Field(json_schema_extra={"group": group, "shown": shown}, **field)


_network = partial(_setting, "Network")
_inference = partial(_setting, "Bundle and inference")
_limit = partial(_setting, "Limits of one request")
_queue = partial(_setting, "Limits of all requests together")
_stop = partial(_setting, "Health and shutdown")
_security = partial(_setting, SECURITY)
_telemetry = partial(_setting, "Logs and traces")


class Settings(BaseModel):
    """Every setting with its default. The constructor takes values; `Settings.read()` takes them from the environment.

    Raises pydantic's ValidationError for a value that is not allowed, and SettingsError for values that do not go
    together; `read` raises SettingsError for both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    _options: frozenset[str] = PrivateAttr(default=frozenset())

    host: str = _network(
        default="127.0.0.1",
        min_length=1,
        description="Address or name to listen on. :: is every address, IPv6 and IPv4, and 0.0.0.0 every IPv4 address.",
    )
    port: int = _network(
        default=8000, ge=0, le=65535, description="Port to listen on. 0 takes any free port; the log names it."
    )
    grpc_port: int | None = _network(
        default=None,
        shown="none: HTTP only",
        ge=0,
        le=65535,
        description="Port to listen on for gRPC, which speaks the Open Inference Protocol. 0 takes any free port; the "
        "log names it. This needs carso[grpc].",
    )
    grpc_calls: int = _network(
        default=64,
        ge=1,
        le=65536,
        description="Most gRPC calls in flight. Each may hold a message of CARSO_MAX_BODY_BYTES, so the memory that "
        "callers can take is the product of both.",
    )
    root_path: str = _network(
        default="",
        shown="none",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="Path below which a proxy shows the service, such as /carso. It may cut it off or pass it on.",
    )
    receive_timeout_s: float = _network(
        default=30,
        ge=0.1,
        le=3600,
        description="Seconds that a client has to send the headers of a request, and as many again for its body.",
    )
    page: bool = _network(
        default=True,
        description="Show a page at / on which people can try attacks, and see how the service fares.",
    )
    bundle: FilePath = _inference(
        default_factory=lambda: REFERENCE_BUNDLE,
        shown="the bundle mnist-conv that comes with the package",
        description="Folder of the bundle to serve.",
    )
    device: Device = _inference(
        default="auto",
        description="auto takes CUDA where it works, and the CPU otherwise. cuda refuses to start without CUDA.",
    )
    precision: PrecisionAsked = _inference(
        default="auto",
        description="Precision of the votes. auto takes int8 on a CPU with 8-bit dot products, if the bundle's own "
        "measurements say that it costs no accuracy, and float32 otherwise. int8 works on the CPU only: it casts votes "
        "faster, and a few in a thousand votes go to another class. tf32 works on CUDA only: it rounds the operands of "
        "products to 10 bits. First passes always use float32.",
    )
    threads: int | None = _inference(
        default=None,
        shown="one for each processor that the service may use, shared out among the workers",
        ge=1,
        le=1024,
        description="Threads of ONNX Runtime on the CPU, in each worker.",
    )
    workers: Workers = _inference(
        default=1,
        description="Processes that serve at one port. auto is one for each processor, and one on a GPU. Each of them "
        "loads the bundle.",
    )
    engine: EngineShare = _inference(
        default="auto",
        description="own gives each worker an engine, on its share of the processors. shared gives all workers one "
        "engine, in a process of its own. auto is shared on a GPU, which belongs to one process, and own on the CPU.",
    )
    spin: bool = _inference(
        default=False,
        description="Keep idle threads of ONNX Runtime busy, so that they wake up sooner. This burns processor time.",
    )
    round_rows: int = _inference(
        default=128,  # as fast as 512 on a CPU, and the fast path waits half as long beside it (docs/speed.md)
        ge=16,
        le=65536,
        description="Most votes that one round casts over all requests in flight. A single ballot may be larger. "
        "Thousands are best on a GPU.",
    )
    cuda_graphs: bool = _inference(
        default=False,
        description="On a GPU, capture a CUDA graph of each size of a round, and replay it. Where that does not work, "
        "the service does without, and the log says why. No figure shows yet what this saves (docs/gpu.md).",
    )
    risk: Risk = _inference(
        default=1e-3,
        description="Default chance, per image, that early stopping elects another class than the full count would. "
        "0 counts until the outcome is certain. This is about the count, not about adversarial robustness.",
    )
    certify: Certifying = _inference(
        default="off",
        description="Default of what to prove of a label: that every image within an eps gets the same one from the "
        "first pass (docs/certificate.md). report states it at CARSO_CERTIFY_EPS. max states the largest eps that is "
        "found. decide answers /classify with a proven label, without a vote. This needs a bundle with bounds, and the "
        "CPU.",
    )
    certify_eps: float = _inference(
        default=DEFAULT_EPS, ge=LEAST_EPS, le=1, description="Default eps of a proof, in units of the values of images."
    )
    shadow: float = _inference(
        default=0,
        ge=0,
        le=1,
        description="Share of the images of /classify/fast that the robust path counts too, while the engine is idle "
        "and for the metrics only: it shows whether the paths agree on this traffic. At most 64 images wait for it.",
    )
    max_samples: int = _limit(
        default=10_000, ge=1, le=100_000, description="Most votes that a caller may ask for, per image."
    )
    max_images: int = _limit(default=64, ge=1, le=4096, description="Most images in one request.")
    max_body_bytes: int = _limit(
        default=8 * 2**20, ge=1024, le=2**30, description="Largest body of one request, in bytes."
    )
    max_pixels: int = _limit(
        # Measured: decoding so many takes up to 76 MB for a grey bundle and 120 MB for a colour one (WebP), and each of
        # decode_threads may be at it: beside the 130 MB of the process, two stay well inside a container's 512 MB.
        default=2**22,
        ge=1,
        le=2**26,  # Pillow warns at 1.3 times that
        description="Most pixels that the encoded images of one request may decode to, all together.",
    )
    bodies_bytes: int = _queue(
        default=64 * 2**20,  # a byte of body is held up to three times while it is read
        ge=1024,
        le=2**40,
        description="Most bytes that the bodies of all requests in flight may have together. Bodies of up to 64 KiB "
        "are not counted. The service answers more with 429. At least CARSO_MAX_BODY_BYTES.",
    )
    decode_threads: int = _queue(
        default=2,
        ge=1,
        le=64,
        description="Threads that decode bodies too large for the event loop. Workers share them out, and have one at "
        "least.",
    )
    queue_rows: int = _queue(
        default=2**20,
        ge=1,
        le=2**40,
        description="Most rows of work that the robust path may owe. An image owes its samples and one more, or 64 "
        "if that is more. The service answers more with 429. At least what CARSO_MAX_IMAGES images owe at "
        "CARSO_MAX_SAMPLES.",
    )
    fast_queue_rows: int = _queue(
        default=2**14,
        ge=1,
        le=2**40,
        description="Most rows of work that the fast path may owe. An image owes one, 3 with a proof, and 15 where "
        "the largest eps is asked for. The service answers more with 429. At least 15 for each of CARSO_MAX_IMAGES.",
    )
    max_streams: int = _queue(
        default=16,
        ge=0,
        le=10_000,
        description="Most streams that may be open. The service answers more with 429. 0 answers all of them so.",
    )
    stream_frames: int = _queue(
        default=8,
        ge=1,
        le=1024,
        description="Frames of one stream that may wait for their robust answer. At so many, no more of it is read.",
    )
    stream_line_bytes: int = _queue(
        default=2**20,
        ge=1024,
        le=2**30,
        description="Longest line of a stream, in bytes. So much is held for each stream, and 320 KiB more at worst.",
    )
    stream_idle_s: float = _queue(
        default=300,
        ge=1,
        le=86_400,
        description="Seconds without a whole line, or without a line being taken, after which the service ends a "
        "stream.",
    )
    drain_delay_s: float = _stop(
        default=0,
        ge=0,
        le=3600,
        description="Seconds between a signal to stop, which makes readiness fail, and the closing of the port. Give "
        "routers as long as they take to notice.",
    )
    drain_timeout_s: float = _stop(
        default=30,
        ge=0,
        le=3600,
        description="Seconds that requests in flight then have to finish. The service answers the others with 503.",
    )
    watchdog_s: float = _stop(
        default=30,
        ge=0.1,
        le=3600,
        description="Seconds without a step of the engine, while it has work, after which liveness and readiness fail.",
    )
    canary_s: float = _stop(
        default=10,
        ge=0,
        le=86_400,
        description="Seconds between two samples of the bundle that the engine classifies while it is idle, to see "
        "whether its answers are still right. 0 turns this off, and so does a bundle without samples.",
    )
    api_keys_file: FilePath | None = _security(
        default=None,
        shown="none: callers need no key",
        description="File of API keys, a line `name: key` or `name: key rate=ROWS` for each, with a rate in rows of "
        "work per second. Callers must send one of the keys; probes, metrics and /docs need none. SIGHUP reads it "
        "again.",
    )
    bundle_public_key: FilePath | None = _security(
        default=None,
        shown="none: a bundle needs no signature",
        description="File of a public key (PEM). The service then starts only with a bundle that has this key's "
        "signature: see `carso bundle sign`.",
    )
    allow_seed: bool = _security(
        default=True,
        description="Let callers choose the seed of the latents. Turn this off where callers are not trusted: with "
        "a seed of their choice, the answer holds no randomness that they do not know.",
    )
    evidence: Evidence = _security(
        default="full",
        description="label limits answers to labels. Tallies, scores and timings, which an attacker can learn from, "
        "are left out.",
    )
    cors_origins: str | None = _security(
        default=None,
        shown="none: no other page's script may call",
        min_length=1,
        pattern=r"^[*]?(https?://[^/, ]+,?)*$",
        description="Origins whose pages' scripts may call from a browser, by WebSocket too: "
        "https://a.example,https://b.example, or * for all.",
    )
    typical: Checked = _security(
        default="robust",
        description="On which paths the service tells whether an image is like those that the bundle knows. It costs "
        "one purified row for each image: little beside a vote, and many times the fast path's own work. A bundle "
        "without thresholds cannot tell.",
    )
    untypical: Untypical = _security(
        default="mark",
        description="mark answers `typical: false`. refuse answers 422 to a request with such an image. It needs a "
        "bundle with thresholds, and CARSO_TYPICAL other than off.",
    )
    duplicates: Duplicates = _security(
        default="off",
        description="What happens to an image that is nearly one which the same key, or without keys the same address, "
        "sent before: those who attack by queries send many (docs/duplicates.md). mark answers "
        "`near_duplicate: true`. refuse answers 409. It needs a bundle that says how near that is.",
    )
    tracing: bool = _telemetry(
        default=False,
        description="Send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT. This needs carso[tracing].",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _telemetry(
        default="info", description="Least level that is logged, on standard error."
    )
    log_format: Literal["auto", "json", "text"] = _telemetry(
        default="auto",
        description="Form of a line of the log. auto is text if standard error is a terminal, and JSON otherwise.",
    )

    @classmethod
    def read(cls, options: Mapping[str, object] | None = None) -> Self:
        """Read the settings from the environment, and from `options` of a command line, by field, which win.

        An empty variable counts as unset, except for the security settings: those must not be switched off by a value
        that got lost. Raises SettingsError.
        """
        given = dict(options or {})
        values = _variables() | given
        try:
            return cls.model_validate(values, context=frozenset(given))
        except ValidationError as e:
            lines = []
            for error in e.errors():
                field = str(error["loc"][0])
                lines.append(f"{_called(field, field in given)}: {complaint(cls, error)}")
            # a value that may be of several kinds has an error for each
            raise SettingsError("\n".join(dict.fromkeys(lines))) from None

    def called(self, field: str) -> str:
        """Name a setting as whoever set it did: as an option of the command line, or as a variable."""
        return _called(field, field in self._options)

    @model_validator(mode="after")
    def _go_together(self, info: ValidationInfo) -> Self:
        self._options = info.context or frozenset()
        largest = self.max_images * price_of(self.max_samples)
        images, samples = self.called("max_images"), self.called("max_samples")
        self._at_least("queue_rows", largest, f"what {images} {self.max_images} at {samples} {self.max_samples} owe")
        proofs = self.max_images * (1 + MOST_CERTIFY_ROWS)
        self._at_least("fast_queue_rows", proofs, f"what {images} {self.max_images} owe with a proof each")
        if self.grpc_port and self.grpc_port == self.port:
            raise SettingsError(
                f"{self.called('grpc_port')}: {self.grpc_port} is not allowed with {self.called('port')} "
                f"{self.port}: HTTP and gRPC need a port each"
            )
        if self.untypical == "refuse" and self.typical == "off":
            raise SettingsError(
                f"{self.called('untypical')}: refuse is not allowed with {self.called('typical')} off: nothing "
                "would be found to refuse"
            )
        if self.device == "cuda" and self.engine == "own" and self.workers not in (1, "auto"):
            raise SettingsError(
                f"{self.called('engine')}: own is not allowed with {self.called('device')} cuda and "
                f"{self.called('workers')} {self.workers}, because one process owns the GPU: set it to shared"
            )
        self._at_least("bodies_bytes", self.max_body_bytes, self.called("max_body_bytes"))
        return self

    def _at_least(self, field: str, least: int, because: str) -> None:
        if (value := getattr(self, field)) < least:
            raise SettingsError(
                f"{self.called(field)}: {value} is not allowed with these limits; it must be at least {least} "
                f"({because}), or the service would refuse the largest request every time"
            )


def variable(field: str) -> str:
    """Name the environment variable of a setting: CARSO_PORT."""
    return f"{PREFIX}{field.upper()}"


def option(field: str) -> str:
    """Name the command-line option of a setting: --port."""
    return f"--{field.replace('_', '-')}"


def group_of(field: str) -> str:
    """Return the heading under which the help and the docs show a setting."""
    return _facts(field)["group"] or ""


def default_of(field: str) -> str:
    """Return the default of a setting as the help and the docs show it."""
    return _facts(field)["shown"] or str(Settings.model_fields[field].default).lower()


def unknown_variables() -> list[str]:
    """List the variables of the environment that begin like a setting's but are not one: most likely misspelt."""
    known = {variable(field) for field in Settings.model_fields} | OF_THE_CLIENT
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def page() -> str:
    """Write docs/settings.md: a table of every setting."""
    lines = [
        "# Settings",
        "",
        "<!-- python -m carso.settings writes this page; edit service/carso/settings.py instead. -->",
        "",
        "Each setting is an option of `carso serve` and an environment variable. The option wins. A value that is not",
        "allowed ends the start with exit status 2 and a message that names the setting. An empty variable counts as",
        "unset, except under *Security*: there it ends the start.",
    ]
    seen = ""
    for field, info in Settings.model_fields.items():
        if (group := group_of(field)) != seen:
            seen = group
            lines += ["", f"## {group}", "", "| option | variable | default | allowed | what |", "| --- " * 5 + "|"]
        cells = (f"`{option(field)}`", f"`{variable(field)}`", default_of(field), allowed(Settings, field))
        lines.append(f"| {' | '.join((*cells, str(info.description)))} |")
    return "\n".join(lines) + "\n"


def _variables() -> dict[str, str]:
    found = {field: os.environ.get(variable(field)) for field in Settings.model_fields}
    return {f: value for f, value in found.items() if value or (value is not None and group_of(f) == SECURITY)}


def _called(field: str, as_option: bool) -> str:
    return option(field) if as_option else variable(field)


def _facts(field: str) -> dict[str, str | None]:
    extra = Settings.model_fields[field].json_schema_extra
    assert isinstance(extra, dict)  # noqa: S101  _setting puts it there
    return extra  # type: ignore[return-value]  # and makes it of these


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
