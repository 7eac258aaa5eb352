"""A running service under attack by somebody who sees only the labels of its answers, through its HTTP API."""

from __future__ import annotations

import torch
from carso import Client
from carso.bundle import Bundle
from torch import Tensor

from carso_training.attacks.rays import rays
from carso_training.errors import RunError
from carso_training.robustness.campaign import Trial


class Service:
    """The robust path of a service. Every vote is over latents that the service draws afresh."""

    def __init__(self, client: Client, bundle: Bundle) -> None:
        """Raises RunError if the service serves another bundle, and CarsoError if it does not answer."""
        info = client.info()
        if info.bundle.checksum != bundle.checksum:
            raise RunError(
                f"the service has bundle {info.bundle.name}, {info.bundle.checksum[:12]}, and not {bundle.folder}, "
                f"{bundle.checksum[:12]}. Start it with CARSO_BUNDLE={bundle.folder}"
            )
        self._client, self._most = client, info.limits.max_images

    def labels(self, images: Tensor) -> Tensor:
        """Images [B, *shape] in [0, 1] -> labels [B]: real requests, of as many images as the service takes.

        The service refuses an image of one value throughout: that one is not sent, and its label is -1.
        """
        pixels = images.cpu()
        flat = pixels.flatten(1)
        sent = (flat.amax(dim=1) > flat.amin(dim=1)).nonzero().squeeze(1)
        found = torch.full((len(images),), -1)
        for rows in sent.split(self._most):
            if len(rows):
                predictions = self._client.classify(pixels[rows].numpy()).predictions
                found[rows] = torch.tensor([prediction.label for prediction in predictions])
        return found.to(images.device)


class ServiceJudge:
    """A judge that asks the service."""

    def __init__(self, service: Service, *, draws: int) -> None:
        """`draws`: elections that an image must win."""
        self._service, self._draws = service, draws

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `judges.Judge`."""
        right = torch.ones(len(images), dtype=torch.bool)
        for _ in range(self._draws):
            asked = right.nonzero().squeeze(1)
            if len(asked):
                said = self._service.labels(images[asked])
                right[asked] = ((said == labels[asked]) | (said < 0)).cpu()
        return right


def blackbox_trials(service: Service, *, eps: float, queries: int) -> list[Trial]:
    """Return RayS on the labels that the service gives."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return rays(service.labels, images, labels, eps=eps, queries=queries)

    return [Trial(name="rays", make=make, settings={"queries": queries})]
