"""Whether this process is live, and whether it is ready: passive, so that no probe waits behind work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from carso.board.whole import State, Whole
from carso.errors import NotReady
from carso.inference.engine import Engine

LIVE, READY, METRICS = "/livez", "/readyz", "/metrics"
LIVE_V2, READY_V2 = "/v2/health/live", "/v2/health/ready"
# What machines ask often: it needs no API key, is logged at level debug only, and is not traced.
PROBES = frozenset((LIVE, READY, METRICS, LIVE_V2, READY_V2))


@dataclass
class Lifecycle:
    """What the application knows of the server around it."""

    draining: bool = False  # the process was told to stop
    managed: bool = False  # the server is ours, which drains and bounds the time that a client has to send a request
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # set soon after `draining`, on the event loop


class Probes:
    """Loading and the self-test were over before the port was opened; these look at what can change since.

    A service with workers is ready while one of them is, because any worker may answer a probe, and those that are not
    ready are being replaced or end.
    """

    def __init__(self, engine: Engine, lifecycle: Lifecycle, *, watchdog: float, whole: Whole | None = None) -> None:
        """`watchdog`: seconds that may go by with work in flight and no step of the engine's ended. `whole`: the
        service that is looked at; None: this process alone.
        """
        self._engine = engine
        self._lifecycle = lifecycle
        self._watchdog = watchdog
        self._whole = whole or Whole()

    def live(self) -> None:
        """Raise NotReady if only a restart helps."""
        if self._whole.others(State.READY):
            return
        if not self._engine.alive:
            raise NotReady("the engine is not running: restart this process, and see its log for the reason")
        if self._engine.stalled(self._watchdog):
            raise NotReady(f"the engine has work and did none for {self._watchdog:g} s: restart this process")

    def ready(self) -> None:
        """Raise NotReady if requests should go elsewhere."""
        if self._whole.draining or (self._lifecycle.draining and not self._whole.others(State.READY)):
            raise NotReady("this process is stopping: send requests to another replica")
        self.live()

    @property
    def state(self) -> State:
        """What this worker is doing."""
        if not self._engine.alive or self._engine.stalled(self._watchdog):
            return State.FAILED
        return State.DRAINING if self._lifecycle.draining else State.READY

    @property
    def is_live(self) -> bool:
        """Whether `live` raises nothing."""
        try:
            self.live()
        except NotReady:
            return False
        return True

    @property
    def is_ready(self) -> bool:
        """Whether `ready` raises nothing."""
        try:
            self.ready()
        except NotReady:
            return False
        return True
