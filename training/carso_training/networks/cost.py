"""What networks cost: multiply-adds of their linear and convolutional layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carso_training.networks.system import System

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, *TRANSPOSED)


def multiply_adds(network: nn.Module, call: Callable[[], object]) -> int:
    """Return the multiply-adds of all layers of `network` in one `call`. Activations and sums are left out."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # each output element takes a row of weights; in a transposed convolution, each input element spreads one
        total += (inputs[0] if isinstance(layer, TRANSPOSED) else output).numel() * weight[0].numel()

    handles = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, COUNTED)]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return total


def costs(system: System, *, shape: tuple[int, ...]) -> dict[str, int]:
    """Return the multiply-adds of one image: of the first pass (`image`, its code included) and of each vote (`vote`).

    `shape` is that of an image. What depends on the code alone is computed once per image, and counted there.
    """
    like = next(system.parameters())
    image = torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
    latents = torch.zeros(2, system.latent, device=like.device, dtype=like.dtype)
    classifier = multiply_adds(system, lambda: system.first_pass(image))
    one, two = (multiply_adds(system, lambda k=k: system(image, latents[:k])) for k in (1, 2))
    return {"classifier": classifier, "image": 2 * one - two, "vote": two - one}
