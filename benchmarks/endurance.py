"""An hour at more than the service can do, with restarts and killed workers: python -m benchmarks.endurance

The load is the project's own client, as an open loop at 120 % of the rate that a closed loop of the same requests
reached in the same run. Half of the requests are sent by a client that retries (three times, its default), and half by
one that does not. Three tenths of the images are attacks on the service's time: images halfway between two digits,
which divide the votes, so that their elections run to the last of 1500 votes.

Every request has the seed of its image. So the service's answer is known to the vote, and each answer is compared.

First come the minutes with restarts (SIGTERM) and kills (SIGKILL of one worker). Then comes a fresh service that nobody
touches, since only processes that live for long show whether memory grows.
"""

from __future__ import annotations

import asyncio
import gc
import json as jsonlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import torch
import typer
from carso import AsyncClient, CarsoError, Client, RobustResult
from carso.bundle import Bundle
from carso.client.call import Call, R
from carso_training.datasets.mnist import MNIST

from benchmarks.digits import png_digits, png_of
from benchmarks.growth import MINUTE, Sample, Slope, between, within
from benchmarks.outcomes import Account, Attempt, Cause, Kill, Outcome, Restart, outcome_of
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.servers import STOP, Server, carso, free_port

WORKERS = 2
CONNECTIONS = 32  # of the closed loop that measures capacity
EACH = 8  # clients of each kind: what a client's pool of connections costs grows with their number
TRIED = 4  # images between digits, for each that is kept
WATCHDOG = 120.0  # seconds after which a request counts as hanging; the client's own limit is 60 for each wait
QUEUED = 1.0  # seconds of work that the queue takes, at the capacity that was measured
MAX_IMAGES = 64  # in one request, which the queue must have room for
TOO_LATE = 60.0  # seconds
SAMPLED = 10.0  # seconds between two looks at the memory
LOOK = 0.25  # seconds between two looks at whether a killed worker has been replaced
PATIENCE = 120.0  # seconds that a replacement may take
WARM_UP, LONG_WARM_UP = 60.0, 180.0  # seconds of a process's life that its slope leaves out: short lives, long ones
CLIENTS = {"without retries": 0, "with retries": 3}


@dataclass(frozen=True)
class Expected:
    """An image, and the answer that it must get."""

    body: bytes
    seed: int
    digest: str
    tally: tuple[int, ...]
    votes: int


_attempts: ContextVar[list[Attempt]] = ContextVar("attempts")


class Watched(AsyncClient):
    """The project's client, which also notes what comes of each attempt."""

    async def _attempt(self, call: Call[R], *, stream: bool = False) -> httpx.Response | httpx.RequestError:
        began = time.monotonic()
        came = await super()._attempt(call, stream=stream)
        error = "" if isinstance(came, httpx.Response) else f"{type(came).__name__}: {came}"
        _attempts.get().append(Attempt(began, time.monotonic(), outcome_of(came), error))
        return came


@dataclass
class Caller:
    """Sends requests by one client, and enters them in an account."""

    client: Watched
    account: Account

    async def call(self, expected: Expected, *, due: float) -> None:
        attempts: list[Attempt] = []
        _attempts.set(attempts)
        began = time.monotonic()
        try:
            async with asyncio.timeout(WATCHDOG):
                result = await self.client.classify(expected.body, seed=expected.seed)
        except TimeoutError:
            outcome = Outcome.HANG
        except CarsoError as e:
            outcome = attempts[-1].outcome if attempts[-1].outcome is not Outcome.ANSWERED else Outcome.OTHER
            if outcome is Outcome.OTHER:
                self.account.other[f"{type(e).__name__}: {e.error or e.message}"[:120]] += 1
        else:
            outcome = Outcome.ANSWERED
            self._compare(result, expected)
        self.account.add(attempts, outcome, due=due, began=began, ended=time.monotonic())

    def _compare(self, result: RobustResult, expected: Expected) -> None:
        (prediction,) = result.predictions
        if result.images != (expected.digest,):
            self.account.other_image += 1
        elif prediction.tally != expected.tally:
            self.account.other_count += 1


def traffic(images: Sequence[Expected], attacks: Sequence[Expected], *, share: float, seed: int) -> Iterator[Expected]:
    """Draw images without end, `share` of them attacks."""
    chance = random.Random(seed)
    while True:
        yield chance.choice(attacks if chance.random() < share else images)


