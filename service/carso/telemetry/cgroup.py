"""What the kernel grants this process and what it takes: its own cgroup (version 2), read at every scrape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

ROOT = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")


class Cgroup(Collector):
    """A collector for a Prometheus registry. A scrape leaves out what the kernel does not tell, such as a limit."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the cgroup."""
        self._folder = folder

    @classmethod
    def find(cls, *, root: Path = ROOT, of_this_process: Path = OF_THIS_PROCESS) -> Cgroup | None:
        """Return None where there is no cgroup of version 2: on other systems than Linux, and on old ones."""
        try:
            (path,) = [line[3:] for line in of_this_process.read_text().splitlines() if line.startswith("0::")]
        except (OSError, ValueError):
            return None
        folder = root / path.lstrip("/")
        return cls(folder) if (folder / "cgroup.procs").exists() else None

    def collect(self) -> Iterator[Metric]:
        """Read the files of the cgroup."""
        cpu, memory = self._table("cpu.stat"), self._table("memory.stat")
        used, limit = self._number("memory.current"), self._number("memory.max")
        counters = {
            "cpu_periods": ("Periods of the CPU quota in which the process had work.", cpu.get("nr_periods")),
            "cpu_throttled_periods": ("Those in which it had to stop.", cpu.get("nr_throttled")),
        }
        gauges = {
            "memory_working_set_bytes": (
                "Memory that cannot be freed at once: all but the files that were not read for a while.",
                None if used is None else max(0, used - memory.get("inactive_file", 0)),
            ),
            "memory_limit_bytes": ("The memory at which the process is ended.", limit),
        }
        for name, (text, value) in counters.items():
            if value is not None:
                yield CounterMetricFamily(f"carso_cgroup_{name}", text, value=value)
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"carso_cgroup_{name}", text, value=value)

    def describe(self) -> list[Metric]:
        """Return nothing: what there is may change."""
        return []

    def _table(self, name: str) -> dict[str, int]:
        try:
            lines = (self._folder / name).read_text().splitlines()
            return {key: int(value) for key, value in (line.split() for line in lines)}
        except (OSError, ValueError):
            return {}

    def _number(self, name: str) -> int | None:
        try:
            return int((self._folder / name).read_text())
        except (OSError, ValueError):  # no such controller, or "max": no limit
            return None
