"""mosec, with its dynamic batching: https://mosecorg.github.io/mosec/

Run it by `python with_mosec.py --port PORT`; mosec itself reads the command line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mosec import Server, Worker
from system import MAX_BATCH, MAX_WAIT, WORKERS, System


class Peer(Worker):
    """A PNG file -> {"label", "tally", ...}."""

    def __init__(self) -> None:
        self.system = System()

    def deserialize(self, data: bytes) -> np.ndarray:
        return self.system.read(data)

    def forward(self, data: list[np.ndarray]) -> list[dict[str, Any]]:
        return self.system.classify(np.concatenate(data))


if __name__ == "__main__":
    server = Server()
    server.append_worker(Peer, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=round(1e3 * MAX_WAIT))
    server.run()
