"""The rooms of the service: their arrows only go down, and only those that infer load ONNX Runtime."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import carso
import pytest

PACKAGE = Path(carso.__file__).parent
# From the bottom up. Files of one place may import each other, as long as they form no circle.
ROOMS = (
    ("choices", "complaints", "errors", "version", "samples", "bundle", "signing", "options", "settings", "board"),
    ("client", "images"),
    ("inference",),
    ("telemetry",),
    ("http",),
    ("api",),
    ("grpc",),
    ("app", "browser", "bundle_commands", "verification", "workers"),
    ("command",),
)
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}
FLOORS = 8


def modules() -> dict[str, Path]:
    """Every module below the package, by its name there; the package's own __init__, the public names, apart."""
    found = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    del found["__init__"]
    return {name.removesuffix(".__init__"): file for name, file in found.items()}


MODULES = modules()


def imports(module: str) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "carso":
                whole, parent = ".".join(parts[1:]), ".".join(parts[1:-1])
                found |= {whole if whole in MODULES else parent} & MODULES.keys()
    return found - {module}


def floors() -> dict[str, int]:
    """The length of the longest chain of imports below each module. Fails for a circle."""
    heights: dict[str, int] = {}

    def height(module: str, above: tuple[str, ...]) -> int:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in heights:
            heights[module] = 1 + max((height(other, (*above, module)) for other in imports(module)), default=0)
        return heights[module]

    for module in MODULES:
        height(module, ())
    return heights


def test_every_module_has_a_room():
    assert {module.partition(".")[0] for module in MODULES} == HEIGHT.keys()


@pytest.mark.parametrize("module", MODULES)
def test_arrows_only_go_down(module):
    room = module.partition(".")[0]
    for other in imports(module):
        below = other.partition(".")[0]
        assert HEIGHT[below] < HEIGHT[room] or below == room or HEIGHT[room] == 0, f"{module} imports {other}"


def test_there_are_few_floors_and_no_circle():
    assert max(floors().values()) <= FLOORS


@pytest.mark.parametrize(
    "room", ["errors", "settings", "options", "bundle", "client", "images.bodies", "images.reader"]
)
def test_the_lower_rooms_load_no_runtime(room):
    program = f"import carso.{room}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnxruntime", "torch"} & set(loaded)


def test_the_service_needs_no_training_half():
    program = "import carso.app, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\b(?:torch|carso_training|lightning_fabric|onnx)\b", loaded)
