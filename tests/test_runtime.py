"""Which build of ONNX Runtime is installed, and what the service says where that is none or two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from carso.inference import runtime
from carso.inference.runtime import InstallationError, check_runtime

from tests.server import environment


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install distributions of these names, and no others of the builds of ONNX Runtime."""

    def install(*names: str) -> Path:
        monkeypatch.setattr(runtime, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        for name in names:
            folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        return tmp_path

    return install


@pytest.mark.parametrize("build", runtime.BUILDS)
def test_one_build_of_onnx_runtime_is_enough(installed, build):
    installed(build)
    check_runtime()


def test_without_a_build_the_message_names_both_extras(installed):
    installed("numpy")
    with pytest.raises(InstallationError, match=r"onnxruntime nor onnxruntime-gpu .*carso\[cpu\].*carso\[gpu\]"):
        check_runtime()


def test_a_build_of_another_name_is_welcome(installed, monkeypatch):
    installed()
    monkeypatch.setattr(runtime, "find_spec", lambda name: name == "onnxruntime" or None)
    check_runtime()


def test_two_builds_are_named_with_the_command_that_mends_it(installed):
    installed("onnxruntime", "onnxruntime-gpu")
    with pytest.raises(InstallationError, match="pip uninstall --yes onnxruntime onnxruntime-gpu && pip install"):
        check_runtime()


def test_two_builds_stop_the_start_with_exit_status_1(installed):
    beside = installed("onnxruntime", "onnxruntime-gpu")
    ended = subprocess.run(
        [sys.executable, "-m", "carso.command", "serve"],
        env=environment() | {"PYTHONPATH": str(beside)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("carso: onnxruntime and onnxruntime-gpu are both installed")
    assert len(ended.stderr.splitlines()) == 1
