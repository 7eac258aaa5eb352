"""The gRPC server: the protocol, its health and its description, at one port."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.requests import Request

from carso.api.open_inference import Asked, Model, ServerMetadata
from carso.errors import NotFound
from carso.grpc import messages
from carso.grpc.health import Health
from carso.grpc.protocol import METHODS, SERVICE, Message, Method
from carso.http.exchange import Exchange
from carso.http.listening import CannotListen, addresses, why
from carso.options import MAX_DEADLINE_MS
from carso.telemetry.probes import Probes

# A client whose deadline has passed hears nothing, so the count ends before: a tenth of what is left, at most so much.
GRACE = 0.2  # seconds


Handler = Callable[[str, Method], grpc.RpcMethodHandler]


class GrpcServer:
    """Runs beside the HTTP server, in its event loop."""

    def __init__(
        self, models: Sequence[Model], probes: Probes, handler: Handler, *, max_message_bytes: int, max_calls: int
    ) -> None:
        """`handler` surrounds a method with what every call needs. `max_message_bytes`: of one request. `max_calls`:
        that may be in flight; gRPC itself refuses more.
        """
        self._models = models
        self._probes = probes
        self._handler = handler
        self._max_calls = max_calls
        self._server: Any = None  # a grpc.aio.Server, once a port was opened
        self._options = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # another process must not share the port unnoticed
        )

    def open(self, sockets: Sequence[socket.socket]) -> None:
        """Take the ports of these bound sockets, in a running event loop. Raises CannotListen."""
        server = self._server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._max_calls)
        methods: dict[str, Method] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        handlers = {name: self._handler(name, method) for name, method in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = Health(self._probes)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        for each in sockets:
            (address,) = addresses([each])
            try:
                server.add_insecure_port(address)
            except RuntimeError:  # another process bound it at the same time, and was sooner
                taken = OSError(errno.EADDRINUSE, "")
                host, port = each.getsockname()[:2]
                raise CannotListen(why(host, port, taken, setting="grpc_port")) from None
            each.close()

    async def start(self) -> None:
        """Take calls."""
        await self._health.look()
        self._looking = asyncio.create_task(self._health.keep_looking())
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and end those that are in flight after `grace` seconds."""
        self._looking.cancel()
        await self._health.look()
        self._health.end()
        await self._server.stop(grace)

    async def ended(self) -> None:
        """Wait until no call is in flight. Returns at once where no port was opened."""
        if self._server is not None:
            await self._server.wait_for_termination()

    async def _live(self, message: Message, request: Request, context: grpc.aio.ServicerContext) -> Message:
        return METHODS["ServerLive"][1](live=self._probes.is_live)

    async def _ready(self, message: Message, request: Request, context: grpc.aio.ServicerContext) -> Message:
        return METHODS["ServerReady"][1](ready=self._probes.is_ready)

    async def _model_ready(self, message: Message, request: Request, context: grpc.aio.ServicerContext) -> Message:
        self._model(message.name, message.version)
        return METHODS["ModelReady"][1](ready=self._probes.is_ready)

    async def _server_metadata(self, message: Message, request: Request, context: grpc.aio.ServicerContext) -> Message:
        told = ServerMetadata(extensions=())
        return METHODS["ServerMetadata"][1](**told.model_dump())

    async def _model_metadata(self, message: Message, request: Request, context: grpc.aio.ServicerContext) -> Message:
        return METHODS["ModelMetadata"][1](**self._model(message.name, message.version).metadata.model_dump())

    async def _infer(self, message: Message, request: Request, context: grpc.aio.ServicerContext) -> Message:
        model = self._model(message.model_name, message.model_version)

        async def body() -> tuple[Asked, int]:
            limits = {"max_images": model.max_images, "max_values": model.max_values}
            return partial(messages.request_of, message, **limits), message.ByteSize()

        asked, classified = await model.answer(request, body, deadline_ms=_deadline_ms(context.time_remaining()))
        return messages.response_of(
            model.outputs(asked, classified),
            model=model.name,
            version=model.version,
            id=asked.id,
            parameters={"provider": model.provider, "request_id": Exchange.of(request.scope).request_id},
            raw=bool(message.raw_input_contents),
        )

    def _model(self, name: str, version: str) -> Model:
        for model in self._models:
            if model.name == name and version in ("", model.version):
                return model
        names = " and ".join(f"{model.name} ({model.version})" for model in self._models)
        raise NotFound(f"there is no model {name!r}{f' of version {version!r}' * bool(version)}: there are {names}")


def _deadline_ms(left: float | None) -> int | None:
    """Return after how many milliseconds counting stops, so that the answer comes in time. None: never."""
    if left is None or left * 1e3 > MAX_DEADLINE_MS:
        return None
    return max(1, int(1e3 * (left - min(GRACE, left / 10))))
