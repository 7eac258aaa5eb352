"""A running service under attack by somebody who sees only the labels of its answers, through its HTTP API.

Every query is a request of its own. A service may refuse an image by name, because it is nearly an earlier one, or like
none that it knows: such a query fools nobody. A service that is busy, or not ready, is asked again when it says so.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from carso import Client, RequestRefused, Unavailable
from carso.bundle import Bundle
from carso.errors import BlankImage, NearDuplicate, NotReady, Overloaded, UntypicalImage, WrongScale
from torch import Tensor

from carso_training.attacks.rays import rays
from carso_training.errors import RunError
from carso_training.robustness.campaign import Trial

REFUSED = -1  # in place of a label
ABOUT_THE_IMAGE = frozenset(kind.name for kind in (NearDuplicate, UntypicalImage, BlankImage, WrongScale))
PASSING = frozenset(kind.name for kind in (Overloaded, NotReady))
PATIENCE = 120.0  # seconds that one query waits for a busy service
PAUSE = 1.0  # seconds, where the service does not say how long
CLASSIFIED = "classified"


class Service:
    """The robust path of a service. Every vote is over latents that the service draws afresh."""

    def __init__(self, client: Client, bundle: Bundle, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """`client`: one that sends nothing again by itself (retries=0), so that each request is counted.

        Raises RunError if the service serves another bundle, and CarsoError if it does not answer.
        """
        info = client.info()
        if info.bundle.checksum != bundle.checksum:
            raise RunError(
                f"the service has bundle {info.bundle.name}, {info.bundle.checksum[:12]}, and not {bundle.folder}, "
                f"{bundle.checksum[:12]}. Start it with CARSO_BUNDLE={bundle.folder}"
            )
        self._client = client
        self._sleep = sleep
        self._answers: Counter[str] = Counter()

    def labels(self, images: Tensor) -> Tensor:
        """Images [B, *shape] in [0, 1] -> labels [B], REFUSED for those that the service refuses.

        Raises CarsoError for any other refusal, and if the service stays busy for PATIENCE seconds.
        """
        found = [self._label(image) for image in images.cpu().numpy()]
        return torch.tensor(found, dtype=torch.int64, device=images.device)

    def answers(self) -> dict[str, int]:
        """Return how many requests were answered since the last call, by what: `classified`, or the error's name."""
        answers, self._answers = dict(self._answers), Counter()
        return answers

    def _label(self, image: np.ndarray) -> int:
        waited = 0.0
        while True:
            try:
                (prediction,) = self._client.classify(image).predictions
            except RequestRefused as e:
                if e.error not in ABOUT_THE_IMAGE:
                    raise
                self._answers[e.error] += 1
                return REFUSED
            except Unavailable as e:
                pause = e.retry_after or PAUSE
                if e.error not in PASSING or waited + pause > PATIENCE:
                    raise
                self._answers[e.error] += 1
                self._sleep(pause)
                waited += pause
            else:
                self._answers[CLASSIFIED] += 1
                return prediction.label


class ServiceJudge:
    """A judge that asks the service."""

    def __init__(self, service: Service, *, draws: int) -> None:
        """`draws`: elections that an image must win."""
        self._service, self._draws = service, draws

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `judges.Judge`. An attacked image that is refused withstands; a clean one, of trial 0, was
        not classified correctly.
        """
        right = torch.ones(len(images), dtype=torch.bool)
        for _ in range(self._draws):
            asked = right.nonzero().squeeze(1)
            if len(asked):
                said = self._service.labels(images[asked])
                right[asked] = ((said == labels[asked]) | ((said == REFUSED) & (trial > 0))).cpu()
        return right


def blackbox_trials(service: Service, *, eps: float, queries: int) -> list[Trial]:
    """Return RayS on the labels that the service gives: with 10 queries an image, 100 and so on, up to `queries`.

    Each begins anew on the images that withstood the one before. RayS draws nothing at random, so a longer one asks the
    same queries first, unless an answer differs.
    """
    return [
        Trial(name=f"rays-{most}", make=partial(_attacked, service, eps, most), settings={"queries": most})
        for most in budgets(queries)
    ]


def budgets(queries: int) -> list[int]:
    """Return 10, 100, 1000 and so on, as far as they are below `queries`, and `queries`."""
    found, power = [], 10
    while power < queries:
        found.append(power)
        power *= 10
    return [*found, queries]


def _attacked(
    service: Service, eps: float, queries: int, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    return rays(service.labels, images, labels, eps=eps, queries=queries)
