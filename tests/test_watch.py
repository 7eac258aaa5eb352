"""`carso watch`, as a person runs it: folders, lists, bad files, Ctrl-C, and a service that goes away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG
from tests.server import ROOT, Server, environment, serving
from tests.waiting import PATIENCE, eventually


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "carso.command", "watch", *map(str, arguments)]


def watched(server: Server, *arguments: object, text: str = "") -> tuple[int, list[dict], str]:
    """What a watch that ends by itself has answered: exit status, lines and complaints."""
    asked = command(*arguments, "--url", server.url)
    ended = subprocess.run(asked, input=text, capture_output=True, text=True, env=environment(), timeout=PATIENCE)
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr


@contextmanager
def watching(url: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A watch that goes on; it is killed at the end if it still does."""
    process = subprocess.Popen(
        command(*arguments, "--url", url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_list_is_answered_to_its_end(server, tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(PNG)
    listed = tmp_path / "list"
    listed.write_text("".join(f"{tmp_path / name}\n" for name in "abc"))
    for source, text in ((listed, ""), ("-", listed.read_text())):
        status, lines, complaints = watched(server, source, "--rate", 1, text=text)
        assert (status, complaints) == (0, "")
        found = sorted((line["file"], line["path"]) for line in lines if line["path"] == "robust")
        assert found == [(str(tmp_path / name), "robust") for name in "abc"]
        assert len(lines) == 6


def test_a_bad_file_does_not_stop_the_rest(server, tmp_path):
    (tmp_path / "good").write_bytes(PNG)
    (tmp_path / "bad").write_bytes(b"no image")
    names = [tmp_path / name for name in ("missing", "bad", "good")]
    status, lines, _ = watched(server, "-", "--rate", 0, text="\n".join(map(str, names)))
    assert status == 1
    missing, bad, good = lines
    assert (missing["file"], missing["error"]) == (str(names[0]), "unreadable_file")
    assert (bad["file"], bad["error"]) == (str(names[1]), "undecodable_image")
    assert good["prediction"]["label"] >= 0


def test_a_folder_is_watched_until_it_is_interrupted(server, tmp_path):
    folder, output = tmp_path / "folder", tmp_path / "output"
    folder.mkdir()
    (folder / "there").write_bytes(PNG)
    (folder / ".hidden").write_bytes(PNG)
    with watching(server.url, folder, "--rate", 0, "--every", 0.05, "--output", output) as process:
        eventually(lambda: len(lines_of(output)) == 1)
        (folder / "new").write_bytes(PNG)
        eventually(lambda: len(lines_of(output)) == 2)
        (folder / "there").write_bytes(PNG + b"\n")  # changed
        eventually(lambda: len(lines_of(output)) == 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
    assert [Path(line["file"]).name for line in lines_of(output)] == ["there", "new", "there"]


def test_files_that_were_read_are_not_lost_with_the_connection(tmp_path):
    output = tmp_path / "output"
    names = [tmp_path / str(number) for number in range(4)]
    for name in names:
        name.write_bytes(PNG)
    bundle = shared_bundle(SMALL)
    with serving(bundle, tmp_path / "log") as server:
        port = server.url.rpartition(":")[2]
        with watching(server.url, "-", "--rate", 0, "--output", output) as process:
            process.stdin.write(f"{names[0]}\n")
            process.stdin.flush()
            eventually(lambda: len(lines_of(output)) == 1)
            server.process.kill()
            server.leaves()
            process.stdin.write("".join(f"{name}\n" for name in names[1:]))
            process.stdin.flush()
            assert "going on with" in process.stderr.readline()
            with serving(bundle, tmp_path / "other", port=port):
                eventually(lambda: len(lines_of(output)) == 4)
                process.stdin.close()
                assert process.wait(PATIENCE) == 0
    assert [line["file"] for line in lines_of(output)] == [str(name) for name in names]


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["/nowhere"], 2, "neither a folder nor a file that lists images"),
        (["-", "--rate", "0.5", "--max-rate", "0.1"], 1, "max_rate: 0.1 is not allowed"),
    ],
)
def test_what_cannot_be_watched_is_refused(server, arguments, status, told):
    asked = command(*arguments, "--url", server.url)
    text = f"{ROOT / 'README.md'}\n"
    ended = subprocess.run(asked, input=text, capture_output=True, text=True, env=environment(), timeout=PATIENCE)
    assert ended.returncode == status
    assert told in " ".join(ended.stderr.replace("│", " ").split())
