"""Checkpoints of a training, and weights: written beside the old ones and swapped, and checked when they are read.

A training keeps its two last checkpoints. If the last one is damaged, it goes on from the one before.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from carso_training import durable
from carso_training.errors import RunError

log = logging.getLogger(__name__)

DIGEST = hashlib.sha256().digest_size


class Checkpoints:
    """The two last checkpoints of one training, in its folder.

    A file holds what `torch.save` writes, then the SHA-256 of that.
    """

    def __init__(self, folder: Path) -> None:
        self.newest = folder / "checkpoint.pt"
        self.previous = folder / "checkpoint-previous.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, and the one saved before it. Raises OSError, and then both old ones are still there."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with durable.replacing(self.newest, before_swap=self._keep_newest) as file:
            file.write(buffer.getbuffer())
            file.write(hashlib.sha256(buffer.getbuffer()).digest())

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Return the last intact state, on `device`; None if there is none yet.

        Raises RunError if there are checkpoints, and all are damaged.
        """
        damaged = []
        for path in (self.newest, self.previous):
            if not path.exists():
                continue
            if (state := _intact(path, device)) is not None:
                if damaged:
                    log.warning("%s is damaged: going on from %s", damaged[0], path.name)
                return state
            damaged.append(path)
        if not damaged:
            return None
        raise RunError(
            f"{damaged[0]} is damaged, and there is no intact one before it. Remove {damaged[0].parent}, then run the "
            "same command again to train this network from the start"
        )

    def remove(self) -> None:
        """Remove both, once the weights are written."""
        for path in (self.newest, self.previous):
            path.unlink(missing_ok=True)

    def _keep_newest(self) -> None:
        if self.newest.exists():
            self.newest.replace(self.previous)


def _intact(path: Path, device: torch.device) -> dict[str, Any] | None:
    content = path.read_bytes()
    payload, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    return state


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's weights, with their SHA-256 in the metadata. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    durable.write(path, save(tensors, metadata={"sha256": hashlib.sha256(save(tensors)).hexdigest()}))


def load_weights(network: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into a network of the same architecture.

    Raises RunError, which names the file and says how to mend it, if it is damaged or of another network.
    """
    content = path.read_bytes()
    try:
        tensors = load(content)
        if _metadata(content).get("sha256") != hashlib.sha256(save(tensors)).hexdigest():
            raise ValueError("its SHA-256 is wrong")
        network.load_state_dict(tensors)
    except (SafetensorError, ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise RunError(
            f"{path} is damaged ({reason}). Remove {path.parent}, then run the same command again to train this "
            "network again"
        ) from None


def _metadata(safetensors: bytes) -> dict[str, str]:
    """The metadata of a file's content: a JSON header follows its own size in 8 bytes."""
    size = int.from_bytes(safetensors[:8], "little")
    metadata: dict[str, str] = json.loads(safetensors[8 : 8 + size]).get("__metadata__", {})
    return metadata
