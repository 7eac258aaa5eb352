"""The distributions, as an index would have them: what they hold, and that the wheel alone serves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import httpx
import pytest

from tests.server import environment
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[1]
ATTACKED = ROOT / "docs/samples/1-pgd-0.30.png"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow  # they build, and install from a package index


ALONE = environment() | {"PYTHONPATH": ""}  # nothing of the repository


def ended(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, env=ALONE, capture_output=True, text=True)


def run(*command: object, cwd: Path) -> str:
    done = ended(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def venv(folder: Path, *packages: object) -> Path:
    """Make a virtual environment with these packages, in their tested versions. Returns its folder of commands."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    run(folder / "bin/pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *packages, cwd=folder.parent)
    return folder / "bin"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the source distribution out of the repository, and the wheel out of that. Checked as PyPI does."""
    folder = tmp_path_factory.mktemp("distributions")
    tools = venv(folder / "tools", "build", "twine")
    run(tools / "python", "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    run(tools / "twine", "check", "--strict", source, wheel, cwd=folder)
    return source, wheel


def test_the_wheel_holds_both_packages_and_the_reference_bundle_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        assert json.loads(wheel.read("carso/models/mnist-conv/manifest.json"))["name"] == "mnist-conv"
    found = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT / half))
        for half in ("service", "training")
        for path in (ROOT / half).rglob("*")
        if path.is_file() and not re.search(r"/__pycache__/|/\.", f"/{path.relative_to(ROOT / half)}")
    }
    bundle = {f"carso/{path.relative_to(ROOT)}" for path in (ROOT / "models/mnist-conv").rglob("*") if path.is_file()}
    assert found == expected | bundle
    assert {"carso/py.typed", "carso_training/py.typed"} <= found


def test_the_source_distribution_holds_what_the_readme_speaks_of_and_nothing_that_was_made(distributions):
    with tarfile.open(distributions[0]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs/http.md", "tests/conftest.py"):
        assert name in names
    assert not [name for name in names if re.match(r"\.venv|runs|dist|.*__pycache__|\.git/", name)]


def test_the_description_has_absolute_links_only(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(wheel.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = re.sub(r"```.*?```|`[^`\n]*`", "", metadata.get_payload(), flags=re.DOTALL)
    assert [
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("https://", "http://", "#"))
    ] == []


def test_the_base_install_has_the_client_and_says_what_serving_needs(distributions, tmp_path):
    _, wheel = distributions
    commands = venv(tmp_path / "base", wheel)
    installed = {line.partition("==")[0].lower() for line in run(commands / "pip", "freeze", cwd=tmp_path).split()}
    assert not installed & {"numpy", "onnxruntime", "onnxruntime-gpu", "fastapi", "uvicorn", "pillow"}
    run(commands / "python", "-c", "from carso import AsyncClient, Client; Client().close()", cwd=tmp_path)
    assert PROJECT["version"] in run(commands / "carso", "--version", cwd=tmp_path)
    for command, extra in ((("carso", "serve"), "carso[cpu]"), (("carso-train", "presets"), "train]")):
        refused = ended(commands / command[0], command[1], cwd=tmp_path)
        assert refused.returncode == 1
        assert extra in refused.stderr
        assert "Traceback" not in refused.stderr


def test_the_wheel_alone_serves_its_bundle_from_any_folder(distributions, tmp_path):
    _, wheel = distributions
    commands = venv(tmp_path / "serving", f"{wheel}[cpu]")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    log = tmp_path / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [commands / "carso", "serve", "--port", "0"], cwd=elsewhere, env=ALONE, stderr=output
        ) as server,
    ):
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                assert server.poll() is None, log.read_text()
            url = found[0]
            httpx.get(f"{url}/readyz", timeout=PATIENCE).raise_for_status()
            answer = json.loads(run(commands / "carso", "classify", ATTACKED, "--json", "--url", url, cwd=elsewhere))
        finally:
            server.terminate()
    assert (answer["class_name"], answer["agree"]) == ("1", False)
    assert server.returncode == 0
    run(commands / "pip", "check", cwd=tmp_path)
