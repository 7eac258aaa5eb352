"""LitServe, with its batching: https://lightning.ai/docs/litserve/features/batching"""

from __future__ import annotations

import base64
from typing import Any

import litserve as ls
import numpy as np
from system import MAX_BATCH, MAX_WAIT, PORT, WORKERS, System


class Peer(ls.LitAPI):
    """{"image": base64 of a PNG file} -> {"label", "tally", ...}."""

    def setup(self, device: str) -> None:
        self.system = System()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return self.system.read(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(inputs)

    def predict(self, x: np.ndarray) -> list[dict[str, Any]]:
        return self.system.classify(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Peer(max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT)
    server = ls.LitServer(api, accelerator="cpu", devices=1, workers_per_device=WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False, num_api_servers=1)
