"""The service beside other serving frameworks, with the same system behind each: python -m benchmarks.peers

All have the same graphs, runtime, stopping rule, images and client, and are configured as their documentation says:
batching is on, with a process of one thread for each processor. `system.py` is what a user of a framework would write,
and each `with_*.py` is one framework's server. Every framework has a virtual environment of its own, which is made in a
cache folder at the first run, with the versions below. One that cannot be installed or started is named and left out.

One server runs at a time. A repetition starts each of them once, in an order that turns.
"""

from __future__ import annotations

import base64
import json as jsonlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from carso import Client
from carso.bundle import VOTE, VOTE_INT8, Bundle
from carso.inference.processors import usable_cpus

from benchmarks.digits import png_digits
from benchmarks.load import Load, drive, request
from benchmarks.phases import Phase, Target, measure, median, series
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.servers import Server, ServerError, carso, free_port, started

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "carso" / "peers"
CONNECTIONS = (1, 8, 32, 128)
FIRST = 20  # images that are answered one by one, before the measurements
OVERLOAD = 2.0  # of the best throughput
OVERLOAD_CONNECTIONS = 1024


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One framework: what to install, how to start it, and how to ask it."""

    packages: tuple[str, ...]
    command: tuple[str, ...]  # below the environment's bin; {port} and {folder}, an empty one, are filled in
    ready: str
    path: str
    ask: Callable[[str], object] | None = None  # the JSON to send for an image in base64; None: the file itself
    label: Callable[[Any], int]  # from the JSON of an answer
    before: tuple[str, ...] = ()  # a command to run first


PEERS = {
    "FastAPI": Peer(
        packages=("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
        command=("python", "with_fastapi.py"),
        ready="/health",
        path="/classify",
        label=lambda answer: answer["label"],
    ),
    "LitServe": Peer(
        packages=("litserve==0.2.19",),
        command=("python", "with_litserve.py"),
        ready="/health",
        path="/predict",
        ask=lambda image: {"image": image},
        label=lambda answer: answer["label"],
    ),
    "BentoML": Peer(
        packages=("bentoml==1.4.40",),
        command=("bentoml", "serve", "with_bentoml:Peer", "--host", "127.0.0.1", "--port", "{port}"),
        ready="/readyz",
        path="/classify",
        ask=lambda image: {"images": [image]},
        label=lambda answer: answer[0]["label"],
    ),
    "mosec": Peer(
        packages=("mosec==0.9.8",),
        command=("python", "with_mosec.py", "--address", "127.0.0.1", "--port", "{port}", "--log-level", "warning"),
        ready="/",
        path="/inference",
        label=lambda answer: answer["label"],
    ),
    "Ray Serve": Peer(
        packages=("ray[serve]==2.60.0",),
        command=("python", "with_ray.py"),
        ready="/-/healthz",
        path="/classify",
        label=lambda answer: answer["label"],
    ),
    "MLServer": Peer(
        packages=("mlserver==1.7.1", "uvloop==0.21.0"),  # with later ones its workers do not start
        before=("python", "with_mlserver.py", "{folder}"),
        command=("mlserver", "start", "{folder}"),
        ready="/v2/models/peer/ready",  # the whole server says that it is ready before its model is
        path="/v2/models/peer/infer",
        ask=lambda image: {
            "inputs": [
                {
                    "name": "images",
                    "shape": [1, 1],
                    "datatype": "BYTES",
                    "parameters": {"content_type": "base64"},
                    "data": [image],
                }
            ]
        },
        label=lambda answer: int(np.argmax(answer["outputs"][0]["data"])),
    ),
}


@dataclass(frozen=True)
class Contender:
    """A server that can be started, and what to send it."""

    name: str
    start: Callable[[], AbstractContextManager[Server]]
    requests: Sequence[bytes]
    path: str
    bodies: Sequence[tuple[str, bytes]]  # content type and body
    label: Callable[[Any], int]


@dataclass(frozen=True, kw_only=True)
class Life:
    """What one start of a server took."""

    server: str
    repetition: int
    seconds: float  # until the first answer to a classification
    idle: float  # bytes of all processes; pages that they share are counted once
    loaded: float  # the same after the closed loops
    right: int  # of the FIRST answers


@dataclass(frozen=True, kw_only=True)
class Overload:
    """What became of twice as many requests as a server can answer. Latencies in milliseconds, from the schedule."""

    server: str
    asked: float  # requests a second
    answered: float  # a second
    p50: float
    p99: float
    statuses: dict[int, int]
    lost: int  # connections that ended without an answer
    unanswered: int  # ten seconds after the last request


class NotInstalled(Exception):  # noqa: N818  of a package, not of the program
    """A framework that cannot be installed here. The message is the installer's last line."""


