"""The documented table of metrics against the endpoint."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from carso.telemetry.gpus import Gpus
from prometheus_client.parser import text_string_to_metric_families

from tests.calls import VALUES, as_npy, as_png
from tests.waiting import comes_to

TABLE = Path(__file__).parents[1] / "docs/metrics.md"


def documented() -> dict[str, tuple[str, set[str]]]:
    rows = re.findall(r"^\| `(carso_\w+)` \| (\w+) \|([^|]*)\|", TABLE.read_text(), re.MULTILINE)
    return {name: (kind, {label.strip() for label in labels.split(",")} - {""}) for name, kind, labels in rows}


def test_the_table_lists_what_the_endpoint_shows_with_types_and_labels(client):
    as_npy("/classify", client, VALUES)
    as_png("/classify/fast", client)
    client.get("/nothing")

    def shown() -> dict[str, tuple[str, set[str]]]:
        found = {}
        for family in text_string_to_metric_families(client.get("/metrics").text):
            if family.name.startswith("carso_"):
                name = f"{family.name}_total" if family.type == "counter" else family.name
                assert family.documentation
                found[name] = (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
        return found

    comes_to(
        lambda: shown() | GPU_METRICS | KEY_METRICS | CGROUP_METRICS | CANARY_METRICS | WORKER_METRICS, documented()
    )  # a request is counted when its answer is out


GPU_METRICS = {
    f"carso_gpu_{name}": ("gauge", {"gpu"}) for name in ("memory_used_bytes", "memory_total_bytes", "utilization_ratio")
}

# where callers need keys
KEY_METRICS = {
    "carso_caller_requests_total": ("counter", {"caller", "status"}),
    "carso_caller_rows_total": ("counter", {"caller"}),
    "carso_caller_attack_evidence": ("gauge", {"caller"}),
    "carso_caller_near_duplicates_total": ("counter", {"caller"}),
    "carso_caller_uncertified_evidence": ("gauge", {"caller"}),
}

# where there are several workers
WORKER_METRICS = {
    "carso_workers": ("gauge", {"state"}),
    "carso_worker_restarts_total": ("counter", set()),
}

# where the bundle has samples
CANARY_METRICS = {"carso_canary_correct_ratio": ("gauge", set())}

# where the kernel tells them
CGROUP_METRICS = {
    "carso_cgroup_cpu_periods_total": ("counter", set()),
    "carso_cgroup_cpu_throttled_periods_total": ("counter", set()),
    "carso_cgroup_memory_working_set_bytes": ("gauge", set()),
    "carso_cgroup_memory_limit_bytes": ("gauge", set()),
}


class DriverError(Exception):
    pass


class Driver(SimpleNamespace):
    """Two devices of NVML's interface: the second, a slice of a card, knows no utilisation."""

    NVMLError = DriverError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=2**30 + handle, total=2**33)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if handle:
            raise DriverError("not supported")
        return SimpleNamespace(gpu=37, memory=12)


def test_what_a_gpu_tells_is_shown_in_base_units_and_what_it_does_not_is_left_out():
    families = {family.name: family.samples for family in Gpus(Driver()).collect()}
    assert set(families) == set(GPU_METRICS)
    values = {name: [(s.labels["gpu"], s.value) for s in samples] for name, samples in families.items()}
    assert values["carso_gpu_memory_used_bytes"] == [("0", 2**30), ("1", 2**30 + 1)]
    assert values["carso_gpu_memory_total_bytes"] == [("0", 2**33), ("1", 2**33)]
    assert values["carso_gpu_utilization_ratio"] == [("0", 0.37)]


def test_without_a_driver_there_are_no_metrics_of_gpus(caplog):
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert Gpus.find() is None
        assert "no metrics of the GPU" in caplog.text
    else:
        assert Gpus.find() is not None
