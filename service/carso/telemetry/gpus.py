"""Metrics of the GPUs that this process may use, read from NVML at every scrape."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)


class Gpus(Collector):
    """A collector for a Prometheus registry. A scrape leaves out what a GPU does not tell."""

    def __init__(self, nvml: Any) -> None:
        """`nvml` is the module `pynvml`, initialised."""
        self._nvml = nvml
        self._count: int = nvml.nvmlDeviceGetCount()

    @classmethod
    def find(cls) -> Gpus | None:
        """Return None where NVML's bindings (`carso[gpu]`) or the driver's library are missing."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml)
        except Exception as e:  # no module, no library, no permission: serving needs none of it
            log.warning("no metrics of the GPU: %s", e)
            return None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Ask NVML about every GPU."""
        used, total, busy = self.describe()
        nvml = self._nvml
        for index in range(self._count):
            gpu = [str(index)]
            try:
                device = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(device)
                used.add_metric(gpu, memory.used)
                total.add_metric(gpu, memory.total)
                busy.add_metric(gpu, nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)  # not of a MIG slice
            except nvml.NVMLError as e:
                log.debug("GPU %d does not tell all: %s", index, e)
        yield from (used, total, busy)

    def describe(self) -> list[GaugeMetricFamily]:
        """Return the metrics without samples."""
        texts = {
            "memory_used_bytes": "Used, by all processes.",
            "memory_total_bytes": "Of the device.",
            "utilization_ratio": "Share of NVML's last sampling period in which a kernel was running.",
        }
        return [GaugeMetricFamily(f"carso_gpu_{name}", text, labels=["gpu"]) for name, text in texts.items()]
