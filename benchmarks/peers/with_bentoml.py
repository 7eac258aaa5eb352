"""BentoML, with its adaptive batching: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html

Run it by `bentoml serve with_bentoml:Peer`.
"""

from __future__ import annotations

import base64
from typing import Any

import bentoml
import numpy as np
from system import MAX_BATCH, WORKERS, System


@bentoml.service(workers=WORKERS)
class Peer:
    """{"images": [base64 of a PNG file]} -> [{"label", "tally", ...}]."""

    def __init__(self) -> None:
        self.system = System()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=1000)
    def classify(self, images: list[str]) -> list[dict[str, Any]]:
        return self.system.classify(np.concatenate([self.system.read(base64.b64decode(image)) for image in images]))
