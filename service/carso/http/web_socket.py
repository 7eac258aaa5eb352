"""Uvicorn's WebSocket protocol, taught to stop in good order.

A connection comes here only by a GET that asks for it at the path of streams (carso.http.parser). Until then, all
bounds of HTTP hold.
"""

from __future__ import annotations

import logging
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from carso.http.exchange import ABORT

CLOSING = 1.0  # seconds that the client has to answer the end of the conversation; the server may be stopping


class WebSocket(WebSocketsSansIOProtocol):
    """Uvicorn's protocol, which lets a conversation end by itself when the server stops, and can cut it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.close_timeout = CLOSING
        self.logger = logging.getLogger(__name__)
        self.logger.setLevel(logging.WARNING)  # carso.http.envelope writes the line of a request
        self.conn.logger = self.logger

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.handshake_complete:  # else it was refused: the head is no handshake
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[ABORT] = self.transport.abort

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:  # an answer that is no handshake; uvicorn would
            self.handshake_complete = True  # complain that there was none

    def shutdown(self) -> None:
        """Leave the connection to whoever talks over it, and is told that the service stops."""