async def capacity(url: str, drawn: Iterator[Expected], *, seconds: float) -> float:
    """Measure how many requests a second are answered while 32 are in flight all the time."""
    answered = 0
    end = time.monotonic() + seconds
    warm = end - 0.8 * seconds
    async with AsyncClient(url) as client:

        async def in_turn() -> None:
            nonlocal answered
            while time.monotonic() < end:
                expected = next(drawn)
                await client.classify(expected.body, seed=expected.seed)
                answered += warm <= time.monotonic() < end

        await asyncio.gather(*(in_turn() for _ in range(CONNECTIONS)))
    return answered / (0.8 * seconds)


async def offer(callers: Sequence[Caller], drawn: Iterator[Expected], *, rate: float, seconds: float) -> list[float]:
    """Send by a Poisson schedule to the callers in turn, wait for all that was sent, and return the lateness of each.

    Latencies count from the scheduled time, so a late generator is charged to the service. One that is too late ends
    the benchmark: a task group passes SystemExit on as it is, and wraps any other exception.
    """
    chance, lateness, turn = random.Random(1), [], 0
    due = time.monotonic()
    end = due + seconds
    async with asyncio.TaskGroup() as group:
        while due < end:
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            elif len(lateness) % 16 == 0:
                await asyncio.sleep(0)  # a late generator must not keep the answers waiting
            lateness.append(time.monotonic() - due)
            if lateness[-1] > TOO_LATE:
                raise SystemExit(
                    f"the generator is {lateness[-1]:.0f} s late, so the service is not what is measured: keep other "
                    "programs off this processor, or raise --attacks, which makes fewer requests as much work"
                )
            group.create_task(callers[turn].call(next(drawn), due=due))
            turn = (turn + 1) % len(callers)
            due += chance.expovariate(rate)
    return lateness


