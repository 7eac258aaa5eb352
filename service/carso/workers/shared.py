"""The process that has the one engine of a service with several workers, and takes their jobs."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from carso.board.whole import State
from carso.bundle import Bundle
from carso.choices import PathName
from carso.inference.abilities import Abilities
from carso.inference.canary import Canary, canary_of
from carso.inference.engine import Engine, EngineError
from carso.inference.jobs import News, Result
from carso.inference.loading import pipeline_of
from carso.inference.remote import Asked, Failed, Left, Told
from carso.inference.thread import InThread
from carso.inference.wire import Unpacker, packed
from carso.settings import Settings
from carso.signing import public_key
from carso.telemetry.metrics import Metrics
from carso.telemetry.workers import registries
from carso.workers.worker import Worker

log = logging.getLogger(__name__)

LOOK = 0.1  # seconds between two reports to the supervisor, and to workers that wait
SLOW = 1.0  # seconds: a step that takes longer is not reported
MOST_UNREAD = 256 * 2**20  # bytes of answers to one worker: more wait only for one that has stood still for long


class SharedEngine:
    """Has an engine run the jobs of several workers."""

    def __init__(self, engine: Engine, abilities: Abilities) -> None:
        self._engine = engine
        self._abilities = abilities
        self._connections: set[_Connection] = set()

    async def open(self, connection: socket.socket) -> None:
        """Take the jobs of another worker over this connection."""
        connection.setblocking(False)
        link = _Connection(self._engine, self._abilities, closed=self._connections.discard)
        self._connections.add(link)
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=connection)

    @property
    def connections(self) -> int:
        """How many workers there are."""
        return len(self._connections)

    def beat(self) -> None:
        """Tell the workers that wait for long that the engine gets on, if it does."""
        if not self._engine.stalled(SLOW):
            for connection in self._connections:
                connection.beat()


class _Connection(asyncio.Protocol):
    """The connection to one worker."""

    def __init__(self, engine: Engine, abilities: Abilities, *, closed: Callable[[_Connection], None]) -> None:
        self._engine = engine
        self._abilities = abilities
        self._closed = closed
        self._unpacker = Unpacker()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._news: list[tuple[int, News]] = []  # of this turn of the event loop; told together at its end
        self._results: list[tuple[int, Result]] = []
        self._tells = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._link = cast(asyncio.Transport, transport)
        self._send(self._abilities)

    def data_received(self, data: bytes) -> None:
        for messages in self._unpacker.feed(data):
            for message in messages:
                match message:
                    case Asked(number):
                        task = self._running[number] = asyncio.create_task(self._run(message))
                        task.add_done_callback(partial(self._forget, number))
                    case Left(number) if number in self._running:
                        self._running[number].cancel()

    def connection_lost(self, error: Exception | None) -> None:
        for task in self._running.values():
            task.cancel()
        self._closed(self)

    def beat(self) -> None:
        """Say that the engine gets on with the jobs of this worker, if there are any."""
        if self._running:
            self._tell()

    async def _run(self, asked: Asked) -> None:
        follow = partial(self._note, asked.number) if asked.followed else None
        try:
            result = await self._engine.run(asked.job, follow=follow, kinds=asked.followed)
        except EngineError as e:
            self._send(Failed(str(e)))
        else:
            self._results.append((asked.number, result))
            self._tell_soon()

    def _forget(self, number: int, task: asyncio.Task[None]) -> None:
        del self._running[number]

    def _note(self, number: int, news: News) -> None:
        self._news.append((number, news))
        self._tell_soon()

    def _tell_soon(self) -> None:
        if not self._tells:
            self._tells = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        paces: Mapping[PathName, float] = {path: each.pace for path, each in self._engine.admission.items()}
        self._send(Told(self._news, self._results, paces))
        self._news, self._results, self._tells = [], [], False

    def _send(self, message: object) -> None:
        if self._link.is_closing():
            return
        self._link.writelines(packed(message))
        if self._link.get_write_buffer_size() > MOST_UNREAD:
            log.error("a worker has read none of its answers for long: its connection to the engine ends")
            self._link.abort()


async def _serve(
    worker: Worker, engine: Engine, abilities: Abilities, canary: Canary | None, *, watchdog: float
) -> None:
    """Run the engine for the workers whose connections the supervisor sends, until it says to end.

    If the supervisor is gone, this ends with the last worker. It ends too if the engine fails, or is stuck for more
    than `watchdog` seconds: then another process takes its place.
    """
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    shared, opening = SharedEngine(engine, abilities), set[asyncio.Task[None]]()
    is_orphan = False

    def take(connection: socket.socket) -> None:
        task = loop.create_task(shared.open(connection))
        opening.add(task)
        task.add_done_callback(opening.discard)

    def lose() -> None:
        nonlocal is_orphan
        is_orphan = True

    def state() -> State:
        return State.FAILED if not engine.alive or engine.stalled(watchdog) else State.READY

    engine.start()
    watching = None if canary is None else loop.create_task(canary.run())
    served: dict[str, object] = {"provider": abilities.provider, "precision": abilities.precision.precision}
    worker.begin(served=served, state=state, reload=lambda: None, stop=lose, take=take)
    while not over.is_set() and worker.goes_on():
        if is_orphan and not shared.connections:
            break
        shared.beat()
        try:
            await asyncio.wait_for(over.wait(), LOOK)
        except TimeoutError:
            continue
    if watching is not None:
        watching.cancel()
    await engine.stop()


def run(settings: Settings, worker: Worker) -> None:
    """Be the process of the engine that all workers share, until the supervisor says to end.

    Raises BundleError, DeviceError, SettingsError.
    """
    bundle = Bundle.load(settings.bundle, key=public_key(settings))
    pipeline, thread = pipeline_of(bundle, settings)
    abilities = pipeline.sessions.abilities
    whole = worker.whole
    metrics = Metrics(bundle, abilities, device=settings.device, whole=whole, registries=registries(whole))
    engine = Engine(InThread(pipeline, thread=thread, observe=metrics.step))
    canary = canary_of(bundle, engine, every=settings.canary_s, whole=whole)
    asyncio.run(_serve(worker, engine, abilities, canary, watchdog=settings.watchdog_s))
