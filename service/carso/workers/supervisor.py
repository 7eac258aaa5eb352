"""The supervisor: starts the workers, replaces those that die, and passes on what it is told to do.

It serves nothing itself, and imports neither the application nor ONNX Runtime. Each worker is a process of its own
program, started by the same command. All of them take connections from the same sockets, which the supervisor opened:
so a connection that the kernel has accepted waits for any of them, and is lost with none.
"""

from __future__ import annotations

import json
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from carso.board.seat import Board
from carso.board.whole import State
from carso.http.listening import urls
from carso.settings import Settings
from carso.version import __version__
from carso.workers.worker import LOST_ENGINE, VARIABLE

log = logging.getLogger(__name__)

CANNOT_START = 1
STARTS = 3  # that fail one after the other before the whole service ends
PAUSE = 1.0  # seconds before a start is tried again, times how many have failed
LOOK = 1.0  # seconds between two looks at the workers
SILENCE = 5.0  # seconds beyond CARSO_WATCHDOG_S that an event loop may stand still
PROOF = 3.0  # seconds for which it is seen so: when a paused machine goes on, all have stood still for a moment
GRACE = 5.0  # seconds beyond CARSO_DRAIN_TIMEOUT_S after which a worker is killed


class Ended(Exception):  # noqa: N818
    """The service ends because its workers cannot start. The message is theirs."""

    def __init__(self, message: str, status: int) -> None:
        """`status`: with which the process should exit."""
        super().__init__(message)
        self.status = status


@dataclass
class _Process:
    running: subprocess.Popen[bytes]
    channel: socket.socket
    told: bytes = b""
    served: dict[str, Any] | None = None  # what it serves; None: it is not ready yet
    refused: str | None = None  # why it cannot start
    silent_since: float = math.inf  # when its event loop was first found standing still

    def signal(self, number: int) -> None:
        """Send it a signal. Popen's own method would first ask whether it has ended, and so bury it unseen."""
        os.kill(self.running.pid, number)  # it is there until it is buried

    def listen(self) -> None:
        """Read what it tells."""
        try:
            while part := self.channel.recv(65536):
                self.told += part
        except BlockingIOError:
            pass
        except OSError as e:  # it was killed, and had not read all
            log.debug("a worker tells no more: %s", e)
        *lines, self.told = self.told.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.served = message.get("ready", self.served)
            self.refused = message.get("refused", self.refused)


