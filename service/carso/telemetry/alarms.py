"""Alarms: signs of an attack that more images show than clean ones do, among all images and among those of one key.

There are two signs: the paths disagree, and a label is not proven. Each is held against the bundle's own clean rate by
``carso.telemetry.evidence``, whose promise is that of each alarm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from carso.board.whole import Numbers, TooManyNames, Whole
from carso.bundle import Manifest
from carso.choices import DEFAULT_EPS
from carso.inference.jobs import Certify, Outcome
from carso.telemetry.evidence import Evidence, upper_bound

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """What an image may show, and the names of what is counted."""

    cell: str  # of its evidence; those of callers are below
    total: str  # the metric
    by_caller: str  # the metric of each key
    text: str


DISAGREE = Sign(
    "evidence",
    "carso_attack_evidence",
    "carso_caller_attack_evidence",
    "log10 of the evidence that the paths disagree more than on clean images; an alarm at 2.302.",
)
UNPROVEN = Sign(
    "unproven",
    "carso_uncertified_evidence",
    "carso_caller_uncertified_evidence",
    "log10 of the evidence that fewer images are certified than clean ones; an alarm at 2.302.",
)


class Alarms:
    """Holds what the service answers against what its bundle says of clean images. For use on the event loop."""

    def __init__(
        self, clean: Manifest, *, certify_eps: float = DEFAULT_EPS, whole: Whole, registry: CollectorRegistry
    ) -> None:
        """`certify_eps`: of a proof, where a request does not say. `registry`: shows the metrics."""
        self._certify_eps = certify_eps
        self._judged = whole.cell("judged")  # images of which a proof was asked at that eps; the proven ones
        ratio = Gauge(
            "carso_certified_ratio",
            "Share of images that are proven, if a proof was asked at CARSO_CERTIFY_EPS; NaN before the first.",
            registry=registry,
        )
        ratio.set_function(self._certified_ratio)
        self._disagree: Alarm | None = None
        if (measured := clean.disagreement) is not None:
            rate = Gauge(
                "carso_clean_disagreement_ratio",
                "Share of clean validation images on which the bundle's paths disagree.",
                registry=registry,
            )
            rate.set(measured.rate)
            shown = measured.disagree
            self._disagree = Alarm(DISAGREE, shown=shown, images=measured.images, whole=whole, registry=registry)
        self._unproven: Alarm | None = None
        if (proofs := clean.proofs) is not None and proofs.eps == certify_eps:
            rate = Gauge(
                "carso_clean_certified_ratio",
                "Share of clean validation images that the bundle proves at CARSO_CERTIFY_EPS.",
                registry=registry,
            )
            rate.set(proofs.rate)
            shown = proofs.images - proofs.proven
            self._unproven = Alarm(UNPROVEN, shown=shown, images=proofs.images, whole=whole, registry=registry)

    def elections(self, outcomes: Sequence[Outcome], *, agree: Sequence[bool], caller: str | None) -> None:
        """Take note of whether elections agree with the fast path. `caller`: the name of the key; None: there are none.

        Where a certificate decided, the paths count as agreeing. The images that are left to the vote disagree more
        often than the bundle's clean images as a whole.
        """
        if self._disagree is not None:
            disagree = [
                outcome.ending != "certificate" and not agrees for outcome, agrees in zip(outcomes, agree, strict=True)
            ]
            self._disagree.note(disagree, caller=caller)

    def certified(self, certified: Sequence[bool], *, asked: Certify, caller: str | None) -> None:
        """Take note of which of some images are proven, if that was asked at the service's own eps. Otherwise callers
        could raise an alarm by the eps that they choose.
        """
        if asked.mode == "max" or asked.eps != self._certify_eps:
            return

        def judged(numbers: Numbers) -> Numbers:
            images, proven = numbers or (0.0, 0.0)
            return images + len(certified), proven + sum(certified)

        self._judged.change(judged)
        if self._unproven is not None:
            self._unproven.note([not is_certified for is_certified in certified], caller=caller)

    def _certified_ratio(self) -> float:
        images, proven = self._judged.read() or (0.0, 0.0)
        return proven / images if images else nan


class Alarm:
    """Evidence that images show a sign more often than clean ones do."""

    def __init__(self, sign: Sign, *, shown: int, images: int, whole: Whole, registry: CollectorRegistry) -> None:
        """`shown` of `images` clean images show the sign. If all do, no image can be evidence, and no metric is shown.

        Without keys, there are no series of callers.
        """
        self._sign = sign
        self._whole = whole
        self._bound = upper_bound(shown, images)
        self._of_callers: dict[str, Evidence] = {}
        self._total: Evidence | None = None
        if self._bound < 1:
            self._total = Evidence(self._bound, whole.cell(sign.cell))
            Gauge(sign.total, sign.text, registry=registry).set_function(partial(getattr, self._total, "log10"))
            registry.register(_ByCaller(sign, whole, self._bound))

    def note(self, images: Sequence[bool], *, caller: str | None) -> None:
        """Take note of which of some images show the sign. `caller`: the name of their key; None: there are no keys."""
        if self._total is None or not images:
            return
        self._total.add_all(images)
        if caller is not None:
            self._of_caller(caller).add_all(images)

    def _of_caller(self, caller: str) -> Evidence:
        """Return what takes note of a caller's images: at most one for each name in the files of keys."""
        if caller not in self._of_callers:
            try:
                cell = self._whole.cell(f"{self._sign.cell}/{caller}")
            except TooManyNames as e:
                log.error("there is no %s of the key of %s: %s", self._sign.by_caller, caller, e)
                cell = None  # it is not shown
            self._of_callers[caller] = Evidence(self._bound, cell)
        return self._of_callers[caller]


class _ByCaller(Collector):
    """Shows the evidence of every caller, whichever worker it came to."""

    def __init__(self, sign: Sign, whole: Whole, bound: float) -> None:
        self._sign = sign
        self._whole = whole
        self._bound = bound

    def collect(self) -> Iterator[Metric]:
        cells = self._whole.cells(f"{self._sign.cell}/")
        if cells:
            (family,) = self.describe()
            for caller, cell in sorted(cells.items()):
                family.add_metric([caller], Evidence(self._bound, cell).log10)
            yield family

    def describe(self) -> list[GaugeMetricFamily]:
        text = f"As {self._sign.total}, of the images of one key."
        return [GaugeMetricFamily(self._sign.by_caller, text, labels=["caller"])]
