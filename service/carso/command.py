"""The command `carso-serve`, same as `python -m service`: serve a bundle over HTTP. Settings: service/settings.py."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

log = logging.getLogger("service")

BAD_SETTING = 2
CANNOT_START = 1
SWITCH_INTERVAL = 0.5e-3  # seconds
MMAP_FROM = 2**20  # bytes of one allocation
_M_MMAP_THRESHOLD = -3  # malloc.h
# Seconds that an idle connection stays open: longer than load balancers keep theirs (AWS and nginx 60 by default), or
# they would send requests over connections that are being closed.
KEEP_ALIVE = 75


def main() -> None:
    """Serve until SIGTERM or SIGINT. Exits with 2 for a bad setting, 1 for a bundle or device that cannot be used.

    A signal that comes before the server takes over ends the process at once, with 0: nothing is in flight.
    """
    # Before the imports, which take most of the start: of the first process of a container, the kernel drops a signal
    # that has no handler, and the container would go on to serve.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    _serve()


def _leave(number: int, frame: FrameType | None) -> None:
    # not SystemExit, which whatever is being loaded could swallow
    os._exit(0)


def _serve() -> None:
    import uvicorn

    from carso.app import build
    from carso.bundle import BundleError
    from carso.http.parser import bounded
    from carso.http.server import Server
    from carso.inference.sessions import DeviceError
    from carso.settings import Settings, SettingsError, unknown_variables
    from carso.telemetry import logs

    try:
        settings = Settings.read()
        logs.configure(settings.log_level)
        for name in unknown_variables():
            log.warning("%s is in the environment but is no setting of this service", name)
        service = build(settings)
    except SettingsError as e:
        _exit(e, BAD_SETTING)
    except (BundleError, DeviceError) as e:
        _exit(e, CANNOT_START)
    _settle()
    config = uvicorn.Config(
        service.app,
        host=settings.host,
        port=settings.port,
        http=bounded(settings.receive_timeout_s, service.unread),
        lifespan="on",
        log_config=None,  # uvicorn's loggers join ours
        access_log=False,  # carso.http.envelope writes that line
        server_header=False,
        proxy_headers=False,  # nothing here asks who the client is
        timeout_keep_alive=KEEP_ALIVE,
    )
    Server(
        config,
        lifecycle=service.lifecycle,
        abandon=service.engine.abandon,
        delay=settings.drain_delay_s,
        timeout=settings.drain_timeout_s,
    ).run()  # raises the signal that ended it once more; by then all is done


def _settle() -> None:
    """Tune the interpreter for a loop of short requests beside one engine thread."""
    # What start-up made lives as long as the process: no full collection need look at it again.
    gc.collect()
    gc.freeze()
    # The engine comes back from every run of a graph wanting the interpreter, and by default waits 5 ms for the event
    # loop to give it up: longer than the run took.
    sys.setswitchinterval(SWITCH_INTERVAL)
    # The buffers of a large image go back to the system when it is decoded. glibc by itself keeps them from the second
    # one on, 24 MB after some hundred WebP files; other C libraries have no such setting, and no need of it.
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_FROM)


def _exit(error: Exception, code: int) -> None:
    print(f"carso-serve: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
