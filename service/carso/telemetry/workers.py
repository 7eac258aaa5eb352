"""What a worker shows of the whole service: sums over all workers, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.registry import Collector

from carso.board.seat import Board, Seat
from carso.board.whole import State, Whole
from carso.telemetry.counted import Counted, kinds
from carso.telemetry.processes import Processes
from carso.telemetry.registries import Registries


def registries(whole: Whole) -> Registries:
    """Return where a process registers its metrics: those of a process that is alone, or of a worker.

    Those of a worker show nothing of the interpreter's garbage collector, whose counts are those of one process.
    """
    if not isinstance(whole, Seat):
        return Registries.alone()
    board = whole.board
    shown = CollectorRegistry()
    PlatformCollector(registry=shown)
    for of_all in (Processes(board), Counted(board.series), _Workers(board)):
        shown.register(of_all)
    counter, histogram = kinds(board.memory, board.series[whole.number - 1])
    return Registries(shown, CollectorRegistry(), counter, histogram)


class _Workers(Collector):
    """Shows how the workers are."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        states, restarts = self.describe()
        found = self._board.states()
        for state in State:
            states.add_metric([state.name.lower()], found.count(state))
        restarts.add_metric([], self._board.restarts)
        yield from (states, restarts)

    def describe(self) -> tuple[GaugeMetricFamily, CounterMetricFamily]:
        return (
            GaugeMetricFamily("carso_workers", "Workers, by what they are doing.", labels=["state"]),
            CounterMetricFamily("carso_worker_restarts", "Workers that took the place of one that ended.", labels=[]),
        )
