"""The Open Inference Protocol as other projects' own libraries speak it. Each has an environment of its own, because it
pins versions that this project does not use. pip takes them from the package index."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.calls import PIXELS, VALUES, as_npy
from tests.environments import python_with
from tests.pictures import encoded, npy
from tests.server import ROOT, Server

pytestmark = pytest.mark.slow  # they install hundreds of megabytes

PACKAGES = {"kserve_sdk": "kserve==0.21.0", "mlserver_codecs": "mlserver==1.7.1"}


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
    expected |= dict.fromkeys(("certified_eps", "certified_margin"), [0.0] * len(native))  # no proof was asked for
    answers = json.loads(ended.stdout)
    assert answers
    for answer in answers:
        assert answer == expected
