"""The model that is under attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def attacked_in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in eval mode with frozen parameters while attacks are made on it; then put it back as it was.

    BatchNorm in train mode would change the very model under attack; gradients of parameters would be waste.
    """
    was_training = {module: module.training for module in model.modules()}
    required = [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for parameter, flag in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
        for module, flag in was_training.items():
            module.training = flag
