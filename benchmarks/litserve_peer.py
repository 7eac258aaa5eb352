"""The same system behind LitServe, as its documentation would have it: python -m benchmarks.litserve_peer --help

The same two graphs in the same runtime, all votes of an image in one run, and LitServe's own batching. It counts every
vote, for a framework that batches requests has no notion of a request that is done halfway.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import litserve as ls
import numpy as np
import typer
from carso.bundle import Bundle
from carso.images.reader import Reader
from carso.inference.sessions import Sessions


class Peer(ls.LitAPI):
    """{"image": base64 of an encoded image} -> {"label", "tally"}."""

    def __init__(self, folder: Path, *, threads: int, max_batch_size: int, batch_timeout: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout)
        self._folder = folder
        self._threads = threads

    def setup(self, device: str) -> None:
        bundle = Bundle.load(self._folder)
        self._manifest = bundle.manifest
        self._reader = Reader(bundle.manifest.input, max_images=1, max_pixels=2**24)
        self._sessions = Sessions(bundle, device="cpu", threads=self._threads)
        self._draws = np.random.Generator(np.random.SFC64())

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return self._reader.read([base64.b64decode(request["image"])])

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        samples, latent, classes = self._manifest.samples, self._manifest.latent, len(self._manifest.classes)
        same_code = np.zeros(samples, np.int64)
        tallies = []
        for code in self._sessions.first_pass(x).codes:
            # a run per image: one run on the votes of all of them is slower, its arrays outgrow the cache
            latents = self._draws.standard_normal((samples, latent), dtype=np.float32)
            votes = self._sessions.vote(code[None], same_code, latents)
            tallies.append(np.bincount(votes, minlength=classes))
        return np.stack(tallies)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        tally = output.reshape(-1)
        return {"label": int(tally.argmax()), "tally": tally.tolist()}


def main(
    bundle: Path,
    *,
    port: Annotated[int, typer.Option()],
    workers: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of each worker.")] = 1,
    max_batch_size: Annotated[int, typer.Option(min=1)] = 8,
    batch_timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for a batch to fill.")] = 0.002,
) -> None:
    api = Peer(bundle, threads=threads, max_batch_size=max_batch_size, batch_timeout=batch_timeout)
    server = ls.LitServer(api, accelerator="cpu", devices=1, workers_per_device=workers, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, num_api_servers=1)


if __name__ == "__main__":
    typer.run(main)
