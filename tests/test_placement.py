"""How many workers there are, and which processors each has: pure arithmetic over made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from carso.workers import placement
from carso.workers.placement import Place, how_many, may_be_on_gpu, places, usable_nodes

ONE_NODE = [frozenset(range(8))]
TWO_NODES = [frozenset(range(8)), frozenset(range(8, 16))]
UNEVEN = [frozenset(range(12)), frozenset(range(12, 16))]
FOUR_NODES = [frozenset(range(first, first + 4)) for first in (0, 4, 8, 12)]


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (2, 2), (7, 7), (64, 64), (192, 64)])
def test_auto_takes_a_worker_for_each_processor_up_to_a_limit(cpus, workers):
    assert how_many("auto", cpus=cpus, on_gpu=False) == workers
    assert how_many("auto", cpus=cpus, on_gpu=True) == 1
    assert how_many(3, cpus=cpus, on_gpu=False) == 3


@pytest.mark.parametrize(
    ("workers", "nodes", "cpus", "threads"),
    [
        (1, ONE_NODE, 8, [8]),
        (2, ONE_NODE, 8, [4, 4]),
        (3, ONE_NODE, 8, [3, 3, 2]),
        (2, ONE_NODE, 2, [1, 1]),  # a quota of two processors
        (4, ONE_NODE, 2, [1, 1, 1, 1]),  # more workers than processors
    ],
)
def test_on_one_node_the_threads_are_shared_out_and_nobody_is_pinned(workers, nodes, cpus, threads):
    assert places(workers, nodes=nodes, cpus=cpus) == [Place(None, count) for count in threads]


@pytest.mark.parametrize(
    ("workers", "nodes", "cpus", "expected"),
    [
        (2, TWO_NODES, 16, [(0, 8), (1, 8)]),
        (3, TWO_NODES, 16, [(0, 4), (1, 8), (0, 4)]),
        (4, TWO_NODES, 8, [(0, 2), (1, 2), (0, 2), (1, 2)]),  # a quota of half of them
        (2, UNEVEN, 16, [(0, 12), (1, 4)]),
    ],
)
def test_on_several_nodes_each_worker_keeps_to_one(workers, nodes, cpus, expected):
    assert places(workers, nodes=nodes, cpus=cpus) == [Place(nodes[node], threads) for node, threads in expected]


def test_fewer_workers_than_nodes_have_several_each_and_leave_none_idle():
    found = places(2, nodes=FOUR_NODES, cpus=16)
    assert [place.threads for place in found] == [8, 8]
    assert found[0].cpus is not None and found[1].cpus is not None
    assert not found[0].cpus & found[1].cpus
    assert found[0].cpus | found[1].cpus == frozenset(range(16))
    assert places(1, nodes=FOUR_NODES, cpus=16) == [Place(frozenset(range(16)), 16)]


@pytest.mark.parametrize("workers", range(1, 20))
@pytest.mark.parametrize("cpus", [1, 3, 16])
@pytest.mark.parametrize("nodes", [ONE_NODE, TWO_NODES, UNEVEN, FOUR_NODES])
def test_there_are_never_more_threads_than_processors_but_one_for_each_worker(workers, cpus, nodes):
    found = places(workers, nodes=nodes, cpus=min(cpus, sum(map(len, nodes))))
    assert len(found) == workers
    assert all(place.threads >= 1 for place in found)
    above_one = sum(place.threads for place in found if place.threads > 1)
    assert above_one <= cpus


def topology(folder: Path, **nodes: str) -> Path:
    for name, cpus in nodes.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "cpulist").write_text(cpus + "\n")
    (folder / "possible").write_text("0-1\n")
    return folder


def test_nodes_are_read_as_linux_lists_them_as_far_as_they_are_allowed(tmp_path):
    told = topology(tmp_path, node0="0-3,8-11", node1="4-7,12", node10="", node2="13")
    everything = usable_nodes(range(14), told)
    assert everything == [frozenset((0, 1, 2, 3, 8, 9, 10, 11)), frozenset((4, 5, 6, 7, 12)), frozenset((13,))]
    assert usable_nodes({1, 4, 5}, told) == [frozenset((1,)), frozenset((4, 5))]
    assert usable_nodes({1, 2}, told) == [frozenset((1, 2))]


@pytest.mark.parametrize("cpulist", ["nonsense", "0"])
def test_where_the_nodes_are_not_told_all_processors_are_of_one(tmp_path, cpulist):
    assert usable_nodes({0, 1}, tmp_path) == [frozenset((0, 1))]
    assert usable_nodes({0, 1}, topology(tmp_path, node0=cpulist)) == [frozenset((0, 1))]


def test_a_gpu_is_expected_where_it_was_asked_for_or_may_be_found(monkeypatch):
    assert may_be_on_gpu("cuda")
    assert not may_be_on_gpu("cpu")
    monkeypatch.setattr(placement, "installed", lambda distribution: False)
    assert not may_be_on_gpu("auto")
    monkeypatch.setattr(placement, "installed", lambda distribution: True)
    found: list[str] = []
    monkeypatch.setattr(placement.ctypes, "CDLL", found.append)
    assert may_be_on_gpu("auto")

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(placement.ctypes, "CDLL", missing)
    assert not may_be_on_gpu("auto")
    assert found == ["libcuda.so.1"]


def test_workers_share_an_engine_where_it_is_on_a_gpu_or_that_is_asked_for():
    shared = {
        (asked, on_gpu): placement.shares_engine(asked, on_gpu=on_gpu)
        for asked in ("auto", "shared", "own")
        for on_gpu in (False, True)
    }
    assert {case for case, found in shared.items() if found} == {("auto", True), ("shared", False), ("shared", True)}
