"""The command `carso`, against the real service."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from carso import Client
from carso.client.load import Measured, Traffic, random_npy
from carso.command import command_line
from carso.version import __version__
from typer.testing import CliRunner, Result

from tests.calls import COLOUR_PNG, PIXELS, PNG, sample
from tests.pictures import encoded
from tests.scripted import LABEL_ONLY, Reply, refusal, scripted
from tests.server import environment, silent_port, url_of


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    return path


@pytest.fixture
def disputed(server, tmp_path):
    """Find an image on which the two paths disagree."""
    random = np.random.default_rng(0)
    with Client(server.url) as client:
        for _ in range(100):
            png = encoded(random.integers(0, 256, (8, 8), np.uint8))
            (prediction,) = client.classify(png, seed=1).predictions
            if not prediction.agree:
                path = tmp_path / "disputed.png"
                path.write_bytes(png)
                return path
    raise AssertionError("the two paths agree on all of these images")


def carso(*args: object, url: str | None) -> Result:
    return CliRunner().invoke(command_line(), list(map(str, args)), env={"CARSO_URL": url, "CARSO_API_KEY": None})


def lines_of(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.stderr
    return [line.split("  ") for line in result.stdout.splitlines()]


def test_a_table_has_a_line_for_each_image(server, image, disputed):
    with Client(server.url) as client:
        expected = [client.classify(path, seed=1).predictions[0] for path in (image, disputed)]
    result = carso("classify", image, disputed, "--seed", 1, url=server.url)
    heads, *rows = lines_of(result)
    assert [head.strip() for head in heads if head] == ["file", "class", "share", "votes", "fast label", "agree"]
    for row, path, prediction in zip(rows, (image, disputed), expected, strict=True):
        assert [cell.strip() for cell in row if cell] == [
            str(path),
            prediction.class_name,
            f"{prediction.share:.4f}",
            str(prediction.votes),
            str(prediction.fast_label),
            "yes" if prediction.agree else "NO",
        ]


def test_paths_that_disagree_are_warned_of(server, disputed):
    warning = carso("classify", disputed, "--seed", 1, url=server.url).stderr
    assert "warning" in warning and disputed.name in warning


def test_json_is_a_line_for_each_image(server, image, tmp_path):
    batch = tmp_path / "batch.npy"
    np.save(batch, PIXELS)
    options = ("--json", "--samples", 301, "--risk", 0, "--seed", 7)
    result = carso("classify", image, batch, *options, url=server.url)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(image), *(f"{batch}[{index}]" for index in range(3))]
    assert lines[0]["tally"] == lines[1]["tally"]  # the same image
    for line in lines:
        assert (line["samples"], line["risk"], line["seed"]) == (301, 0, 7)
        assert sum(line["tally"]) == line["votes"]
        assert len(line["request_id"]) == 32


def test_the_fast_path_shows_a_probability(server, image):
    with Client(server.url) as client:
        (prediction,) = client.classify_fast(image).predictions
    _, row = lines_of(carso("classify", "--fast", image, url=server.url))
    assert [cell.strip() for cell in row if cell] == [
        str(image),
        prediction.class_name,
        f"{prediction.probabilities[prediction.label]:.4f}",
    ]
    (line,) = carso("classify", "--fast", "--json", image, url=server.url).stdout.splitlines()
    assert json.loads(line)["probabilities"] == list(prediction.probabilities)


def test_a_file_that_is_refused_does_not_stop_the_others(server, image, tmp_path):
    colour = tmp_path / "colour.png"
    colour.write_bytes(COLOUR_PNG)
    result = carso("classify", colour, image, "--json", url=server.url)
    assert result.exit_code == 1
    assert f"{colour}: wrong_shape" in result.stderr
    assert json.loads(result.stdout)["file"] == str(image)
    assert carso("classify", colour, "--resize", url=server.url).exit_code == 0


def test_a_file_that_cannot_be_read_does_not_stop_the_others(server, image, tmp_path):
    result = carso("classify", tmp_path / "none.png", tmp_path, image, "--json", url=server.url)
    assert result.exit_code == 1
    assert f"{tmp_path / 'none.png'}: No such file" in result.stderr
    assert f"{tmp_path}: Is a directory" in result.stderr
    assert json.loads(result.stdout)["file"] == str(image)


def test_standard_input_is_a_file_too(server, image):
    command = [sys.executable, "-m", "carso.command", "classify", "--json", "--seed", "1", "-"]
    ended = subprocess.run(command, env=environment(url=server.url), input=PNG, capture_output=True, check=True)
    line = json.loads(ended.stdout)
    by_name = json.loads(carso("classify", "--json", "--seed", 1, image, url=server.url).stdout)
    assert line["file"] == "-"
    assert line["tally"] == by_name["tally"]


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        (refusal(422, "wrong_shape"), 2),
        (refusal(504, "deadline_exceeded"), 2),
        (refusal(401, "unauthorized"), 1),
        (refusal(403, "seed_refused"), 1),
        (Reply(404, "<html>"), 1),
        (refusal(500, "engine_failed"), 1),
    ],
)
def test_the_other_files_are_sent_unless_they_would_fail_too(image, first, asked):
    with scripted(first, LABEL_ONLY) as server:
        result = carso("classify", "--json", image, image, url=server.url)
    assert result.exit_code == 1
    assert len(server.received) == asked


def test_a_service_that_fails_is_asked_once_and_what_it_said_is_shown(image):
    with scripted(LABEL_ONLY, refusal(500, "engine_failed", "the engine failed")) as server:
        result = carso("classify", image, image, image, url=server.url)
        assert len(server.received) == 2
    assert result.exit_code == 1
    assert "engine_failed: the engine failed" in result.stderr
    assert "three" in result.stdout


@pytest.mark.parametrize("args", [("info",), ("bench", "--seconds", 1), ("classify", __file__)])
def test_no_service_is_one_line_and_exit_status_1(args):
    with silent_port() as port:
        url = url_of(port)
        result = carso(*args, url=url)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("carso: ") and url in line


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("classify",),
        ("classify", __file__, "--fast", "--samples", "3"),
        ("classify", __file__, "--fast", "--seed", "3"),
        ("classify", __file__, "--samples", "0"),
        ("classify", __file__, "--risk", "0.6"),
        ("classify", __file__, "--url", "localhost:8000"),
        ("classify", __file__, "--api-key", "secret"),  # argv is for all to see
        ("bench",),
        ("bench", "http://127.0.0.1:1", "--fast", "--risk", "0"),
        ("bench", "http://127.0.0.1:1", "--connections", "0"),
        ("bench", "http://127.0.0.1:1", "--fast", "--both"),
        ("bench", "http://127.0.0.1:1", "--fast", "--attacked", __file__),
        ("bench", "http://127.0.0.1:1", "--image", "no-such-file-*.png"),
        ("no-such-command",),
        ("--no-such-option",),
    ],
)
def test_wrong_usage_is_exit_status_2(args):
    assert carso(*args, url=None).exit_code == 2


def test_evidence_that_is_withheld_is_a_dash(image):
    with scripted(LABEL_ONLY) as server:
        _, row = lines_of(carso("classify", image, url=server.url))
        assert [cell.strip() for cell in row if cell] == [str(image), "three", "-", "-", "-", "-"]
        line = json.loads(carso("classify", image, "--json", url=server.url).stdout)
    assert set(line) == {"file", "label", "class_name", "complete", "request_id"}


def test_a_count_that_the_deadline_ended_is_warned_of(image):
    late = {"label": 1, "class_name": "1", "complete": False, "votes": 40, "samples": 1500}
    with scripted(Reply(200, LABEL_ONLY.content | {"predictions": [late]})) as server:
        result = carso("classify", image, "--deadline", 9, url=server.url)
        assert 0 < int(server.received[0].query["deadline_ms"]) <= 9000
    assert "40 of 1500 votes" in result.stderr


def test_the_key_is_taken_from_the_environment(image):
    with scripted(LABEL_ONLY) as server:
        environment = {"CARSO_URL": server.url, "CARSO_API_KEY": "secret-of-mine"}
        assert CliRunner().invoke(command_line(), ["classify", str(image)], env=environment).exit_code == 0
        assert server.received[0].headers["authorization"] == "Bearer secret-of-mine"
    result = CliRunner().invoke(command_line(), ["info"], env={"CARSO_API_KEY": "not for\na header"})
    assert result.exit_code == 1
    assert "API key" in result.stderr and "not for" not in result.stderr


def test_info_shows_what_is_served(server, client):
    shown = dict(line.split("  ", 1) for line in carso("info", url=server.url).stdout.splitlines())
    assert shown["bundle"].strip().startswith("random 0.0.1")
    assert "[1, 8, 8]" in shown["input"]
    assert json.loads(carso("info", "--json", url=server.url).stdout) == client.get("/info").json()


@pytest.mark.parametrize("options", [(), ("--fast",), ("--samples", 20, "--risk", 0.1), ("--batch", 3)])
def test_bench_measures_what_the_service_answers(server, options):
    args = ("bench", server.url, "--connections", 2, "--seconds", 0.5, *options)
    result = carso(*args, "--json", url="http://127.0.0.1:1")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert set(measured["statuses"]) == {"200"}
    assert 0 <= measured["requests_per_s"] <= 2 * measured["statuses"]["200"]
    assert measured["images_per_s"] == pytest.approx(measured["requests_per_s"] * (3 if "--batch" in options else 1))
    latencies = list(measured["latency_ms"].values())
    assert list(measured["latency_ms"]) == ["p50", "p90", "p95", "p99", "max"]
    assert latencies[0] > 0
    assert latencies == sorted(latencies)
    if "--fast" in options:
        assert "votes_per_image" not in measured
    else:
        assert 1 <= measured["votes_per_image"] <= (20 if "--samples" in options else 1500)


def test_bench_may_send_an_image_of_ones_own(client, image):
    with scripted(Reply(200, client.get("/info").json()), LABEL_ONLY) as server:
        result = carso("bench", server.url, "--image", image, "--connections", 1, "--seconds", 0.2, url=server.url)
    assert result.exit_code == 0, result.stderr
    assert {request.body for request in server.received[1:]} == {PNG}


def test_bench_counts_refusals_and_sends_nothing_twice(client):
    full = refusal(429, "overloaded", "full", retry_after=0)
    with scripted(Reply(200, client.get("/info").json()), LABEL_ONLY, full) as server:
        result = carso("bench", server.url, "--connections", 2, "--seconds", 0.3, "--json", url=server.url)
        ids = [request.headers["x-request-id"] for request in server.received]
    statuses = json.loads(result.stdout)["statuses"]
    assert statuses == {"200": 1, "429": len(ids) - 2}
    assert len(set(ids)) == len(ids)
    assert "full" in result.stderr


@pytest.fixture
def digits(tmp_path):
    """Make a folder of usual images, and one that is attacked."""
    random = np.random.default_rng(0)
    for name in ("0-clean", "1-clean", "2-clean", "0-attacked"):
        (tmp_path / f"{name}.png").write_bytes(encoded(random.integers(0, 256, (8, 8), np.uint8)))
    return tmp_path


def test_bench_sends_files_of_folders_and_patterns_to_both_paths(client, digits):
    with scripted(Reply(200, client.get("/info").json()), LABEL_ONLY) as server:
        options = ("--image", digits / "*-clean.png", "--image", digits / "0-attacked.png", "--both", "--seconds", 0.5)
        result = carso("bench", server.url, *options, "--connections", 1, url=None)
        received = server.received[1:]
    assert result.exit_code == 0, result.stderr
    clean = [(digits / f"{index}-clean.png").read_bytes() for index in range(3)]
    expected = [*clean, (digits / "0-attacked.png").read_bytes()]
    for number, request in enumerate(received):
        assert request.body == expected[number % 4]
        assert request.path == ("/classify/fast" if number % 2 else "/classify")


@pytest.mark.parametrize(("phase", "attacked"), [(0.1, True), (0.5, False), (0.9, False)])
def test_a_third_of_the_robust_requests_are_attacked_in_the_first_third_of_each_period(phase, attacked):
    traffic = Traffic(usual=[b"usual"], attacked=[b"attacked"], period=60)
    now = 60 * (1000 + phase)
    sent = Counter(traffic.images(number, robust=True, now=now) for number in range(3000))
    assert (800 < sent[b"attacked"] < 1200) == attacked
    assert attacked or not sent[b"attacked"]
    assert {traffic.images(number, robust=False, now=now) for number in range(100)} == {b"usual"}


def test_an_endless_bench_shows_its_figures_when_it_is_interrupted(server):
    command = [
        sys.executable,
        "-m",
        "carso.command",
        "bench",
        server.url,
        "--seconds",
        "0",
        "--pause",
        "0.01",
        "--json",
    ]
    with server.client() as client, subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as running:
        series = 'carso_requests_total{endpoint="/classify",status="200"}'
        before = sample(client.get("/metrics").text, series)
        while sample(client.get("/metrics").text, series) < before + 100:
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        measured = json.loads(running.stdout.read())
    assert running.returncode == 0
    assert measured["statuses"]["200"] >= 50
    assert measured["requests_per_s"] > 0


def test_random_images_are_what_numpy_would_write():
    written = random_npy((3, 1, 8, 8), seed=1)
    array = np.load(io.BytesIO(written))
    assert (array.shape, array.dtype) == ((3, 1, 8, 8), np.uint8)
    assert len(np.unique(array)) > 50
    assert written != random_npy((3, 1, 8, 8), seed=2)


def test_percentiles_are_those_of_numpy():
    measured = Measured(seconds=1.0)
    measured.latencies.extend(np.random.default_rng(0).random(101).tolist())
    measured.statuses["200"] = 101
    told = measured.summary()["latency_ms"]
    for percent in (50, 90, 95, 99):
        assert told[f"p{percent}"] == pytest.approx(1e3 * np.percentile(measured.latencies, percent), abs=1e-3)


def test_the_version_is_shown():
    assert carso("--version", url=None).stdout == f"carso {__version__}\n"


def test_help_names_every_part_and_shell_completion():
    shown = carso("--help", url=None).stdout
    for part in ("serve", "classify", "info", "bench", "--install-completion", "--version"):
        assert part in shown


@pytest.mark.parametrize("args", ["--help", "--version", "classify --help", "classify FILE --url http://127.0.0.1:1"])
def test_what_a_part_of_the_command_does_not_need_is_not_imported(image, args):
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr))\n"
        "from carso.command import main\n"
        "main()\n"
    )
    given = [str(image) if arg == "FILE" else arg for arg in args.split()]
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, env=environment())
    imported = set(done.stderr.splitlines()[-1].split())
    assert "typer" in imported
    assert not imported & {"numpy", "onnxruntime", "fastapi", "starlette", "uvicorn", "PIL", "torch"}
    assert ("httpx" in imported) == (len(given) > 2)


def test_completion_knows_the_parts_and_the_options_of_serve():
    def complete(words: str) -> str:
        variables = {"_CARSO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "carso.command"]
        return subprocess.run(command, capture_output=True, text=True, env=environment() | variables).stdout

    assert complete("carso se").split() == ["serve"]
    assert "--drain-delay-s" in complete("carso serve --d").split()
    assert complete("carso serve --device c").split() == ["cuda", "cpu"]


def test_the_module_runs_as_the_command_does(server, image):
    command = [sys.executable, "-m", "carso.command", "classify", image, "--url", server.url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert json.loads(done.stdout)["file"] == str(image)
    assert done.stderr == "" or "warning" in done.stderr


def test_a_terminal_gets_the_same_table(server, image):
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "carso.command", "classify", image, "--url", server.url]
    wide = environment() | {"COLUMNS": "300", "TERM": "xterm"}
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, env=wide)
    os.close(terminal)
    shown = b""
    with suppress(OSError), os.fdopen(main, "rb", buffering=0) as screen:  # it ends with an error, as terminals do
        while part := screen.read(4096):
            shown += part
    assert done.returncode == 0
    assert b"\x1b[1m" in shown  # bold heads
    assert str(image).encode() in shown and b"votes" in shown
