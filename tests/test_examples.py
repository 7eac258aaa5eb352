"""The examples, run as a reader of them runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.calls import PNG
from tests.environments import python_with
from tests.server import ROOT, Server, environment
from tests.waiting import PATIENCE

WEBCAM = ROOT / "examples" / "webcam.py"


def webcam(
    *arguments: object, python: Path | str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(WEBCAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment() | variables, timeout=PATIENCE)


def test_the_webcam_client_takes_a_folder_of_images(server: Server, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.txt").write_text("no image")
    (tmp_path / "c.png").write_bytes(PNG)
    ended = webcam(tmp_path, "--rate", 1, "--url", server.url)
    assert ended.returncode == 0
    by_vote = [line for line in ended.stdout.splitlines() if "by vote" in line]
    assert [sorted(line[:5] for line in lines) for lines in (ended.stdout.splitlines(), by_vote)] == [
        ["a.png", "a.png", "c.png", "c.png"],
        ["a.png", "c.png"],
    ]
    assert re.fullmatch(r"b\.txt: these 8 bytes are not an image in a supported format: .*\n", ended.stderr)


def test_the_webcam_client_says_what_it_lacks(server: Server, tmp_path: Path):
    (tmp_path / "cv2.py").write_text("raise ImportError")  # as if it were not installed
    ended = webcam("0", "--url", server.url, PYTHONPATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "pip install 'carso[video]'" in ended.stderr
    nobody = webcam(tmp_path, "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 1
    assert "Traceback" not in nobody.stderr


@pytest.mark.slow  # it installs OpenCV
def test_the_webcam_client_takes_a_video(server: Server, tmp_path: Path):
    python = python_with("opencv-python-headless==4.13.0.92", "-e", f"{ROOT}[video]")
    made = (
        "import cv2, numpy, sys\n"
        "video = cv2.VideoWriter(sys.argv[1], cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))\n"
        "[video.write(numpy.full((48, 64, 3), 10 * i, 'uint8') + numpy.eye(48, 64, dtype='uint8')[..., None] * 99)"
        " for i in range(5)]\n"
        "video.release()\n"
    )
    video = tmp_path / "clip.avi"
    subprocess.run([python, "-c", made, video], check=True)
    ended = webcam(video, "--rate", 0, "--margin", 0, "--url", server.url, python=python)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.partition(":")[0] for line in ended.stdout.splitlines()] == ["0", "1", "2", "3", "4"]
    wrong = webcam(WEBCAM, "--url", server.url, python=python)
    assert wrong.returncode == 1
    assert "is neither a folder, nor a video that OpenCV reads" in wrong.stderr
