"""A client that a generator made of our OpenAPI document can use the service: the operations have names that a language
can bear, and the types say what is sent and answered."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.calls import PIXELS, VALUES, as_npy
from tests.environments import python_with
from tests.pictures import encoded
from tests.server import ROOT, Server

pytestmark = pytest.mark.slow  # it installs the generator


def test_a_generated_client_gets_the_native_answers(server: Server, client: httpx.Client, tmp_path: Path):
    python = python_with("openapi-python-client==0.29.1")
    (tmp_path / "openapi.json").write_bytes(client.get("/openapi.json").content)
    command = [python.parent / "openapi-python-client", "generate", "--meta", "none"]
    command += ["--path", tmp_path / "openapi.json", "--output-path", tmp_path / "generated"]
    subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "images.json").write_text(json.dumps(VALUES.tolist()))
    for index, image in enumerate(PIXELS):
        (tmp_path / f"{index}.png").write_bytes(encoded(image))
    ended = subprocess.run(
        [python, ROOT / "tests" / "clients" / "generated.py", server.url, tmp_path / "generated", tmp_path],
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    understood = json.loads(ended.stdout)
    for path, answers in (("/classify", understood["robust"]), ("/classify/fast", understood["fast"])):
        options = {"seed": 7} if path == "/classify" else {}
        native = as_npy(path, client, VALUES, **options).json()["predictions"]
        for answer in answers:
            assert answer["predictions"] == native
    status, error = understood["refused"]
    assert (status, error["error"]) == (422, "wrong_shape")
    assert "[8, 8]" in error["message"]
    assert understood["info"] == client.get("/info").json()
