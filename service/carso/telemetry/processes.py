"""What the processes of a service with workers take, together: the figures that one process shows of itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from carso.board.seat import Board


class Processes(Collector):
    """A collector of memory, processor time and open files, of the supervisor and all workers.

    Memory and processor time are sums. Pages that processes share count once for each. Open files and their limit are
    those of the process that is nearest its limit, because each has a limit of its own.
    """

    def __init__(self, board: Board) -> None:
        """`board`: which processes there are."""
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """Ask the kernel about every process."""
        found: dict[str, Metric] = {}
        files: list[tuple[float, float]] = []
        for process in self._board.processes():
            metrics = {metric.name: metric for metric in _metrics(process)}
            values = {name: metric.samples[0].value for name, metric in metrics.items()}
            if {"process_open_fds", "process_max_fds"} <= values.keys():
                files.append((values["process_open_fds"], values["process_max_fds"]))
            for name, value in values.items():
                if name not in found:
                    found[name] = metrics[name]
                else:
                    sample = found[name].samples[0]
                    of_both = min(sample.value, value) if name == "process_start_time_seconds" else sample.value + value
                    found[name].samples[0] = sample._replace(value=of_both)
        if files:
            opened, most = max(files, key=lambda of_one: of_one[0] / of_one[1])
            for name, value in (("process_open_fds", opened), ("process_max_fds", most)):
                found[name].samples[0] = found[name].samples[0]._replace(value=value)
        if (cpu := found.get("process_cpu_seconds")) is not None:  # what ended workers took stays, as no counter falls
            cpu.samples[0] = cpu.samples[0]._replace(value=cpu.samples[0].value + self._board.cpu_of_the_dead)
        yield from found.values()

    def describe(self) -> list[Metric]:
        """Return nothing: what there is depends on the system."""
        return []


def _metrics(process: int) -> Iterable[Metric]:
    return ProcessCollector(pid=lambda: process, registry=None).collect()
