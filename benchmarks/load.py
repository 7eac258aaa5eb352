"""The load generator: raw HTTP/1.1 on kept-alive connections, one epoll loop, no framework.

It must be light, for it shares the machine with the server under test. A closed loop sends its next request when an
answer arrives. An open loop sends by a Poisson schedule, whatever the server does; its latencies count from the
scheduled time, so that a stalled server is charged for the requests that had to wait behind the stall.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

DRAIN = 10.0  # seconds to wait for answers after the last request
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one group of connections does to one server."""

    port: int
    requests: Sequence[bytes]  # whole HTTP requests, sent in turn
    connections: int  # closed loop: all busy all the time; open loop: at most
    rate: float | None = None  # requests a second; None: closed loop


@dataclass(kw_only=True)
class Measured:
    """What came of one load. Only requests due after the warm-up count."""

    seconds: float
    answers: int = 0  # that arrived before the end
    latencies: list[float] = field(default_factory=list)  # seconds; of all answers, late ones too
    lateness: list[float] = field(default_factory=list)  # open loop: seconds by which the generator itself was late
    failures: int = 0  # answers other than 200, lost connections, and what was unanswered at the end of the drain
    statuses: Counter[int] = field(default_factory=Counter)  # of all answers
    lost: int = 0  # connections that ended before the answer
    unanswered: int = 0  # at the end of the drain
    bodies: list[bytes] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds

    def percentile(self, percent: float) -> float:
        """Of the latencies, in milliseconds; not a number if there was no answer."""
        return 1e3 * float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")


