"""How many workers, and on which processors each of them runs."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from carso.choices import Device, EngineShare, Workers
from carso.inference.runtime import GPU_BUILD, installed

MOST = 64  # workers that `auto` takes
NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs."""

    cpus: frozenset[int] | None  # the processors that it keeps to; None: all that the service may use
    threads: int  # of its engine


def how_many(asked: Workers, *, cpus: int, on_gpu: bool) -> int:
    """Return the number of workers.

    `auto` is one on a GPU, which one process owns, and otherwise one for each processor that the service may use, up to
    MOST: benchmarks/workers.py measured this on two processors.
    """
    if asked != "auto":
        return asked
    return 1 if on_gpu else min(cpus, MOST)


def shares_engine(asked: EngineShare, *, on_gpu: bool) -> bool:
    """Tell whether all workers have one engine. `auto`: on a GPU, which belongs to one process."""
    return asked == "shared" or (asked == "auto" and on_gpu)


def may_be_on_gpu(device: Device) -> bool:
    """Tell whether the engine may run on a GPU, without loading ONNX Runtime."""
    if device != "auto":
        return device == "cuda"
    if not installed(GPU_BUILD):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def places(workers: int, *, nodes: Sequence[frozenset[int]], cpus: int) -> list[Place]:
    """Share out the processors among workers.

    `nodes`: the processors of each NUMA node that the service may use; `cpus`: how many of all these it may use at a
    time, which a quota may make fewer. Where there are several nodes, each worker keeps to one, or to several that no
    other worker uses. The threads of all engines together are as many as `cpus`, or one for each worker if that is
    more.
    """
    groups = [
        frozenset[int]().union(*nodes[first :: min(workers, len(nodes))]) for first in range(min(workers, len(nodes)))
    ]
    total = sum(map(len, groups))
    found = []
    for worker in range(workers):
        group = groups[worker % len(groups)]
        members = len(range(worker % len(groups), workers, len(groups)))
        of_group = cpus if len(groups) == 1 else cpus * len(group) // total
        threads = of_group // members + (worker // len(groups) < of_group % members)
        found.append(Place(group if len(nodes) > 1 else None, max(1, threads)))
    return found


def usable_nodes(allowed: Collection[int], told: Path = NODES) -> list[frozenset[int]]:
    """Return the processors of each NUMA node, as far as they are `allowed`.

    Linux lists them in `told`. Elsewhere, and where that cannot be read, all are taken to be of one node.
    """
    found = []
    for node in sorted(told.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            cpus = _listed((node / "cpulist").read_text())
        except (OSError, ValueError):
            return [frozenset(allowed)]
        if cpus := cpus & frozenset(allowed):
            found.append(cpus)
    return found if frozenset().union(*found) == frozenset(allowed) else [frozenset(allowed)]


def _listed(text: str) -> frozenset[int]:
    """Read a list as Linux writes it: 0-3,8-11."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
