"""An attack on many images, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.progress import track
from torch import Tensor, nn

from carso_training.attacks.attack import Attack
from carso_training.attacks.model import attacked_in_eval_mode
from carso_training.datasets.examples import Examples

BATCH = 1000


def attacked_batches(
    model: nn.Module, attack: Attack, data: Examples, *, seed: int, quiet: bool = False
) -> Iterator[Tensor]:
    """Yield the images of one attack on `model`, [<= 1000, *shape] float32 on the device of `data`, in its order.

    `model` maps images to class scores; it is attacked in eval mode. `seed` decides all that is random. `quiet`: no
    progress bar.
    """
    generator = torch.Generator(data.images.device).manual_seed(seed)
    with attacked_in_eval_mode(model):
        for start in track(range(0, len(data), BATCH), description=f"attack {attack.name}", disable=quiet):
            rows = slice(start, start + BATCH)
            yield attack.images(model, data.pixels(rows), data.labels[rows], generator=generator)
