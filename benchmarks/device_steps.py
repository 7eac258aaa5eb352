"""What benchmarks.gpu checks and measures, step by step: python -m benchmarks.device_steps STEP RIG FILE

A step returns its figures: for each row of its table, a figure for each column. It raises what goes wrong. The command
runs one step of a rig in JSON, and writes its figures to a file.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from carso.bundle import Bundle
from carso.choices import CPU, CUDA, PRECISIONS, Precision
from carso.inference.jobs import Job, VotePlan
from carso.inference.latents import DRAWERS
from carso.inference.pipeline import Pipeline
from carso.inference.processors import usable_cpus
from carso.inference.sessions import Sessions
from carso.settings import Settings

from benchmarks.load import Load, Measured, drive, request
from benchmarks.memory import Held, Watch, growth, held
from benchmarks.servers import Server, carso

Figures = dict[str, dict[str, float | str]]

CUDA_ROUND_ROWS = 8192  # the largest bucket; docs/gpu.md has the reason
RISKS = (0.0, 1e-3)
BATCH = 64  # images of one request: as many as a service takes by default
BATCH_CONNECTIONS = (1, 8)
WORKERS = 4
PATHS = {"fast": "/classify/fast", "robust": "/classify"}
PARTS = (20, 100, 500, 2000)  # votes of the batches that are compared with one large one
NPY, PNG = "application/x-npy", "image/png"


class StepError(Exception):
    """What was checked does not hold."""


@dataclass(frozen=True, kw_only=True)
class Rig:
    """What is measured, and for how long."""

    folder: Path  # of the bundle
    device: str  # cuda or cpu
    seconds: float  # of each measurement
    leak_seconds: float
    rows: tuple[int, ...]  # votes of one run, as in the rounds of a service
    images: int  # that the pipeline has in flight
    connections: tuple[int, ...]

    def told(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def heard(cls, told: str) -> Rig:
        """Return the rig of `told`."""
        given = json.loads(told)
        lists = {name: tuple(given[name]) for name in ("rows", "connections")}
        return cls(**given | lists | {"folder": Path(given["folder"])})

    @property
    def provider(self) -> str:
        return CUDA if self.device == "cuda" else CPU

    @property
    def ways(self) -> tuple[Way, ...]:
        """All ways in which this device casts votes."""
        graphs = (False, True) if self.device == "cuda" else (False,)
        return tuple(Way(precision, each) for precision in PRECISIONS[self.provider] for each in graphs)

    @property
    def round_rows(self) -> int:
        default: int = Settings.model_fields["round_rows"].default
        return CUDA_ROUND_ROWS if self.device == "cuda" else default

    def load(self) -> Bundle:
        """Read the bundle."""
        return Bundle.load(self.folder)


@dataclass(frozen=True)
class Way:
    """How votes are cast on the device."""

    precision: Precision
    cuda_graphs: bool

    @property
    def name(self) -> str:
        return f"{self.precision} graphs" if self.cuda_graphs else self.precision

    def sessions(self, bundle: Bundle, device: str) -> Sessions:
        """Build sessions. Raises DeviceError, and StepError if CUDA graphs were asked for and do not work."""
        with _warnings() as told:
            sessions = Sessions(
                bundle,
                device=device,  # type: ignore[arg-type]
                precision=self.precision,
                cuda_graphs=self.cuda_graphs,
            )
        if self.cuda_graphs and not sessions.cuda_graphs:
            raise StepError("\n".join(told))
        return sessions


def start(rig: Rig, *, way: Way) -> Figures:
    """Build the sessions, which tests them on the known answers. Say how far they are from these, how many votes differ
    from those of the CPU in float32, and how many do in batches of other sizes.
    """
    bundle = rig.load()
    test = bundle.self_test
    began = time.perf_counter()
    device = way.sessions(bundle, rig.device)
    took = time.perf_counter() - began
    first = device.first_pass(test.images)
    known = device.vote(test.codes, test.code_index, test.latents)
    found: Figures = {
        "self-test": {
            "seconds": took,
            "scores off by": float(np.abs(first.probabilities - test.probabilities).max()),
            "codes off by": float(np.abs(first.codes - test.codes).max()),
            **_differing(known, test.votes),
        }
    }
    rows = max(rig.rows)
    codes, code_index, latents = _arrays(bundle, rows)
    cast = device.vote(codes, code_index, latents)
    cpu = Sessions(bundle, device="cpu", precision="float32")
    found["the CPU"] = _differing(cast, cpu.vote(codes, code_index, latents))
    for size in (size for size in PARTS if size < rows):
        parts = [
            device.vote(codes, code_index[start : start + size], latents[start : start + size])
            for start in range(0, rows - size + 1, size)
        ]
        found[f"batches of {size}"] = _differing(cast, np.concatenate(parts))
    return found


def tests(rig: Rig) -> Figures:
    """Run the tests that are marked gpu. They need pytest, and nothing else that the service does not need."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-rA", "-q"]
    plain = ["-o", "addopts=", "-o", "filterwarnings="]  # this project's options need plug-ins
    environment = os.environ | {"CARSO_TEST_BUNDLE": str(rig.folder.absolute())}
    ran = subprocess.run(
        [*command, *plain, "tests/test_gpu.py"], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED"))]
    if ran.returncode or not lines:
        raise StepError("\n".join([*lines, *(ran.stdout + ran.stderr).splitlines()[-15:]]))
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    if skipped and rig.device == "cuda":
        raise StepError("\n".join(skipped))
    return {"tests": {"passed": sum(line.startswith("PASSED") for line in lines), "skipped": len(skipped)}}


def votes(rig: Rig) -> Figures:
    """Time one round of votes, by the service's sessions and by PyTorch on the same device."""
    bundle = rig.load()
    found: Figures = {f"{rows} votes": {} for rows in rig.rows}
    for way in rig.ways:
        sessions = way.sessions(bundle, rig.device)
        for rows in rig.rows:
            arrays = _arrays(bundle, rows)
            took = _median_us(lambda arrays=arrays, sessions=sessions: sessions.vote(*arrays), rig.seconds)
            found[f"{rows} votes"] |= {f"{way.name}, us": took, f"{way.name}, votes/s": 1e6 * rows / took}
        del sessions
    return found


def torch_votes(rig: Rig) -> Figures:
    """The same by PyTorch: arrays of the host in and out as the service's sessions; and a CUDA graph on its own."""
    import torch  # not part of the service

    from benchmarks.on_torch import TorchPrecision, TorchVotes

    bundle = rig.load()
    device = torch.device(rig.device)
    on_gpu: tuple[TorchPrecision, ...] = ("float32", "tf32", "float16")
    found: Figures = {f"{rows} votes": {} for rows in rig.rows}
    for rows in rig.rows:
        cells = found[f"{rows} votes"]
        known: np.ndarray | None = None
        for precision in on_gpu if rig.device == "cuda" else on_gpu[:1]:
            ways = TorchVotes(bundle, *_arrays(bundle, rows), device=device, precision=precision)
            cells[f"{precision}, us"] = _median_us(ways.plain, rig.seconds)
            if rig.device == "cuda":
                cells[f"{precision} graph, us"] = _median_us(ways.replay(), rig.seconds)
            cast = ways.plain()
            known = cast if known is None else known
            if precision != "float32":
                cells[f"{precision}: votes that differ, %"] = 100 * float((cast != known).mean())
    return found


def pipeline(rig: Rig, *, way: Way) -> Figures:
    """Run the service's own pipeline in this process: images in flight together, as the engine has them."""
    bundle = rig.load()
    manifest = bundle.manifest
    sessions = way.sessions(bundle, rig.device)
    steps = Pipeline(
        sessions,
        latent=manifest.latent,
        classes=len(manifest.classes),
        round_rows=rig.round_rows,
        eps=manifest.typical and manifest.typical.eps,
        draw_threads=min(DRAWERS, usable_cpus()) if rig.device == "cuda" else 1,
    )
    found: Figures = {}
    for risk in RISKS:
        plan = VotePlan(samples=manifest.samples, risk=risk)
        images = np.resize(bundle.self_test.images, (rig.images, *manifest.input.shape))
        jobs = [Job(images[start : start + BATCH], plan) for start in range(0, rig.images, BATCH)]
        steps.run(jobs[:1])
        began, busy, counted, cast = time.perf_counter(), time.process_time(), 0, 0
        while (elapsed := time.perf_counter() - began) < rig.seconds or not counted:
            for result in steps.run(jobs):
                counted += len(result.outcomes)
                cast += sum(outcome.votes for outcome in result.outcomes)
        elapsed = time.perf_counter() - began
        found[f"risk {risk:g}"] = {
            "images/s": counted / elapsed,
            "votes/s": cast / elapsed,
            "votes per image": cast / counted,
            "us per image": 1e6 * elapsed / counted,
            "us of processors per image": 1e6 * (time.process_time() - busy) / counted,
        }
    return found


def http(rig: Rig, *, workers: int = 1) -> Figures:
    """Start the service, and put single images and batches to it. Several workers share one engine."""
    engine = {"CARSO_WORKERS": str(workers), "CARSO_ENGINE": "shared"} if workers > 1 else {}
    began = time.perf_counter()
    with _service(rig, **engine) as server:
        started: Figures = {"start to ready": {"seconds": time.perf_counter() - began}}
        return started | answers(rig, server)


def answers(rig: Rig, server: Server) -> Figures:
    """Put single images and batches to a service, on both paths, as fast as it answers."""
    bundle = rig.load()
    found: Figures = {"before these loads": _memory(held(server))}
    images, kind = _bodies(bundle)
    batch = _npy(np.resize(bundle.self_test.images, (BATCH, *bundle.manifest.input.shape)))
    singles = [(connections, images, kind, 1) for connections in rig.connections]
    batches = [(connections, [batch], NPY, BATCH) for connections in BATCH_CONNECTIONS]
    for connections, bodies, of, size in (*singles, *batches):
        for name, path in PATHS.items():
            load = _load(server, path, bodies, of, connections)
            (measured,) = drive([load], seconds=rig.seconds, warm_up=0)
            what = f"{name}, {connections} at a time" + (f", batches of {size}" if size > 1 else "")
            found[what] = _answered(measured, size)
    return found | {"after these loads": _memory(held(server))}


def leak(rig: Rig) -> Figures:
    """Start the service, and see whether it goes on taking memory."""
    with _service(rig) as server:
        return growing(rig, server)


def growing(rig: Rig, server: Server) -> Figures:
    """Put the robust path under load, and fit a line to the memory that the service holds meanwhile."""
    images, kind = _bodies(rig.load())
    load = _load(server, PATHS["robust"], images, kind, max(rig.connections))
    drive([load], seconds=rig.leak_seconds / 6, warm_up=0)  # first times are no leak
    with Watch(server, every=rig.leak_seconds / 60) as watch:
        (measured,) = drive([load], seconds=rig.leak_seconds, warm_up=0)
    seen = watch.seen
    found: Figures = {}
    for name, looks in (
        ("host", [(look.at, look.host) for look in seen]),
        ("all GPUs", [(look.at, look.device) for look in seen if look.device is not None]),
    ):
        if looks:
            at, megabytes = zip(*looks, strict=True)
            found[name] = {"MB first": megabytes[0], "MB last": megabytes[-1], "MB a minute": growth(at, megabytes)}
    return found | {"load": {"seconds": rig.leak_seconds, **_answered(measured, 1)}}


def steps(rig: Rig) -> dict[str, Callable[[Rig], Figures]]:
    """Return all steps by name, in the order in which they are of use should time run out."""

    def for_each(name: str, step: Callable[..., Figures]) -> dict[str, Callable[[Rig], Figures]]:
        return {f"{name} {way.name}": partial(step, way=way) for way in rig.ways}

    return {
        **for_each("start", start),
        "tests": tests,
        "votes": votes,
        "votes by PyTorch": torch_votes,
        **for_each("pipeline", pipeline),
        "http": http,
        f"http, {WORKERS} workers": partial(http, workers=WORKERS),
        "leak": leak,
    }


def _differing(cast: np.ndarray, other: np.ndarray) -> dict[str, float | str]:
    """Compare votes with others, of which there may be fewer."""
    return {"votes": float(len(other)), "that differ": float((cast[: len(other)] != other).sum())}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the service warns of meanwhile."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("carso")
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)


