"""What the workers of one service share: numbers that no process loses or counts twice, whoever is killed when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from carso.board import seat
from carso.board.memory import Memory
from carso.board.seat import CELL_NUMBERS, NAME_BYTES, Board, Seat
from carso.board.series import Full, Series
from carso.board.whole import PARTS, Cell, OwnCell, State, TooManyNames, Whole
from carso.bundle import Bundle
from carso.errors import NotReady, Overloaded
from carso.http import keys
from carso.http.keys import SAVED_UP, ApiKeys, BadKeys, Caller
from carso.inference.abilities import Abilities, Choice
from carso.inference.admission import Admission, QueueFull
from carso.inference.engine import Engine
from carso.inference.thread import InThread
from carso.telemetry import counted
from carso.telemetry.evidence import Evidence
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import Lifecycle, Probes
from carso.telemetry.processes import Processes
from carso.telemetry.workers import registries
from prometheus_client.parser import text_string_to_metric_families

from tests.bundles import SMALL, shared_bundle
from tests.calls import sample
from tests.server import ROOT
from tests.waiting import PATIENCE

IN_A_PROCESS = """
import sys
from carso.board.memory import Memory
from carso.board.seat import Board, Seat
board = Board(Memory(int(sys.argv[1])))
whole = Seat(board, int(sys.argv[2]))
"""
NOTHING = Abilities("none", Choice("float32", "there is no engine"), unproven="there is no engine")


@pytest.fixture
def board() -> Board:
    return Board.create(workers=2, supervisor=os.getpid())


@pytest.fixture
def seats(board: Board) -> tuple[Seat, Seat]:
    return Seat(board, 1), Seat(board, 2)


@contextmanager
def process(board: Board, number: int, program: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a seat of the board, which runs a program over `whole`."""
    arguments = [sys.executable, "-c", IN_A_PROCESS + program, str(board.memory.descriptor), str(number)]
    with subprocess.Popen(
        arguments,
        pass_fds=[board.memory.descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def test_what_several_processes_change_at_once_is_changed_by_each(board):
    program = "for _ in range(2000): whole.cell('sum').change(lambda numbers: (*(n + 1 for n in numbers or (0, 0)),))"
    with process(board, 1, program) as one, process(board, 2, program) as other:
        assert (one.wait(PATIENCE), other.wait(PATIENCE)) == (0, 0)
    assert board.cell("sum").read() == (4000, 4000)


def test_a_process_that_is_killed_in_a_change_leaves_the_numbers_as_they_were_and_the_lock_free(board):
    cell = board.cell("a")
    cell.change(lambda numbers: (1, 2, 3))
    program = """
def stays(numbers):
    print("inside", flush=True)
    sys.stdin.read()
whole.cell("a").change(stays)
"""
    with process(board, 1, program) as holder:
        assert holder.stdout.readline() == "inside\n"
        holder.send_signal(signal.SIGKILL)
        assert cell.change(lambda numbers: (*numbers, 4)) == (1, 2, 3, 4)  # waits for the lock
        assert holder.wait(PATIENCE) == -signal.SIGKILL
    assert cell.read() == (1, 2, 3, 4)


def test_two_locks_and_two_threads_each_are_no_circle(board):
    """The kernel takes a process for one thread, and says that it would wait for ever."""
    program = """
import threading
def other():
    with board.memory.locked(0):
        print("has both", flush=True)
with board.memory.locked(1):
    print("has one", flush=True)
    waiting = threading.Thread(target=other)
    waiting.start()
    sys.stdin.readline()
waiting.join()
"""
    got = threading.Event()

    def other() -> None:
        with board.memory.locked(1):
            got.set()

    with process(board, 1, program) as running:
        with board.memory.locked(0):
            assert running.stdout.readline() == "has one\n"
            waiting = threading.Thread(target=other)
            waiting.start()
            running.stdin.write("go on\n")
            running.stdin.flush()
            assert got.wait(PATIENCE)
        assert running.stdout.readline() == "has both\n"
        assert running.wait(PATIENCE) == 0
        waiting.join()


@pytest.mark.parametrize("cell", [OwnCell(), Board.create(workers=1, supervisor=1).cell("a")])
def test_a_cell_is_empty_at_first_and_a_change_that_fails_changes_nothing(cell: Cell):
    assert cell.read() == ()
    assert cell.change(lambda numbers: (*numbers, 0.5)) == (0.5,)
    with pytest.raises(ZeroDivisionError):
        cell.change(lambda numbers: (1 / 0,))
    assert cell.read() == (0.5,)
    most = tuple(range(CELL_NUMBERS))
    assert cell.change(lambda numbers: most) == cell.read() == most


def test_cells_have_names_that_every_worker_finds(seats):
    one, other = seats
    one.cell("rate/a").change(lambda numbers: (1,))
    other.cell("rate/b").change(lambda numbers: (2,))
    other.cell("else")
    for whole in seats:
        assert {name: cell.read() for name, cell in whole.cells("rate/").items()} == {"a": (1,), "b": (2,)}
    alone = Whole()
    alone.cell("rate/a")
    assert list(alone.cells("rate/")) == ["a"]
    for name in ("", "x" * (NAME_BYTES + 1)):
        with pytest.raises(ValueError, match="name of a cell"):
            one.cell(name)
    assert one.cell("x" * NAME_BYTES).read() == ()


def test_a_board_without_room_for_another_caller_refuses_the_file_of_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(seat, "MOST_CELLS", 2)
    whole = Seat(Board.create(workers=1, supervisor=1), 1)
    whole.cell("one"), whole.cell("two")
    with pytest.raises(TooManyNames):
        whole.cell("three")
    file = tmp_path / "keys"
    file.write_text(f"a: {'k' * 20} rate=1\n")
    with pytest.raises(BadKeys, match="more callers with a rate"):
        ApiKeys(file, whole)
    file.write_text(f"a: {'k' * 20}\n")
    ApiKeys(file, whole)


def test_parts_belong_to_a_worker_and_go_with_it(board, seats):
    one, other = seats
    for name in PARTS:
        one.part(name).mine += 3
        other.part(name).mine += 4
        assert one.part(name).each() == other.part(name).each() == [3, 4, 0]
    board.take(1, 4711)
    board.set_state(1, State.READY)
    assert (other.others(State.READY), one.others(State.READY)) == (1, 0)
    assert 4711 in board.processes()
    board.clear(1, cpu=1.5, replaced=True)
    assert [other.part(name).each() for name in PARTS] == [[0, 4, 0]] * len(PARTS)
    Seat(board, board.engine).part("canary_asked").mine = 5  # the process of an engine that all share
    assert other.part("canary_asked").each() == [0, 4, 5]
    assert (board.states(), board.restarts, board.cpu_of_the_dead) == ([State.DEAD, State.DEAD], 1, 1.5)
    assert board.processes() == [os.getpid()]


def test_workers_never_owe_more_than_the_limit_together(board):
    program = """
from carso.inference.admission import Admission, QueueFull
from carso.inference.thread import InThread
admission, admitted = Admission(1000, whole=whole, path="fast"), 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(2000):
    try:
        admission.admit(1)
        admitted += 1
    except QueueFull:
        pass
print(admitted, flush=True)
sys.stdin.read()
"""
    with process(board, 1, program) as one, process(board, 2, program) as other:
        for running in (one, other):
            assert running.stdout.readline() == "ready\n"
        for running in (one, other):
            running.stdin.write("go\n")
            running.stdin.flush()
        assert sum(int(running.stdout.readline()) for running in (one, other)) == 1000


def test_a_queue_that_other_workers_filled_tells_when_all_of_them_have_room(seats):
    one, other = (Admission(1000, whole=whole) for whole in seats)
    one.admit(900)
    other.admit(100)
    for admission in (one, other):
        assert admission.owed == 1000
        with pytest.raises(QueueFull, match="1000 rows of work are owed"):
            admission.check(1)
    one.settle(100, seconds=1)
    assert one.pace == other.pace == pytest.approx(100)
    other.settle(50, seconds=1)
    assert one.pace == pytest.approx(150)
    with pytest.raises(QueueFull) as full:
        other.check(1000)
    assert full.value.wait == pytest.approx(850 / 150)


def test_a_worker_that_has_not_measured_its_pace_counts_as_fast_as_the_others(board, seats):
    one, other = (Admission(1000, whole=whole) for whole in seats)
    one.admit(500)
    one.settle(100, seconds=1)
    assert other.pace == pytest.approx(100)
    board.set_state(2, State.READY)
    assert one.pace == pytest.approx(200)


def test_a_rate_holds_for_all_workers_and_survives_them(board, seats, monkeypatch):
    monkeypatch.setattr(keys, "monotonic", lambda: 1.0)
    one, other = (Caller("a", 10, whole.cell("rate/a")) for whole in seats)
    one.take(int(10 * SAVED_UP) - 1)
    other.take(1)
    for caller in (one, other):
        with pytest.raises(Overloaded, match="10 rows of work per second"):
            caller.take(1)
    other.settle(-50)
    one.take(50)
    board.clear(1, cpu=0, replaced=True)
    again = Caller("a", 10, Seat(board, 1).cell("rate/a"))
    with pytest.raises(Overloaded):
        again.take(1)


def test_evidence_of_all_workers_is_one_test(seats):
    tests = [Evidence(0.02, whole.cell("evidence")) for whole in seats]
    alone = Evidence(0.02)
    for image in range(300):
        disagree = image % 7 == 0
        tests[image % 2].add(disagree)
        alone.add(disagree)
    assert tests[0].value == tests[1].value == alone.value > 1


def metrics_of(whole: Seat) -> Metrics:
    return Metrics(Bundle.load(shared_bundle(SMALL)), NOTHING, device="cpu", whole=whole, registries=registries(whole))


def test_every_worker_shows_the_sum_and_a_worker_that_takes_a_place_counts_on(board, seats):
    one, other = map(metrics_of, seats)
    one.request(endpoint="/classify", status=200, seconds=0.004)
    other.request(endpoint="/classify", status=200, seconds=3)
    other.request(endpoint="/info", status=200, seconds=0.1)
    other.caller("gateway", status=200, rows=5)

    def shown(metrics: Metrics) -> None:
        page = metrics.page().decode()
        assert sample(page, 'carso_requests_total{endpoint="/classify",status="200"}') == 2
        assert sample(page, 'carso_requests_total{endpoint="/info",status="200"}') == 1
        assert sample(page, 'carso_caller_rows_total{caller="gateway"}') == 5
        duration = 'carso_request_duration_seconds_{}{{endpoint="/classify",status="200"}}'
        assert sample(page, duration.format("count")) == 2
        assert sample(page, duration.format("sum")) == pytest.approx(3.004)
        bucket = 'carso_request_duration_seconds_bucket{{endpoint="/classify",le="{}",status="200"}}'
        found = {le: sample(page, bucket.format(le)) for le in ("0.002", "0.005", "2.0", "5.0", "+Inf")}
        assert found == {"0.002": 0, "0.005": 1, "2.0": 1, "5.0": 2, "+Inf": 2}
        kinds = {family.name: family.type for family in text_string_to_metric_families(page)}
        assert (kinds["carso_requests"], kinds["carso_request_duration_seconds"]) == ("counter", "histogram")
        assert kinds["carso_build_info"] == "gauge"

    shown(one)
    shown(other)
    board.clear(2, cpu=0, replaced=True)
    shown(one)
    again = metrics_of(Seat(board, 2))
    shown(again)
    again.request(endpoint="/classify", status=200, seconds=1)
    page = one.page().decode()
    assert sample(page, 'carso_requests_total{endpoint="/classify",status="200"}') == 3
    assert sample(page, "carso_worker_restarts_total") == 1
    assert sample(page, 'carso_workers{state="dead"}') == 2


def test_a_page_of_workers_is_the_page_of_one_process(seats):
    """But for their number, and for what is the interpreter's own."""

    def families(metrics: Metrics) -> dict[str, tuple[str, str]]:
        metrics.request(endpoint="/classify", status=200, seconds=1)
        metrics.refusal("overloaded")
        found = text_string_to_metric_families(metrics.page().decode())
        return {f.name: (f.type, f.documentation) for f in found if f.samples}

    bundle = Bundle.load(shared_bundle(SMALL))
    alone = families(Metrics(bundle, NOTHING, device="cpu"))
    of_workers = families(metrics_of(seats[0]))
    apart = {name for name in alone.keys() ^ of_workers.keys() if not name.startswith("python_gc")}
    assert apart == {"carso_workers", "carso_worker_restarts"}
    assert {name: alone[name] for name in alone.keys() & of_workers.keys()}.items() <= of_workers.items()


def test_names_are_kept_apart_and_found_again_until_the_room_is_used_up():
    memory = Memory.create(128)
    series = Series(memory, start=64, size=64, lock=0)
    first, second = series.index(b"one"), series.index(b"a longer one")
    memory.doubles[first] += 2
    memory.doubles[second] += 3
    assert series.index(b"one") == first
    with pytest.raises(Full):
        series.index(b"three")
    again = Series(memory, start=64, size=64, lock=0)
    assert dict(again.numbers()) == {b"one": 2, b"a longer one": 3}
    assert bytes(memory.bytes[:64]) == bytes(64)


def test_a_count_that_finds_no_room_is_left_out_with_a_word_in_the_log(caplog):
    memory = Memory.create(512)
    series = Series(memory, start=0, size=512, lock=0)
    counter, _ = counted.kinds(memory, series)
    many = counter("requests", "Requests.", ["name"], registry=None)
    for name in range(20):
        many.labels(name).inc()
    assert "is not counted any more: 512 bytes of counts are in use" in caplog.text
    (family,) = counted.Counted([series]).collect()
    assert 0 < len(family.samples) < 20
    assert all(found.value == 1 for found in family.samples)


def test_the_processes_of_a_service_are_shown_together(board):
    """This process twice: its memory counts twice, and its open files once."""

    def shown() -> dict[str, float]:
        return {metric.name: metric.samples[0].value for metric in Processes(board).collect()}

    alone = shown()
    board.take(1, os.getpid())
    both = shown()
    assert both["process_virtual_memory_bytes"] > 1.5 * alone["process_virtual_memory_bytes"]
    assert both["process_start_time_seconds"] == alone["process_start_time_seconds"]
    assert both["process_max_fds"] == alone["process_max_fds"]
    board.clear(1, cpu=1000, replaced=True)
    assert shown()["process_cpu_seconds"] >= 1000
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    board.take(1, int(gone.stdout))  # it ended in this moment
    assert shown()["process_virtual_memory_bytes"] > 0


class Idle:
    """A pipeline that never has anything to do."""

    busy = False

    def admit(self, tickets):
        assert not list(tickets)


async def test_a_service_is_ready_while_one_of_its_workers_is(board, seats):
    engine, lifecycle = Engine(InThread(Idle())), Lifecycle()
    probes = Probes(engine, lifecycle, watchdog=30, whole=seats[0])
    with pytest.raises(NotReady, match="engine is not running"):
        probes.live()
    board.set_state(2, State.READY)
    probes.live()
    probes.ready()
    lifecycle.draining = True  # this worker alone
    probes.ready()
    board.set_state(2, State.DRAINING)
    with pytest.raises(NotReady, match="stopping"):
        probes.ready()
    lifecycle.draining = False
    board.set_state(2, State.READY)
    board.drain()
    with pytest.raises(NotReady, match="stopping"):
        probes.ready()
    probes.live()
    assert probes.state == State.FAILED
    engine.start()
    assert probes.state == State.READY
    await engine.stop()


def test_nothing_of_a_board_has_a_name_that_a_restart_could_find(board):
    assert os.fstat(board.memory.descriptor).st_nlink == 0
