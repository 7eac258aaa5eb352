"""Serve an application with uvicorn, tuned for a loop of short requests beside one engine thread."""

from __future__ import annotations

import ctypes
import gc
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

import uvicorn

from carso.http.listening import addresses, listen, urls
from carso.http.parser import bounded
from carso.http.server import Post, Server, Service
from carso.http.web_socket import WebSocket
from carso.settings import Settings

log = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.5e-3  # seconds
MMAP_FROM = 2**20  # bytes of one allocation
_M_MMAP_THRESHOLD = -3  # malloc.h
# Seconds that an idle connection stays open: longer than load balancers keep theirs (AWS and nginx 60 by default), or
# they would send requests over connections that are being closed.
KEEP_ALIVE = 75


def run(
    service: Service,
    settings: Settings,
    sockets: list[socket.socket],
    post: Post | None = None,
    grpc_sockets: Sequence[socket.socket] = (),
) -> None:
    """Serve at these bound sockets until SIGTERM or SIGINT, and drain. Raises CannotListen.

    `post`: whoever a worker reports to, and who logs what concerns all workers; None where this process is alone.
    `grpc_sockets`: bound ones, for gRPC.
    """
    _settle()
    config = uvicorn.Config(
        service.app,
        http=bounded(settings.receive_timeout_s, service.unread, web_socket=service.web_socket),
        ws=WebSocket,
        ws_max_size=settings.stream_line_bytes,
        ws_ping_timeout=None,  # a client that is slowed down cannot answer; CARSO_STREAM_IDLE_S ends what is dead
        ws_per_message_deflate=False,  # encoded images do not get smaller, and other messages might get very large
        lifespan="on",
        log_config=None,  # uvicorn's loggers join ours
        access_log=False,  # carso.http.envelope writes that line
        server_header=False,
        proxy_headers=False,  # whoever calls could claim any address
        timeout_keep_alive=KEEP_ALIVE,
    )
    listen(sockets, backlog=config.backlog)  # before the log says "ready"
    if post is None:
        fields = {"addresses": urls(sockets)} | ({"grpc": addresses(grpc_sockets)} if grpc_sockets else {})
        log.info("listening", extra={"fields": fields})
    server = Server(
        config,
        service,
        delay=settings.drain_delay_s,
        timeout=settings.drain_timeout_s,
        post=post,
        grpc_sockets=grpc_sockets,
    )
    server.run(sockets)  # raises the signal that ended it once more; by then all is done


def _settle() -> None:
    # What start-up made lives as long as the process: no full collection need look at it again.
    gc.collect()
    gc.freeze()
    # The engine comes back from every run of a graph and needs the interpreter, and by default waits 5 ms for the event
    # loop to give it up: longer than the run took.
    sys.setswitchinterval(SWITCH_INTERVAL)
    # The buffers of a large image go back to the system when it is decoded. glibc by itself keeps them from the second
    # one on, 24 MB after some hundred WebP files; other C libraries have no such setting, and no need of it.
    with suppress(AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_FROM)