@dataclass
class Supervisor:
    """Runs the workers of one service.

    Where they share an engine, its process starts first and ends last. If it ends otherwise, so do the workers, by
    themselves, and all are replaced.
    """

    board: Board
    settings: Settings
    sockets: list[socket.socket]  # bound; the first worker that is ready listens
    shares_engine: bool = False
    _running: dict[int, _Process] = field(default_factory=dict)  # by the worker's number
    _waiting: set[int] = field(default_factory=set)  # workers, for an engine
    _due: dict[int, float] = field(default_factory=dict)  # when a start is tried again, by the worker's number
    _failed: int = 0  # starts, one after the other
    _was_ready: set[int] = field(default_factory=set)
    _signals: deque[int] = field(default_factory=deque)
    _kill_at: float = math.inf  # on the clock of time.monotonic
    _end: Ended | None = None

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, and drain. Raises Ended."""
        self._addresses = urls(self.sockets)
        awake, wake = socket.socketpair()
        for end in (awake, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._note)
        with selectors.DefaultSelector() as selector, awake, wake:
            self._selector = selector
            selector.register(awake, selectors.EVENT_READ)
            if self.shares_engine:
                self._start(self.board.engine)
            for worker in range(1, self.board.workers + 1):
                self._start(worker)
            while self._running or self._due or self._waiting:
                for key, _ in selector.select(self._pause()):
                    if key.fileobj is awake:
                        awake.recv(65536)
                self._obey()
                self._listen()
                self._bury()
                self._look()
            signal.set_wakeup_fd(-1)
        if self._end is not None:
            raise self._end

    @property
    def _stopping(self) -> bool:
        return self.board.draining

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _obey(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number == signal.SIGHUP:
                self.board.reload()
            elif number != signal.SIGCHLD:
                self._stop()

    def _start(self, worker: int) -> None:
        """Start a worker, or let it wait until there is the engine that it needs."""
        self._due.pop(worker, None)
        has_engine, sockets, inherited = worker == self.board.engine, self.sockets, list[int]()
        given: dict[str, Any] = {"number": worker, "board": self.board.memory.descriptor}
        with ExitStack() as stack:
            if has_engine:
                sockets = []
            elif self.shares_engine:
                engine = self._running.get(self.board.engine)
                if engine is None or engine.served is None:
                    self._waiting.add(worker)
                    return
                given["engine"] = stack.enter_context(self._connected(engine)).fileno()
                inherited.append(given["engine"])
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            ours.setblocking(False)
            given |= {"channel": theirs.fileno(), "sockets": [each.fileno() for each in sockets]}
            inherited += [given["board"], given["channel"], *given["sockets"]]
            self.board.set_state(worker, State.LOADING)
            try:
                running = subprocess.Popen(  # noqa: S603  our own command again
                    [sys.executable, *sys.orig_argv[1:]],
                    env=os.environ | {VARIABLE: json.dumps(given)},
                    pass_fds=inherited,
                    process_group=0,  # so that Ctrl-C reaches the workers once, from here
                )
            except OSError as e:  # no process or no memory is left
                ours.close()
                self.board.set_state(worker, State.DEAD)
                self._has_not_started(worker, f"worker {worker} cannot be started: {e}", status=CANNOT_START)
                return
        self._running[worker] = _Process(running, ours)
        self._selector.register(ours, selectors.EVENT_READ)

    def _connected(self, engine: _Process) -> socket.socket:
        """Return one end of a new connection to the process of the engine, which gets the other."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(engine.channel, [b"+"], [theirs.fileno()])
            except OSError as e:  # it has just ended, which the worker will notice
                log.debug("the engine takes no connection: %s", e)
        return ours

    def _listen(self) -> None:
        """Take note of what the workers tell."""
        for worker, process in list(self._running.items()):
            waiting = process.served is None
            process.listen()
            if waiting and process.served is not None:
                self._is_ready(worker, process.served)

    def _is_ready(self, worker: int, served: dict[str, Any]) -> None:
        self._failed = 0
        if worker == self.board.engine:
            log.info("the engine is ready", extra={"fields": served})
            waiting, self._waiting = sorted(self._waiting), set()
            for each in waiting:
                self._start(each)
            return
        if not self._was_ready:
            log.info("listening", extra={"fields": {"addresses": self._addresses}})
        everybody = self.board.workers
        if len(self._was_ready) == everybody:
            log.info("worker %d is ready again", worker)
        elif len(self._was_ready | {worker}) == everybody:
            log.info("ready", extra={"fields": {"version": __version__, **served, "workers": everybody}})
        self._was_ready.add(worker)

    def _bury(self) -> None:
        """Take note of the workers that have ended, and replace them."""
        while True:
            try:
                process, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not process:
                return
            for worker, ended in list(self._running.items()):
                if ended.running.pid == process:
                    ended.running.returncode = os.waitstatus_to_exitcode(status)
                    self._has_ended(worker, ended, cpu=usage.ru_utime + usage.ru_stime)
            # others are orphans, which the first process of a container inherits

    def _has_ended(self, worker: int, ended: _Process, *, cpu: float) -> None:
        ended.listen()
        self._selector.unregister(ended.channel)
        ended.channel.close()
        del self._running[worker]
        self.board.clear(worker, cpu=cpu, replaced=not self._stopping)
        if self._stopping:
            return
        how = _how(ended.running.returncode)
        name = "the engine" if worker == self.board.engine else f"worker {worker}"
        if ended.served is not None:
            log.warning("%s %s: another takes its place", name, how)
            self._start(worker)
            return
        if ended.running.returncode == LOST_ENGINE:
            self._due[worker] = time.monotonic() + PAUSE
            return
        if ended.refused is None:
            reason, status = f"{name} {how} before it was ready; its log may say why", CANNOT_START
        else:
            reason, status = ended.refused, ended.running.returncode
        # What the first worker says of a bundle or a setting, the others would say too, and again.
        is_final = ended.refused is not None and not self._was_ready
        self._has_not_started(worker, reason, status=status, is_final=is_final)

    def _has_not_started(self, worker: int, reason: str, *, status: int, is_final: bool = False) -> None:
        """Try again to start a worker, or give up."""
        self._failed += 1
        if is_final or self._failed >= STARTS:
            self._end = Ended(reason, status)
            self._stop()
        else:
            pause = PAUSE * self._failed
            log.warning("%s. It is tried again in %g s", reason, pause)
            self._due[worker] = time.monotonic() + pause

    def _stop(self) -> None:
        """Tell all workers to stop; the second time, to wait no longer."""
        now, settings = time.monotonic(), self.settings
        delay = 0.0 if self._stopping else settings.drain_delay_s
        self._kill_at = min(self._kill_at, now + delay + settings.drain_timeout_s + GRACE)
        self.board.drain()
        self._due.clear()
        self._waiting.clear()
        for each in self.sockets:  # the workers have theirs, and close them in their time
            each.close()
        for worker, process in self._running.items():
            if worker != self.board.engine:
                process.signal(signal.SIGTERM)

    def _look(self) -> None:
        """Start what is due, end an engine that nobody uses any more, and kill what stands still."""
        now = time.monotonic()
        for worker, due in list(self._due.items()):
            if now >= due:
                self._start(worker)
        if self._stopping and [*self._running] == [self.board.engine]:
            self._running[self.board.engine].signal(signal.SIGTERM)
        overdue = now >= self._kill_at
        if overdue:
            self._kill_at = math.inf
        for worker, process in self._running.items():
            if overdue:
                log.error("process %d did not stop in time, and is killed", process.running.pid)
                process.signal(signal.SIGKILL)
            elif process.served is not None and not self._stopping:
                silence = self.board.silence(worker)
                if silence <= self.settings.watchdog_s + SILENCE:
                    process.silent_since = math.inf
                else:
                    process.silent_since = min(process.silent_since, now)
                if now - process.silent_since >= PROOF:
                    process.silent_since = math.inf
                    which = "the engine" if worker == self.board.engine else f"worker {worker}"
                    log.error("the event loop of %s has stood still for %.0f s: it is killed", which, silence)
                    process.signal(signal.SIGKILL)

    def _pause(self) -> float:
        """Return for how many seconds there is nothing to do unless somebody tells."""
        soonest = min([time.monotonic() + LOOK, self._kill_at, *self._due.values()])
        return max(0.0, soonest - time.monotonic())


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    return f"was ended by {signal.Signals(-code).name}"
