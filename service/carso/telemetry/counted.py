"""Counters and histograms of a service with workers: each worker counts in its series, and a scrape shows the sums."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from carso.board.memory import Memory
from carso.board.series import Full, Series

log = logging.getLogger(__name__)


class _Name(NamedTuple):
    """What the name of a count says, which is written as a JSON array."""

    kind: str  # counter or histogram
    metric: str
    text: str
    sample: str
    labels: dict[str, str]


class _Count:
    """A number as prometheus_client's metrics keep theirs, but among the series of this worker."""

    def __init__(self, memory: Memory, index: int) -> None:
        self._doubles = memory.doubles
        self._index = index
        self._lock = Lock()

    def inc(self, amount: float) -> None:
        with self._lock:
            self._doubles[self._index] += amount

    def get(self) -> float:
        return float(self._doubles[self._index])

    def set(self, value: float, timestamp: float | None = None) -> None:
        raise NotImplementedError("a count is not set")

    def set_exemplar(self, exemplar: object) -> None:
        raise NotImplementedError("a count has no examples")

    def get_exemplar(self) -> None:
        return None


def kinds(memory: Memory, series: Series) -> tuple[type[Counter], type[Histogram]]:
    """Return prometheus_client's classes of counters and histograms, but with counts among the series of a worker.

    Their numbers are put in the place of the library's own, where its multiprocess mode does the same. That mode keeps
    them in files of a folder which somebody has to provide, empty before every start, and empty of dead processes.
    """

    def count(metric: Any, own: Any, sample: str, labels: dict[str, str]) -> Any:
        of_metric = dict(zip(metric._labelnames, metric._labelvalues, strict=True))
        name = _Name(metric._type, metric._name, metric._documentation, metric._name + sample, of_metric | labels)
        try:
            return _Count(memory, series.index(json.dumps(name).encode()))
        except Full as e:
            log.error("%s%s is not counted any more: %s", metric._name, of_metric, e)
            return own

    class SharedCounter(Counter):
        def _metric_init(self) -> None:
            super()._metric_init()
            self._value = count(self, self._value, "_total", {})

    class SharedHistogram(Histogram):
        def _metric_init(self) -> None:
            super()._metric_init()
            self._sum = count(self, self._sum, "_sum", {})
            self._buckets = [
                count(self, own, "_bucket", {"le": _in_words(bound)})
                for own, bound in zip(self._buckets, self._upper_bounds, strict=True)
            ]

    return SharedCounter, SharedHistogram


class Counted(Collector):
    """A collector of the sums over the series of all workers."""

    def __init__(self, series: Sequence[Series]) -> None:
        """`series`: those of each worker."""
        self._series = series

    def collect(self) -> Iterator[Metric]:
        """Read the series of all workers."""
        sums: dict[bytes, float] = {}
        for series in self._series:
            for encoded, number in series.numbers():
                sums[encoded] = sums.get(encoded, 0.0) + number
        families: dict[str, Metric] = {}
        histograms: dict[tuple[str, tuple[str, ...]], list[tuple[float, _Name, float]]] = {}
        for encoded, number in sums.items():
            name = _parsed(encoded)
            if name.metric not in families:
                families[name.metric] = Metric(name.metric, name.text, name.kind)
            if "le" in name.labels:
                of = tuple(value for label, value in name.labels.items() if label != "le")
                histograms.setdefault((name.metric, of), []).append((float(name.labels["le"]), name, number))
            else:
                families[name.metric].add_sample(name.sample, name.labels, number)
        for (metric, _), buckets in histograms.items():
            total = 0.0
            for bound, name, number in sorted(buckets):
                total += number
                families[metric].add_sample(name.sample, name.labels, total)
                if math.isinf(bound):
                    labels = {label: value for label, value in name.labels.items() if label != "le"}
                    families[metric].add_sample(f"{metric}_count", labels, total)
        yield from families.values()

    def describe(self) -> list[Metric]:
        """Return nothing: what there is may change."""
        return []


def _in_words(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


@cache  # names never go away
def _parsed(encoded: bytes) -> _Name:
    return _Name(*json.loads(encoded))
