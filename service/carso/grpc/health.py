"""gRPC's standard health service: Check, and Watch, which tells of every change.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse

from carso.grpc.protocol import SERVICE
from carso.telemetry.probes import Probes

SERVICES = ("", SERVICE)  # the whole process, and the one service that it has: they are one
LOOKS_EVERY = 0.5  # seconds: a dead or stuck engine tells nobody


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # which has no types
    """Answers as /readyz does."""

    def __init__(self, probes: Probes) -> None:
        super().__init__()
        self._probes = probes
        self._ended = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        """Say whether to send requests, at this moment."""
        await self.look()
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Say so at each change, until `end`: a drain does not wait for whoever watches."""
        watching = asyncio.create_task(super().Watch(request, context))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((watching, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ended.cancel()

    async def look(self) -> None:
        """Look whether the process is ready, and tell whoever watches."""
        status = HealthCheckResponse.SERVING if self._probes.is_ready else HealthCheckResponse.NOT_SERVING
        for service in SERVICES:
            await self.set(service, status)

    async def keep_looking(self) -> None:
        """Look again and again, until this is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOKS_EVERY)

    def end(self) -> None:
        """End every Watch."""
        self._ended.set()