def environment_of(name: str, packages: Sequence[str], cache: Path) -> Path:
    """Return the bin folder of an environment with these packages, and make it if it is not there.

    Raises NotInstalled.
    """
    common = [f"{package}=={version(package)}" for package in ("numpy", "pillow")] + [f"onnxruntime=={runtime()}"]
    wanted = "\n".join((*packages, *common, sys.version))
    folder = cache / name.lower().replace(" ", "-")
    note = folder / "packages.txt"
    if note.is_file() and note.read_text() == wanted:
        return folder / "bin"
    shutil.rmtree(folder, ignore_errors=True)
    uv = shutil.which("uv")
    commands = (
        [[uv, "venv", "-q", "-p", sys.executable, str(folder)], [uv, "pip", "install", "-q", "-p", str(folder)]]
        if uv
        else [
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"],
        ]
    )
    for command in (commands[0], [*commands[1], *packages, *common]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotInstalled(next(iter(reversed(done.stderr.strip().splitlines())), f"exit status {done.returncode}"))
    note.write_text(wanted)
    return folder / "bin"


def runtime() -> str:
    """Return the version of ONNX Runtime here, under whichever name it is installed."""
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return version("onnxruntime-gpu")


def contender(
    name: str, peer: Peer, images: Sequence[bytes], *, settings: dict[str, str], cache: Path, scratch: Path
) -> Contender:
    """Prepare a framework. Raises NotInstalled."""
    folder = environment_of(name, peer.packages, cache)
    made = scratch / folder.parent.name
    made.mkdir()
    port = free_port()
    given = settings | {"PEER_PORT": str(port), "PYTHONPATH": str(HERE), "BENTOML_DO_NOT_TRACK": "True"}
    given |= {"RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin"}

    def filled(command: Sequence[str]) -> list[str]:
        program, *arguments = (part.format(port=port, folder=made) for part in command)
        return [str(folder / program), *arguments]

    if peer.before:
        subprocess.run(filled(peer.before), cwd=HERE, check=True, env=given)
    bodies = [asked(peer, image) for image in images]
    return Contender(
        name=f"{name} {peer.packages[0].partition('==')[2]}",
        start=partial(started, filled(peer.command), ready=peer.ready, environment=given, port=port, folder=HERE),
        requests=[request(peer.path, body, content_type=kind) for kind, body in bodies],
        path=peer.path,
        bodies=bodies,
        label=peer.label,
    )


def asked(peer: Peer, image: bytes) -> tuple[str, bytes]:
    """Return the content type and the body that ask for an image."""
    if peer.ask is None:
        return "image/png", image
    return "application/json", jsonlib.dumps(peer.ask(base64.b64encode(image).decode())).encode()


def ours(name: str, images: Sequence[bytes], *, bundle: Path, risk: float, workers: str) -> Contender:
    path = f"/classify?risk={risk:g}"
    bodies = [("image/png", image) for image in images]
    return Contender(
        name=name,
        start=partial(carso, bundle, CARSO_WORKERS=workers, CARSO_DEVICE="cpu"),
        requests=[request(path, body, content_type=kind) for kind, body in bodies],
        path=path,
        bodies=bodies,
        label=lambda answer: answer["predictions"][0]["label"],
    )


def answer_to(server: Server, one: Contender, index: int) -> int:
    """Ask for one image, and return its label."""
    kind, body = one.bodies[index]
    call = urllib.request.Request(f"http://127.0.0.1:{server.port}{one.path}", body, {"content-type": kind})
    with urllib.request.urlopen(call, timeout=30) as answer:  # noqa: S310
        return one.label(jsonlib.load(answer))


def memory(server: Server) -> float:
    """Return the bytes of all processes of a server, with those that several share counted once."""
    total = 0
    for pid in server.pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    return float(total)


def overload(server: Server, one: Contender, *, rate: float, seconds: float) -> Overload:
    """Send `rate` requests a second for `seconds`, whatever the server does."""
    load = Load(port=server.port, requests=one.requests, connections=OVERLOAD_CONNECTIONS, rate=rate)
    (measured,) = drive([load], seconds=seconds, warm_up=0.0)
    return Overload(
        server=one.name,
        asked=rate,
        answered=measured.throughput,
        p50=measured.percentile(50),
        p99=measured.percentile(99),
        statuses=dict(measured.statuses),
        lost=measured.lost,
        unanswered=measured.unanswered,
    )


def live(
    one: Contender, labels: Sequence[int], *, repetition: int, seconds: float, flood: float
) -> tuple[Life, list[Phase], Overload | None]:
    """Start a server, measure it, and stop it. `flood`: seconds of the overload; 0: there is none."""
    began = time.perf_counter()
    with one.start() as server:
        found = [answer_to(server, one, 0)]
        until = time.perf_counter() - began
        found += [answer_to(server, one, index) for index in range(1, FIRST)]
        idle = memory(server)
        target = Target(one.name, server, one.requests)
        phases = [
            measure(target, target.load(connections=count), kind="closed", repetition=repetition, seconds=seconds)
            for count in CONNECTIONS
        ]
        life = Life(
            server=one.name,
            repetition=repetition,
            seconds=until,
            idle=idle,
            loaded=memory(server),
            right=sum(a == b for a, b in zip(found, labels, strict=False)),
        )
        best = max(phase.throughput for phase in phases)
        flooded = overload(server, one, rate=OVERLOAD * best, seconds=flood) if flood and best else None
    return life, phases, flooded


def show(lives: Sequence[Life], phases: Sequence[Phase], floods: Sequence[Overload]) -> None:
    names = list(dict.fromkeys(life.server for life in lives))
    shown = table(
        "closed loop: medians over repetitions; answers a second, and in brackets p50 and p99 in ms",
        *("server", *(f"{count} connection{'s' if count > 1 else ''}" for count in CONNECTIONS)),
        *("failed", "start, s", "MB idle", "MB loaded", f"right of {FIRST}"),
    )
    for name in names:
        cells = []
        for count in CONNECTIONS:
            of = {"target": name, "setting": count}
            p50, p99 = (median(phases, field, **of) for field in ("p50", "p99"))
            cells.append(f"{median(phases, 'throughput', **of):.0f} ({p50:.1f}, {p99:.1f})")
        mine = [life for life in lives if life.server == name]
        shown.add_row(
            name,
            *cells,
            str(int(series(phases, "failures", target=name).sum())),
            f"{np.median([life.seconds for life in mine]):.1f}",
            *(f"{np.median([getattr(life, field) for life in mine]) / 1e6:.0f}" for field in ("idle", "loaded")),
            str(min(life.right for life in mine)),
        )
    console.print(shown)
    flooded = table(
        f"open loop: {OVERLOAD:g} times the best of these, over at most {OVERLOAD_CONNECTIONS} connections",
        *("server", "asked/s", "answered/s", "p50, ms", "p99, ms", "statuses", "lost", "unanswered after 10 s"),
    )
    for flood in floods:
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(flood.statuses.items()))
        rates = (f"{value:.0f}" for value in (flood.asked, flood.answered, flood.p50, flood.p99))
        flooded.add_row(flood.server, *rates, statuses, str(flood.lost), str(flood.unanswered))
    console.print(flooded)


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    repetitions: Annotated[int, typer.Option(min=1)] = 2,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of one phase, after half a second's warm-up.")] = 2.0,
    flood: Annotated[float, typer.Option(min=0, help="Seconds of the overload, once for each server.")] = 5.0,
    risk: Annotated[float, typer.Option(min=0, max=0.5, help="Of early stopping, for all.")] = 1e-3,
    images: Annotated[int, typer.Option(min=FIRST, max=10_000, help="Different images sent.")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="Names of frameworks: only these.")] = None,
    cache: Annotated[Path, typer.Option(help="Where the environments are.")] = CACHE,
    json: JsonFile = None,
) -> None:
    known = begin("peers", Bundle.load(bundle))
    bodies, skipped = png_digits(images), {}
    contenders = [
        ours("carso", bodies, bundle=bundle, risk=risk, workers="1"),
        ours("carso, workers", bodies, bundle=bundle, risk=risk, workers="auto"),
    ]
    with contenders[0].start() as server:
        labels = [answer_to(server, contenders[0], index) for index in range(FIRST)]
        with Client(f"http://127.0.0.1:{server.port}") as client:
            precision = client.info().device.precision
    settings = {
        "PEER_BUNDLE": str(bundle.absolute()),
        "PEER_VOTE": VOTE_INT8 if precision == "int8" else VOTE,
        "PEER_WORKERS": str(usable_cpus()),
        "PEER_THREADS": "1",
        "PEER_RISK": str(risk),
    }
    lives: list[Life] = []
    phases: list[Phase] = []
    floods: list[Overload] = []
    with tempfile.TemporaryDirectory() as scratch, progress_console.status("") as status:
        for name, peer in PEERS.items():
            if only and name not in only:
                continue
            status.update(f"installing {name}")
            try:
                made = contender(name, peer, bodies, settings=settings, cache=cache, scratch=Path(scratch))
            except NotInstalled as e:
                skipped[name] = f"not installed: {e}"
            else:
                contenders.append(made)
        for repetition in range(repetitions):
            turn = repetition % len(contenders)
            for one in contenders[turn:] + contenders[:turn]:
                status.update(f"repetition {repetition + 1} of {repetitions}: {one.name}")
                last = repetition == repetitions - 1
                try:
                    life, found, flooded = live(
                        one, labels, repetition=repetition, seconds=seconds, flood=flood if last else 0
                    )
                except (OSError, ValueError, LookupError, ServerError) as e:  # it ends, hangs, or answers otherwise
                    skipped[one.name] = f"it failed: {str(e)[-500:]}"
                    continue
                lives.append(life)
                phases += found
                floods += [flooded] if flooded else []
    show(lives, phases, floods)
    for name, reason in skipped.items():
        console.print(f"{name}: {reason}", highlight=False)
    keep(
        json,
        known=known,
        options={"repetitions": repetitions, "seconds": seconds, "flood": flood, "risk": risk, "images": images},
        results={
            "precision": precision,
            "packages": {name: peer.packages for name, peer in PEERS.items()},
            "lives": [asdict(life) for life in lives],
            "phases": [asdict(phase) for phase in phases],
            "overload": [asdict(flooded) for flooded in floods],
            "skipped": skipped,
        },
    )


if __name__ == "__main__":
    typer.run(main)
