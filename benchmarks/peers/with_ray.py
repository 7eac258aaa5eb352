"""Ray Serve, with its dynamic batching: https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from system import MAX_BATCH, MAX_WAIT, PORT, WORKERS, System


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=2 * MAX_BATCH)
class Peer:
    """A PNG file -> {"label", "tally", ...}."""

    def __init__(self) -> None:
        self.system = System()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_WAIT)
    async def counted(self, files: list[bytes]) -> list[dict[str, Any]]:
        return self.system.classify(np.concatenate([self.system.read(file) for file in files]))

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await self.counted(await request.body())


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Peer.bind(), route_prefix="/classify")
    while True:
        time.sleep(3600)
