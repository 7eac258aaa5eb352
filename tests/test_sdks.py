"""The Open Inference Protocol as other projects' own libraries speak it. Each has an environment of its own, because it
pins versions that this project does not use. pip takes them from the package index."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from tests.calls import PIXELS, VALUES, as_npy
from tests.pictures import encoded, npy
from tests.server import ROOT, Server

pytestmark = pytest.mark.slow  # they install hundreds of megabytes

CACHE = ROOT / ".pytest_cache" / "sdks"
PACKAGES = {"kserve_sdk": "kserve==0.21.0", "mlserver_codecs": "mlserver==1.7.1"}


def python_with(package: str) -> Path:
    """The interpreter of an environment that holds one package, which is kept for later runs."""
    folder = CACHE / f"{package}-{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = folder / "bin" / "python"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-compile", package], check=True)
            (folder / "complete").touch()
    return interpreter


@pytest.mark.parametrize("program", PACKAGES)
def test_another_projects_library_gets_the_native_answer(
    program: str, server: Server, client: httpx.Client, tmp_path: Path
):
    (tmp_path / "images.npy").write_bytes(npy(VALUES))
    for index, image in enumerate(PIXELS):
        (tmp_path / f"{index}.png").write_bytes(encoded(image))
    command = [python_with(PACKAGES[program]), ROOT / "tests" / "clients" / f"{program}.py"]
    ended = subprocess.run([*command, server.url, "random", tmp_path], capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    native = as_npy("/classify", client, VALUES, seed=7).json()["predictions"]
    expected = {name: [prediction[name] for prediction in native] for name in native[0]}
    answers = json.loads(ended.stdout)
    assert answers
    for answer in answers:
        assert answer == expected
