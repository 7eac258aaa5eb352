"""The system as one would write it for a framework that batches: PNG files in, labels out.

It has the same two graphs in the same runtime, and the same stopping rule. All images of a batch are counted together,
until the last of them is settled: a framework that batches requests has no notion of one that is done halfway.

It needs numpy, ONNX Runtime and Pillow, and nothing of CARSO. The environment says where the bundle is (PEER_BUNDLE),
which graph casts the votes (PEER_VOTE), and how many processes (PEER_WORKERS) have how many threads (PEER_THREADS).
"""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image

PORT = int(os.environ.get("PEER_PORT", "8000"))
WORKERS = int(os.environ.get("PEER_WORKERS", "1"))
MAX_BATCH = 32  # images
MAX_WAIT = 0.002  # seconds for which a batch is collected; a batch is counted in little more
RISK = float(os.environ.get("PEER_RISK", "1e-3"))  # 0: all votes that can matter


class System:
    def __init__(self) -> None:
        folder = Path(os.environ["PEER_BUNDLE"])
        manifest = json.loads((folder / "manifest.json").read_text())
        self.samples, self.latent = manifest["samples"], manifest["latent"]
        self.classes = len(manifest["classes"])
        self.input = manifest["input"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("PEER_THREADS", "1"))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.first_pass, self.second_pass = (
            ort.InferenceSession(folder / graph, options, providers=["CPUExecutionProvider"])
            for graph in ("first_pass.onnx", os.environ.get("PEER_VOTE", "vote.onnx"))
        )
        self.draws = np.random.Generator(np.random.SFC64())

    def read(self, file: bytes) -> np.ndarray:
        """Return the image of a PNG file, [1, *shape] float32."""
        pixels = np.asarray(Image.open(io.BytesIO(file)).convert("L"), np.float32) / 255
        low, high = self.input["low"], self.input["high"]
        return (low + (high - low) * pixels).reshape(1, *self.input["shape"])

    def classify(self, images: np.ndarray) -> list[dict[str, Any]]:
        """Count the votes of `images` [n, *shape]; a label, a tally and the first pass's label for each."""
        probabilities, codes = self.first_pass.run(["probabilities", "codes"], {"images": images})
        expected = probabilities.argmax(1)
        tallies = self.count(codes, expected)
        labels = tallies.argmax(1)
        return [
            {"label": int(label), "tally": tally.tolist(), "fast_label": int(fast)}
            for label, tally, fast in zip(labels, tallies, expected, strict=True)
        ]

    def count(self, codes: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return the tallies [n, classes] of `codes` [n, code]: the rule of carso/inference/vote.py, for a batch."""
        tallies = np.zeros((len(codes), self.classes), np.int64)
        still, cast = np.arange(len(codes)), 0
        while len(still):
            size = min(max(12, cast // 2), self.samples - cast)
            images = np.repeat(np.arange(len(still)), size)
            latents = self.draws.standard_normal((len(images), self.latent), dtype=np.float32)
            feeds = {"codes": codes[still], "code_index": images, "latents": latents}
            np.add.at(tallies, (still[images], self.second_pass.run(["votes"], feeds)[0]), 1)
            cast += size
            runner_up, leader = np.sort(tallies[still])[:, -2:].T
            part = np.where(tallies[still, expected[still]] == leader, 0.9, 0.1 / (self.classes - 1))
            settled = (cast == self.samples) | (leader - runner_up > self.samples - cast)
            if RISK:
                settled |= np.array([ratio(*pair) for pair in zip(leader, runner_up, strict=True)]) <= np.log(
                    RISK * part
                )
            still = still[~settled]
        return tallies


def ratio(leader: int, other: int, b: float = 0.2) -> float:
    """Return log of B(b, b) / (2^(leader + other) B(leader + b, other + b))."""
    return log_beta(b, b) - log_beta(leader + b, other + b) - (leader + other) * math.log(2)


def log_beta(x: float, y: float) -> float:
    return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)