def _arrays(bundle: Bundle, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, code_index and latents of `rows` votes on the bundle's known codes, the same ones every time."""
    codes = bundle.self_test.codes
    latents = np.random.Generator(np.random.Philox(key=0)).standard_normal((rows, bundle.manifest.latent), np.float32)
    return codes, np.arange(rows) % len(codes), latents


def _median_us(way: Callable[[], object], seconds: float) -> float:
    """Return the median time of a run, in microseconds, of at least five, after three that do not count."""
    for _ in range(3):
        way()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        way()
        took.append(time.perf_counter() - began)
    return 1e6 * float(np.median(took))


@contextmanager
def _service(rig: Rig, **engine: str) -> Iterator[Server]:
    settings = engine | {"CARSO_DEVICE": rig.device, "CARSO_ROUND_ROWS": str(rig.round_rows), "CARSO_CANARY_S": "0"}
    with carso(rig.folder, **settings) as server:
        yield server


def _load(server: Server, path: str, bodies: list[bytes], kind: str, connections: int) -> Load:
    return Load(
        port=server.port,
        requests=[request(path, body, content_type=kind) for body in bodies],
        connections=connections,
    )


def _bodies(bundle: Bundle) -> tuple[list[bytes], str]:
    """Single images and their type: the clean samples that the bundle ships, or those of its self-test."""
    if bundle.samples is not None:
        clean = [sample.file for sample in bundle.samples.images if sample.kind == "none"]
        return [bundle.sample_files[file] for file in clean], PNG
    return [_npy(image) for image in bundle.self_test.images], NPY


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _answered(measured: Measured, size: int) -> dict[str, float | str]:
    if measured.failures:
        raise StepError(f"{measured.failures} requests failed, and {measured.answers} were answered")
    return {
        "images/s": size * measured.throughput,
        "p50, ms": measured.percentile(50),
        "p99, ms": measured.percentile(99),
    }


def _memory(now: Held) -> dict[str, float | str]:
    return {"host, MB": now.host} | ({} if now.device is None else {"all GPUs, MB": now.device})


if __name__ == "__main__":
    name, told, file = sys.argv[1:]
    rig = Rig.heard(told)
    Path(file).write_text(json.dumps(steps(rig)[name](rig)))
