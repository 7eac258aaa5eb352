"""Send digits to both paths for ever, so that a dashboard has something to show. Standard library only.

Most are clean. For the first third of every period, a third of those that go to the robust path are attacked ones, as
if somebody were at work: the share of disagreement rises, and more votes are counted.
"""

# ruff: noqa: S311, T201  the dice are for traffic, and what is printed is the container's log

from __future__ import annotations

import argparse
import http.client
import random
import threading
import time
from pathlib import Path

ATTACK, SHARE = 1 / 3, 1 / 3  # of the period, and of the robust requests meanwhile
PAUSE = 0.05  # seconds between two requests of a caller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--digits", type=Path, default=Path("docs/samples"))
    parser.add_argument("--period", type=float, default=180, help="seconds")
    parser.add_argument("--callers", type=int, default=4)
    options = parser.parse_args()
    clean, attacked = (
        [path.read_bytes() for path in sorted(options.digits.glob(f"*-{kind}.png"))] for kind in ("clean", "pgd-*")
    )
    for number in range(options.callers):
        path = "/classify" if number % 2 == 0 else "/classify/fast"
        arguments = (options.host, options.port, path, clean, attacked, options.period)
        threading.Thread(target=call, args=arguments, daemon=True).start()
    threading.Event().wait()


def call(host: str, port: int, path: str, clean: list[bytes], attacked: list[bytes], period: float) -> None:
    """One caller on one connection, which is opened anew after a failure."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    while True:
        under_attack = path == "/classify" and time.time() / period % 1 < ATTACK and random.random() < SHARE
        body = random.choice(attacked if under_attack else clean)
        try:
            connection.request("POST", path, body, {"Content-Type": "image/png"})
            connection.getresponse().read()
        except (OSError, http.client.HTTPException) as e:
            print(f"{path}: {e!r}", flush=True)
            connection.close()
            time.sleep(1)
        time.sleep(random.uniform(0, 2 * PAUSE))


if __name__ == "__main__":
    main()
