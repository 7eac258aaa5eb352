"""Votes cast by PyTorch, with the weights and the arithmetic of a bundle's vote graph, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from carso.bundle import Bundle
from carso_training.export.graphs import VoteGraph
from carso_training.export.weights import purifier_of, second_pass_of

TorchPrecision = Literal["float32", "tf32", "float16"]


class TorchVotes:
    """One batch of votes in PyTorch."""

    def __init__(
        self,
        bundle: Bundle,
        codes: np.ndarray,
        code_index: np.ndarray,
        latents: np.ndarray,
        *,
        device: torch.device,
        precision: TorchPrecision,
    ) -> None:
        """The arrays are those of ``Sessions.vote``. `tf32` and `float16` are for GPUs."""
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")  # of the whole process
        self._device = device
        self._type = torch.float16 if precision == "float16" else torch.float32
        graph = VoteGraph(purifier_of(bundle), second_pass=second_pass_of(bundle)).eval()
        self._graph = graph.to(device=device, dtype=self._type)
        self._arrays = codes, code_index, latents
        self._there = self._on_device()

    def _on_device(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, code_index, latents = (torch.from_numpy(array).to(self._device) for array in self._arrays)
        return codes.to(self._type), code_index, latents.to(self._type)

    @torch.inference_mode()
    def plain(self) -> np.ndarray:
        """Cast the votes: arrays of the host in, classes [R] on the host out, as ``Sessions.vote`` does."""
        votes, _ = self._graph(*self._on_device())
        return votes.cpu().numpy()

    @torch.inference_mode()
    def replay(self) -> Callable[[], None]:
        """Capture a CUDA graph of the votes; return what replays it, and waits for its end.

        Nothing is copied: its inputs are on the device, and its votes stay there.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries make their work spaces in runs before the capture
            for _ in range(3):
                self._graph(*self._there)
        torch.cuda.current_stream().wait_stream(beside)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            self._graph(*self._there)

        def run() -> None:
            captured.replay()
            torch.cuda.synchronize()

        return run