def request(path: str, body: bytes, *, content_type: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def drive(loads: Sequence[Load], *, seconds: float, warm_up: float = 0.5, keep_bodies: bool = False) -> list[Measured]:
    """Run all loads at once for `warm_up` + `seconds`; what came of each, in their order."""
    return _Drive(loads, seconds=seconds, warm_up=warm_up, keep_bodies=keep_bodies).run()


class _Connection:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due: float | None = None  # when the request in flight was to be sent; None: idle
        self._received = b""

    def send(self, data: bytes, due: float) -> None:
        self.due = due
        self.socket.sendall(data)

    def answer(self) -> tuple[int, bytes] | None:
        """Status and body, with the sizes of its chunks, once the whole answer is there. Raises ConnectionError."""
        part = self.socket.recv(2**18)
        if not part:
            raise ConnectionError
        self._received += part
        head = self._received.find(b"\r\n\r\n")
        length = _LENGTH.search(self._received, 0, head + 2) if head >= 0 else None
        if length is None:  # chunked, or not whole yet
            if not self._received.endswith(_LAST_CHUNK):
                return None
        elif len(self._received) < head + 4 + int(length[1]):
            return None
        status, body = int(self._received[9:12]), self._received[head + 4 :]
        self._received = b""
        return status, body


class _Group:
    """One load in progress."""

    def __init__(self, load: Load, *, seconds: float) -> None:
        self.load = load
        self.measured = Measured(seconds=seconds)
        self.bodies = cycle(load.requests)
        self.idle: list[_Connection] = []
        self.opened = 0
        self.waiting: deque[float] = deque()  # due times for which no connection is free
        self.next_due = 0.0
        self.draws = random.Random(0)


class _Drive:
    def __init__(self, loads: Sequence[Load], *, seconds: float, warm_up: float, keep_bodies: bool) -> None:
        self._groups = [_Group(load, seconds=seconds) for load in loads]
        self._keep_bodies = keep_bodies
        self._epoll = select.epoll()
        self._by_fd: dict[int, tuple[_Group, _Connection]] = {}
        self._alarm = _Alarm()
        self._epoll.register(self._alarm.fd, select.EPOLLIN)
        began = time.perf_counter()
        self._counted_from = began + warm_up
        self._end = self._counted_from + seconds

    def run(self) -> list[Measured]:
        for group in self._groups:
            if group.load.rate is None:
                for _ in range(group.load.connections):
                    self._send(group, time.perf_counter())
            else:
                group.next_due = time.perf_counter()
        while (now := time.perf_counter()) < self._end or (self._in_flight() and now < self._end + DRAIN):
            if now < self._end:
                self._send_due(now)
            for fd, _ in self._epoll.poll(0.1):
                if fd == self._alarm.fd:
                    self._alarm.clear()
                else:
                    self._receive(*self._by_fd[fd])
        for group in self._groups:
            unanswered = [c for g, c in self._by_fd.values() if g is group and c.due is not None]
            group.measured.unanswered = len(unanswered) + len(group.waiting)
            group.measured.failures += group.measured.unanswered
        self._close()
        return [group.measured for group in self._groups]

    def _in_flight(self) -> bool:
        return any(group.waiting or group.opened > len(group.idle) for group in self._groups)

    def _send_due(self, now: float) -> None:
        """Send what the open loops' schedules ask for, and set the alarm for what comes next."""
        upcoming = self._end
        for group in self._groups:
            rate = group.load.rate
            if rate is None:
                continue
            while group.next_due <= now:
                if group.next_due >= self._counted_from:
                    group.measured.lateness.append(now - group.next_due)
                self._send(group, group.next_due)
                group.next_due += group.draws.expovariate(rate)
            upcoming = min(upcoming, group.next_due)
        self._alarm.set(upcoming)

    def _send(self, group: _Group, due: float) -> None:
        if group.idle:
            connection = group.idle.pop()
        elif group.opened < group.load.connections:
            connection = _Connection(group.load.port)
            group.opened += 1
            self._by_fd[connection.socket.fileno()] = group, connection
            self._epoll.register(connection.socket.fileno(), select.EPOLLIN)
        else:
            group.waiting.append(due)
            return
        try:
            connection.send(next(group.bodies), due)
        except OSError:
            self._lost(group, connection)

    def _receive(self, group: _Group, connection: _Connection) -> None:
        try:
            answer = connection.answer()
        except OSError:
            self._lost(group, connection)
            return
        if answer is None:
            return
        now = time.perf_counter()
        status, body = answer
        due, connection.due = connection.due, None
        group.idle.append(connection)
        if due is not None and due >= self._counted_from:
            group.measured.statuses[status] += 1
            if status != 200:
                group.measured.failures += 1
            else:
                group.measured.latencies.append(now - due)
                if self._keep_bodies:
                    group.measured.bodies.append(body)
        if status == 200 and self._counted_from <= now < self._end:
            group.measured.answers += 1
        if group.waiting:
            self._send(group, group.waiting.popleft())
        elif group.load.rate is None and now < self._end:
            self._send(group, now)

    def _lost(self, group: _Group, connection: _Connection) -> None:
        """The server closed it: no failure while it was idle, as servers close idle connections."""
        del self._by_fd[connection.socket.fileno()]
        connection.socket.close()
        group.opened -= 1
        if connection.due is None:
            group.idle.remove(connection)
            return
        group.measured.failures += 1
        group.measured.lost += 1
        if group.load.rate is None and time.perf_counter() < self._end:
            self._send(group, time.perf_counter())

    def _close(self) -> None:
        for _, connection in self._by_fd.values():
            connection.socket.close()
        self._epoll.close()
        self._alarm.close()


class _Alarm:
    """A Linux timer that epoll waits for: epoll's own timeout is too coarse, a millisecond."""

    _NON_BLOCKING, _ABSOLUTE = 0o4000, 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, self._NON_BLOCKING)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, when: float) -> None:
        """On the clock of time.perf_counter, which is CLOCK_MONOTONIC on Linux."""
        seconds = int(when)
        interval_then_value = (ctypes.c_long * 4)(0, 0, seconds, int(1e9 * (when - seconds)))
        self._libc.timerfd_settime(self.fd, self._ABSOLUTE, interval_then_value, None)

    def clear(self) -> None:
        os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)