class Service:
    """The service at one port, life after life."""

    def __init__(self, bundle: Path, *, written: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._bundle, self._written = bundle, written
        self._settings = {"CARSO_WORKERS": str(WORKERS), "CARSO_DEVICE": "cpu", "CARSO_LOG_LEVEL": "warning"} | settings
        self._life = ExitStack()
        self.server: Server | None = None
        self.kills: list[Kill] = []
        self.restarts: list[Restart] = []

    def start(self, **settings: str) -> None:
        self._settings |= settings
        self.server = self._life.enter_context(
            carso(self._bundle, port=self.port, written=self._written, **self._settings)
        )

    def stop(self) -> None:
        """Tell it to stop, and wait until it has: at most STOP seconds, then it is killed."""
        self.server = None
        self._life.close()

    def restart(self) -> None:
        told = time.monotonic()
        self.stop()
        ended = time.monotonic()
        self.start()
        self.restarts.append(Restart(told, ended, time.monotonic()))

    def kill(self, chance: random.Random) -> None:
        """Kill one worker, and wait until another has taken its place."""
        assert self.server is not None
        victim = chance.choice(self.server.pids[1:])
        at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while time.monotonic() < at + PATIENCE:
            time.sleep(LOOK)
            with suppress(OSError):
                ready = self.server.metrics().get('carso_workers{state="ready"}')
                if ready == WORKERS and victim not in self.server.pids:
                    break
        self.kills.append(Kill(at, time.monotonic()))

    def sizes(self) -> dict[tuple[int, str], float]:
        """Return the resident bytes of each process, by its id and role."""
        found: dict[tuple[int, str], float] = {}
        if server := self.server:
            for pid in server.pids:
                with suppress(OSError):
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    found[pid, "supervisor" if pid == server.pid else "worker"] = float(
                        pages * os.sysconf("SC_PAGE_SIZE")
                    )
        return found


@contextmanager
def ended(service: Service) -> Iterator[Service]:
    """Stop the service at the end of the block."""
    try:
        yield service
    finally:
        service.stop()


@dataclass(frozen=True)
class Phase:
    """What came of one phase."""

    name: str
    rate: float  # requests a second that were offered
    seconds: float
    accounts: dict[str, Account]
    samples: list[Sample]
    lateness: float  # p99 of the generator's own, in seconds
    generator: float  # processors that it kept busy


async def phase(
    name: str,
    service: Service,
    drawn: Iterator[Expected],
    *,
    rate: float,
    seconds: float,
    events: Sequence[Coroutine[Any, Any, None]] = (),
) -> Phase:
    """Offer `rate` for `seconds`, beside the events, and look at the memory meanwhile."""
    samples: list[Sample] = []

    async def look() -> None:
        while True:
            at = time.monotonic()
            samples.extend(Sample(at, pid, role, size) for (pid, role), size in service.sizes().items())
            await asyncio.sleep(SAMPLED)

    began = time.monotonic()
    spent = time.process_time()
    accounts = {label: Account() for label in CLIENTS}
    callers = [
        Caller(Watched(service.url, retries=retries), accounts[label])
        for _ in range(EACH)
        for label, retries in CLIENTS.items()
    ]
    beside = [asyncio.create_task(each) for each in (look(), *events)]
    try:
        lateness = await offer(callers, drawn, rate=rate, seconds=seconds)
        await asyncio.gather(*beside[1:])
        if beside[0].done():
            beside[0].result()  # raises what ended it
    finally:
        for task in beside:
            task.cancel()
        for caller in callers:
            await caller.client.close()
    whole = time.monotonic() - began
    late = float(np.percentile(lateness, 99))
    return Phase(name, rate, whole, accounts, samples, late, (time.process_time() - spent) / whole)


async def restarting(service: Service, lock: asyncio.Lock, *, every: float, seconds: float) -> None:
    """Restart the service again and again, but not at the end."""
    began = time.monotonic()
    for turn in range(1, int(np.ceil(seconds / every))):
        await asyncio.sleep(max(0.0, began + turn * every - time.monotonic()))
        async with lock:
            await asyncio.to_thread(service.restart)


async def killing(service: Service, lock: asyncio.Lock, *, first: float, every: float, seconds: float) -> None:
    """Kill one worker again and again."""
    began, chance, turn = time.monotonic(), random.Random(2), 0
    while first + turn * every < seconds:
        await asyncio.sleep(max(0.0, began + first + turn * every - time.monotonic()))
        async with lock:
            await asyncio.to_thread(service.kill, chance)
        turn += 1


def between_digits(client: Client, *, count: int, halvings: int = 8) -> list[bytes]:
    """Return PNG files of images halfway between two test digits, where the robust label changes."""
    data = MNIST.load("test")
    draws = torch.Generator().manual_seed(3)
    rows = torch.randperm(len(data), generator=draws).numpy()
    pixels = data.images[:, 0].numpy().astype(np.float64)
    labels = data.labels.numpy()
    others = [(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True) if labels[a] != labels[b]][:count]
    first, second = (pixels[[pair[side] for pair in others]] for side in (0, 1))
    low, high = np.zeros(count), np.ones(count)

    def mixed(weight: np.ndarray) -> np.ndarray:
        w = weight[:, None, None]
        return np.rint((1 - w) * first + w * second).astype(np.uint8)

    def label(images: np.ndarray) -> np.ndarray:
        parts = np.array_split(images, int(np.ceil(len(images) / 32)))
        return np.array([p.label for part in parts for p in client.classify(part).predictions])

    start = label(mixed(low))
    for _ in range(halvings):
        middle = (low + high) / 2
        same = label(mixed(middle)) == start
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return [png_of(image) for image in mixed((low + high) / 2)]


def expected(client: Client, bodies: Sequence[bytes]) -> list[Expected]:
    """Ask the service, one image at a time, for the answers that it must give again."""
    found = []
    for seed, body in enumerate(bodies):
        result = client.classify(body, seed=seed)
        (prediction,) = result.predictions
        assert result.images and prediction.tally and prediction.votes
        found.append(Expected(body, seed, result.images[0], prediction.tally, prediction.votes))
    return found


def log_lines(written: Path) -> Counter[str]:
    """Count the warnings and errors in a log, by their message."""
    found: Counter[str] = Counter()
    for line in written.read_text(errors="replace").splitlines():
        try:
            entry = jsonlib.loads(line)
            found[f"{entry['level']}: {entry['message']}"] += 1
        except (ValueError, KeyError, TypeError):
            found[f"not of the log: {line[:100]}"] += 1
    return found


def show_requests(phases: Sequence[Phase], service: Service) -> None:
    shown = table(
        "requests by their outcome; latencies of answers from the scheduled time, in ms",
        *("phase", "client", "requests", *(outcome.value for outcome in Outcome)),
        *("recovered", "p50", "p99", "longest, s"),
    )
    for each in phases:
        for label, account in each.accounts.items():
            shown.add_row(
                each.name,
                label,
                str(account.requests),
                *(str(account.outcomes[outcome]) for outcome in Outcome),
                str(account.recovered),
                f"{account.percentile(50):.0f}",
                f"{account.percentile(99):.0f}",
                f"{account.longest:.1f}",
            )
    console.print(shown)
    broken = table("broken connections, by what explains them", "phase", "client", *(cause.value for cause in Cause))
    for each in phases:
        for label, account in each.accounts.items():
            causes = account.causes(service.kills, service.restarts)
            broken.add_row(each.name, label, *(str(causes[cause]) for cause in Cause))
    console.print(broken)


def show_growth(slopes: dict[str, Slope], levels: dict[str, float]) -> None:
    shown = table(
        "resident memory: slopes through the means of minutes, with 95 % intervals",
        *("what", "processes", "minutes", "mean, MB", "MB per hour"),
    )
    for what, slope in slopes.items():
        mb = (f"{value / 1e6:+.1f}" for value in (slope.per_hour, slope.low, slope.high))
        middle, low, high = mb
        shown.add_row(
            what, str(slope.processes), str(slope.minutes), f"{levels[what] / 1e6:.0f}", f"{middle} [{low}, {high}]"
        )
    console.print(shown)


def growth(phases: Sequence[Phase]) -> tuple[dict[str, Slope], dict[str, float]]:
    """Return the slopes, and the mean sizes that they belong to."""
    slopes, levels = {}, {}
    restarted, steady = phases[0].samples, phases[-1].samples
    for role in ("supervisor", "worker"):
        of_role = [sample for sample in restarted if sample.role == role]
        alone = [sample for sample in steady if sample.role == role]
        made = {
            f"{role}, while restarted, within a life": (within(of_role, warm_up=WARM_UP), of_role),
            f"{role}, while restarted, from life to life": (between(of_role, warm_up=WARM_UP), of_role),
        }
        for number, pid in enumerate(sorted({sample.pid for sample in alone}), start=1):
            life = [sample for sample in alone if sample.pid == pid]
            name = f"{role}, left alone" if role == "supervisor" else f"{role} {number}, left alone"
            made[name] = within(life, warm_up=LONG_WARM_UP), life
        for what, (slope, samples) in made.items():
            slopes[what] = slope
            levels[what] = float(np.mean([sample.bytes for sample in samples])) if samples else float("nan")
    return slopes, levels


def show_claims(phases: Sequence[Phase], service: Service) -> dict[str, str]:
    """Print and return what was promised, and what was found."""
    accounts = [account for each in phases for account in each.accounts.values()]
    retrying = [each.accounts["with retries"] for each in phases]
    causes = sum((account.causes(service.kills, service.restarts) for account in accounts), Counter[Cause]())
    stops = [restart.ended - restart.told for restart in service.restarts]
    starts = [restart.ready - restart.ended for restart in service.restarts]
    replaced = [kill.replaced - kill.at for kill in service.kills]
    answered = sum(account.outcomes[Outcome.ANSWERED] for account in accounts)
    found = {
        "requests": f"{sum(account.requests for account in accounts)}, of which {answered} were answered",
        "accepted requests lost, not by a kill": str(causes[Cause.NONE]),
        "connections broken by kills": f"{causes[Cause.KILL]}, by {len(service.kills)} kills",
        "of these, not recovered by the client that retries": str(
            sum(account.outcomes[Outcome.BROKEN] for account in retrying)
        ),
        "connections broken before a stopping service took them": str(causes[Cause.STOP]),
        "requests that the watchdog ended": str(sum(account.outcomes[Outcome.HANG] for account in accounts)),
        "longest request, s": f"{max(account.longest for account in accounts):.1f}",
        "answers of another image": str(sum(account.other_image for account in accounts)),
        "answers with other votes": str(sum(account.other_count for account in accounts)),
        f"restarts: seconds from SIGTERM to the end (killed at {STOP:.0f})": _range(stops),
        "restarts: seconds until ready again": _range(starts),
        "kills: seconds until all workers are ready again": _range(replaced),
        "the generator's own lateness, p99, s": ", ".join(f"{each.lateness:.2f}" for each in phases),
        "processors that the generator kept busy": ", ".join(f"{each.generator:.2f}" for each in phases),
    }
    shown = table("in short", "what", "figure")
    for what, figure in found.items():
        shown.add_row(what, figure)
    console.print(shown)
    return found


def _range(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return f"{len(values)} times, {min(values):.1f} to {max(values):.1f}, median {np.median(values):.1f}"


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    minutes: Annotated[float, typer.Option(min=0.1, help="With restarts and kills.")] = 40.0,
    alone: Annotated[float, typer.Option(min=0.1, help="Minutes after that without any.")] = 20.0,
    restart_every: Annotated[float, typer.Option(min=0.05, help="Minutes.")] = 5.0,
    kill_every: Annotated[float, typer.Option(min=0.05, help="Minutes; the first after half a restart's.")] = 10.0,
    share: Annotated[float, typer.Option(min=0.01, max=5, help="Of the capacity that is offered.")] = 1.2,
    attacks: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that are attacks.")] = 0.3,
    seconds: Annotated[float, typer.Option(min=1, help="Of the closed loop that measures the capacity.")] = 30.0,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Different clean images sent.")] = 300,
    ambiguous: Annotated[int, typer.Option(min=1, max=1000, help="Different attacking images sent.")] = 40,
    json: JsonFile = None,
) -> None:
    loaded = Bundle.load(bundle)
    known = begin("endurance", loaded)
    with tempfile.TemporaryDirectory() as folder, progress_console.status("") as status:
        written = Path(folder) / "log"
        with ended(Service(bundle, written=written)) as service:
            status.update("the answers that each image must get")
            service.start()
            with Client(service.url) as client:
                clean = expected(client, png_digits(images))
                tried = expected(client, between_digits(client, count=TRIED * ambiguous))
            hard = sorted(tried, key=lambda each: -each.votes)[:ambiguous]
            service.stop()
            drawn = traffic(clean, hard, share=attacks, seed=4)
            votes = {"attacks": [each.votes for each in hard], "clean": [each.votes for each in clean]}
            means = ", of ".join(f"{name}: {np.mean(counts):.1f}" for name, counts in votes.items())
            console.print(f"mean votes of {means}", highlight=False)
            gc.freeze()

            async def begun() -> float:
                """Start the service with room for the work of a second, and return the rate to offer."""
                status.update("capacity")
                await asyncio.to_thread(service.start)
                most = await capacity(service.url, drawn, seconds=seconds)
                await asyncio.to_thread(service.stop)
                rows = max(int(QUEUED * most), MAX_IMAGES) * (loaded.manifest.samples + 1)
                console.print(
                    f"capacity {most:.1f} requests/s with {CONNECTIONS} in flight; offered: {share * most:.1f}; "
                    f"CARSO_QUEUE_ROWS={rows}",
                    highlight=False,
                )
                limits = {"CARSO_QUEUE_ROWS": str(rows), "CARSO_MAX_SAMPLES": str(loaded.manifest.samples)}
                await asyncio.to_thread(service.start, **limits)
                return share * most

            async def both() -> list[Phase]:
                lock, first, last = asyncio.Lock(), MINUTE * minutes, MINUTE * alone
                every = MINUTE * restart_every
                kills = {"first": every / 2, "every": MINUTE * kill_every, "seconds": first}
                rate = await begun()
                status.update(f"{minutes:g} minutes with restarts and kills")
                events = [
                    restarting(service, lock, every=every, seconds=first),
                    killing(service, lock, **kills),
                ]
                disturbed = await phase("restarted", service, drawn, rate=rate, seconds=first, events=events)
                await asyncio.to_thread(service.stop)
                rate = await begun()
                status.update(f"{alone:g} minutes left alone")
                return [disturbed, await phase("left alone", service, drawn, rate=rate, seconds=last)]

            phases = asyncio.run(both())
        lines = log_lines(written)
    show_requests(phases, service)
    slopes, levels = growth(phases)
    show_growth(slopes, levels)
    for line, count in lines.most_common():
        console.print(f"log, {count} times: {line}", highlight=False)
    claims = show_claims(phases, service)
    keep(
        json,
        known=known,
        options={
            "minutes": minutes,
            "alone": alone,
            "restart_every": restart_every,
            "kill_every": kill_every,
            "share": share,
            "attacks": attacks,
            "seconds": seconds,
            "images": images,
            "ambiguous": ambiguous,
        },
        results={
            "votes": votes,
            "phases": [_of(each, service) for each in phases],
            "kills": [asdict(kill) for kill in service.kills],
            "restarts": [asdict(restart) for restart in service.restarts],
            "growth": {what: asdict(slope) | {"mean": levels[what]} for what, slope in slopes.items()},
            "log": dict(lines),
            "in short": claims,
        },
    )


def _of(each: Phase, service: Service) -> dict[str, Any]:
    """Return what is kept of a phase: counts, percentiles and samples, but not every latency."""
    accounts = {}
    for label, account in each.accounts.items():
        accounts[label] = {
            **{name: value for name, value in vars(account).items() if name != "latencies"},
            "broken": [asdict(attempt) for attempt in account.broken],
            "causes": account.causes(service.kills, service.restarts),
            **{f"p{percent}": account.percentile(percent) for percent in (50, 90, 99, 99.9, 100)},
        }
    samples = [(round(sample.at, 1), sample.pid, sample.role, sample.bytes) for sample in each.samples]
    return {
        "name": each.name,
        "rate": each.rate,
        "seconds": each.seconds,
        "lateness": each.lateness,
        "generator": each.generator,
        "accounts": accounts,
        "samples": samples,
    }


if __name__ == "__main__":
    typer.run(main)
