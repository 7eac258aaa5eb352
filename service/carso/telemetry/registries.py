"""Where the metrics are registered, and what counts them."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector


@dataclass(frozen=True, slots=True)
class Registries:
    """``carso.telemetry.workers`` makes them for a service with workers, and `alone` for one that is one process."""

    shown: CollectorRegistry  # what a scrape shows
    counting: CollectorRegistry  # of counters and histograms; those of workers are shown by another collector
    counter: type[Counter]
    histogram: type[Histogram]

    @classmethod
    def alone(cls) -> Registries:
        """Return those of a process that shows itself."""
        shown = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=shown)
        return cls(shown, shown, Counter, Histogram)
