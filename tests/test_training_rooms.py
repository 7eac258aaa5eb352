"""The rooms of the training half: imports only go down, and a table grows by one file."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import carso_training
import pytest
from carso_training.registry import entries

PACKAGE = Path(carso_training.__file__).parent
FLOORS = (
    ("errors", "durable", "registry"),
    ("datasets", "networks"),
    ("attacks",),
    ("recipe",),
    ("fitting",),
    ("export",),
    ("robustness",),
    ("run",),
    ("command",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The folder or file that `carso_training.x.y` belongs to; empty for the package itself."""
    return module.removeprefix("carso_training").lstrip(".").partition(".")[0]


def imports_of(path: Path) -> set[str]:
    """The modules of carso_training that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "carso_training"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_room_and_from_rooms_below(path: Path) -> None:
    room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if room == "__init__":
        assert not imports_of(path)
        return
    above = {module for module in imports_of(path) if room_of(module) != room and FLOOR[room_of(module)] >= FLOOR[room]}
    assert not above


@dataclass(frozen=True)
class Entry:
    """What the table below holds."""

    name: str


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one entry in its table."""
    folder = tmp_path / f"room_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text("from tests.test_training_rooms import Entry\n\nFIRST = Entry('first')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def table(room: Path) -> dict[str, Entry]:
    return entries(room.name, [str(room)], Entry)


def test_one_more_file_is_one_more_entry(room: Path) -> None:
    (room / "second.py").write_text(
        f"from {room.name}.first import FIRST\nfrom tests.test_training_rooms import Entry\n\nSECOND = Entry('2nd')\n"
    )
    assert table(room) == {"first": Entry("first"), "2nd": Entry("2nd")}


def test_two_entries_of_one_name_are_refused(room: Path) -> None:
    (room / "second.py").write_text("from tests.test_training_rooms import Entry\n\nOTHER = Entry('first')\n")
    with pytest.raises(ValueError, match="two entries named 'first'"):
        table(room)
