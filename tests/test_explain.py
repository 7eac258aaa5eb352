"""explain=true: what an answer shows of its votes, and the pictures that the command draws of it."""

from __future__ import annotations

import base64
import io
import os
import pty
import subprocess
import sys

import httpx
import numpy as np
import pytest
from carso import Client, RequestRefused
from carso.api.answers import RobustAnswer
from carso.bundle import Bundle
from carso.client.terminals import shown
from carso.command import command_line
from carso.inference import explanation
from carso.inference.latents import Stream
from carso.inference.sessions import Sessions
from carso.options import MAX_EXPLAINED
from PIL import Image
from typer.testing import CliRunner, Result

from tests.bundles import COLOUR, SMALL, shared_bundle
from tests.calls import COLOUR_PNG, PIXELS, PNG, VALUES, as_npy, as_png, refused
from tests.server import environment, serving
from tests.test_verification import verify

LEVEL = 1 / 255  # of a picture


def pixels(picture: str | bytes) -> np.ndarray:
    """[*shape] in the range of SMALL, of a picture in an answer."""
    data = picture if isinstance(picture, bytes) else base64.b64decode(picture, validate=True)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        values = np.asarray(image, np.float32) / 255
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def test_an_explanation_shows_what_the_votes_were_cast_on(client):
    answer = as_npy("/classify", client, VALUES, seed=7, explain=True)
    RobustAnswer.model_validate_json(answer.content)
    fast = as_npy("/classify/fast", client, VALUES).json()["predictions"]
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1)
    codes = sessions.first_pass(VALUES).codes
    for image, code, found, first in zip(VALUES, codes, answer.json()["predictions"], fast, strict=True):
        told = found["explanation"]
        averaged = min(found["votes"], explanation.AVERAGED)
        latents = np.empty((averaged, SMALL.purifier.latent), np.float32)
        Stream(7).draw(out=latents)
        rows = np.zeros(averaged, np.int64)
        purified = sessions.purify(code[None], rows, latents)
        votes = sessions.vote(code[None], rows, latents).tolist()
        typical = sessions.purify(code[None], rows[:1], np.zeros_like(latents[:1]))[0]

        assert told["averaged"] == averaged
        assert [vote["label"] for vote in told["votes"]] == votes[: explanation.SHOWN]
        assert [vote["class_name"] for vote in told["votes"]] == list(map(str, votes[: explanation.SHOWN]))
        for vote, expected in zip(told["votes"], purified, strict=False):
            np.testing.assert_allclose(pixels(vote["image"]), expected, atol=LEVEL)
        np.testing.assert_allclose(pixels(told["mean"]), purified.mean(axis=0), atol=LEVEL)
        np.testing.assert_allclose(pixels(told["purified"]), typical, atol=LEVEL)
        np.testing.assert_allclose(pixels(told["input"]), image, atol=LEVEL)
        assert told["distance"] == pytest.approx(float(np.abs(image - typical).mean()), abs=2e-6)
        assert told["distance"] >= found["excess"]
        assert told["first_pass"] == {key: first[key] for key in ("label", "class_name", "probabilities")}
        assert told["first_pass"]["label"] == found["fast_label"]


def test_explaining_changes_nothing_of_the_count_and_the_answer_can_be_verified(client, tmp_path):
    plain, explained = (as_png("/classify", client, seed=3, explain=wanted).json() for wanted in (False, True))
    assert "explanation" not in plain["predictions"][0]
    assert explained["predictions"][0].pop("explanation")
    assert explained["predictions"] == plain["predictions"]
    assert explained["images"] == plain["images"]
    assert (plain["options"]["explain"], explained["options"]["explain"]) == (False, True)
    image = tmp_path / "image.png"
    image.write_bytes(PNG)
    assert verify(explained, image).exit_code == 0


def test_a_count_of_one_vote_is_explained_by_it(client):
    (prediction,) = as_png("/classify", client, samples=1, explain=True).json()["predictions"]
    told = prediction["explanation"]
    assert told["averaged"] == len(told["votes"]) == 1
    assert told["votes"][0]["image"] == told["mean"]


def test_a_large_image_that_is_resized_is_shown_as_it_was_read(client):
    large = Image.fromarray(PIXELS[0]).resize((80, 40))
    file = io.BytesIO()
    large.save(file, "PNG")
    headers = {"content-type": "image/png"}
    answer = client.post("/classify?resize=true&explain=true", content=file.getvalue(), headers=headers).json()
    assert pixels(answer["predictions"][0]["explanation"]["input"]).shape == SMALL.classifier.input_shape


def test_colour_images_are_explained_in_colour(strict_client):
    answer = strict_client.post("/classify?explain=true", content=COLOUR_PNG, headers={"content-type": "image/png"})
    told = answer.json()["predictions"][0]["explanation"]
    for picture in (told["input"], told["mean"], told["purified"], told["votes"][0]["image"]):
        assert pixels(picture).shape == COLOUR.classifier.input_shape


def test_more_images_than_are_explained_are_refused_before_any_work(client):
    images = np.repeat(VALUES, 3, axis=0)
    assert len(images) == MAX_EXPLAINED + 1
    message = refused(as_npy("/classify", client, images, explain=True), 413, "too_many_images")
    assert "at most 8 images" in message
    assert as_npy("/classify", client, images[:MAX_EXPLAINED], explain=True).status_code == 200


def test_the_fast_path_and_the_other_protocol_do_not_explain(client):
    refused(as_png("/classify/fast", client, explain=True), 422, "unknown_parameter")
    tensor = {"name": "images", "datatype": "FP32", "shape": list(VALUES.shape), "data": VALUES.ravel().tolist()}
    answer = client.post("/v2/models/random/infer", json={"inputs": [tensor], "parameters": {"explain": True}})
    assert answer.status_code == 200  # it ignores what it does not know
    assert "explanation" not in {output["name"] for output in answer.json()["outputs"]}


def test_where_evidence_is_withheld_nothing_is_explained(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", evidence="label") as server, server.client() as client:
        message = refused(as_png("/classify", client, explain=True), 403, "evidence_withheld")
        assert "leave explain out" in message
        assert as_png("/classify", client, explain=False).status_code == 200
        with Client(server.url) as ours, pytest.raises(RequestRefused, match="evidence_withheld"):
            ours.classify(PNG, explain=True)


def test_a_key_is_charged_for_the_rows_of_an_explanation(tmp_path):
    (tmp_path / "keys").write_text("gateway: a-key-for-the-tests\n")
    with serving(shared_bundle(SMALL), tmp_path / "log", api_keys_file=tmp_path / "keys") as server:
        headers = {"authorization": "Bearer a-key-for-the-tests", "content-type": "image/png"}
        answer = httpx.post(f"{server.url}/classify?explain=true", content=PNG, headers=headers, timeout=60).json()
        votes = answer["predictions"][0]["votes"]
        assert f'carso_caller_rows_total{{caller="gateway"}} {1.0 + votes + explanation.ROWS}' in server.metrics()


def test_the_python_client_gives_the_pictures_as_bytes(server):
    with Client(server.url) as client:
        (prediction,) = client.classify(PNG, explain=True, seed=1).predictions
        (plain,) = client.classify(PNG, seed=1).predictions
    assert plain.explanation is None
    np.testing.assert_allclose(pixels(prediction.explanation.input)[0], PIXELS[0] / 255, atol=LEVEL)
    assert prediction.explanation.votes[0].image.startswith(b"\x89PNG")
    assert base64.b64encode(prediction.explanation.mean).decode() in prediction.model_dump_json()


def carso(*args: object, url: str) -> Result:
    return CliRunner().invoke(command_line(), list(map(str, args)), env={"CARSO_URL": url, "CARSO_API_KEY": None})


def unwrapped(message: str) -> str:
    """A message of Typer's without its box."""
    return " ".join(message.replace("│", " ").split())


@pytest.mark.parametrize("kind", ["server", "strict_server"])
def test_the_command_draws_a_picture_for_each_image(request, tmp_path, kind):
    server = request.getfixturevalue(kind)
    image = tmp_path / "digit.png"
    image.write_bytes(PNG if kind == "server" else COLOUR_PNG)
    folder = tmp_path / "new" / "folder"
    result = carso("classify", image, image, "--explain", folder, url=server.url)
    assert result.exit_code == 0, result.stderr
    drawn = sorted(folder.iterdir())
    assert [path.name for path in drawn] == ["0001-digit.png", "0002-digit.png"]
    with Image.open(drawn[0]) as picture:
        assert picture.width > 3 * picture.height  # tiles side by side
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    assert "\x1b" not in result.stdout  # not a terminal


def test_a_batch_in_one_file_gets_a_picture_each(server, tmp_path):
    batch = tmp_path / "batch.npy"
    np.save(batch, PIXELS)
    assert carso("classify", batch, "--json", "--explain", tmp_path / "out", url=server.url).exit_code == 0
    assert len(list((tmp_path / "out").iterdir())) == len(PIXELS)


def test_explain_is_refused_where_it_cannot_be(server, tmp_path, monkeypatch):
    image = tmp_path / "image.png"
    image.write_bytes(PNG)
    result = carso("classify", image, "--fast", "--explain", tmp_path, url=server.url)
    assert result.exit_code == 2
    assert "robust path" in unwrapped(result.stderr)
    result = carso("classify", image, "--explain", image, url=server.url)
    assert result.exit_code == 2
    assert "cannot be a folder" in unwrapped(result.stderr)
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = carso("classify", image, "--explain", tmp_path, url=server.url)
    assert result.exit_code == 2
    assert "pip install pillow" in unwrapped(result.stderr)


def in_a_terminal(*args: object, **variables: str) -> str:
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "carso.command", *map(str, args)]
    clean = {name: value for name, value in environment().items() if name not in ("TMUX", "TERM", "TERM_PROGRAM")}
    process = subprocess.Popen(command, stdout=theirs, env=clean | variables, stdin=subprocess.DEVNULL)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the end of a terminal
        pass
    assert process.wait() == 0
    os.close(ours)
    return written.decode()


def test_a_terminal_that_can_shows_the_picture(server, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(PNG)
    command = ("classify", image, "--explain", tmp_path / "out", "--url", server.url)
    kitty = in_a_terminal(*command, TERM="xterm-kitty")
    sent = "".join(part.partition(";")[2].partition("\x1b")[0] for part in kitty.split("\x1b_G")[1:])
    assert base64.b64decode(sent) == (tmp_path / "out" / "0001-image.png").read_bytes()
    assert "\x1b_G" not in in_a_terminal(*command, TERM="xterm")


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-kitty"}, "\x1b_Ga=T,f=100,m=1;"),
        ({"TERM_PROGRAM": "ghostty"}, "\x1b_Ga=T,f=100,m=1;"),
        ({"TERM_PROGRAM": "WezTerm"}, "\x1b]1337;File=inline=1;size=9000:"),
        ({"LC_TERMINAL": "iTerm2", "TERM": "xterm"}, "\x1b]1337;File=inline=1;size=9000:"),
        ({"TERM": "xterm-256color"}, ""),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "1"}, ""),
        ({"TMUX": "x", "TERM": "tmux", "TERM_PROGRAM": "WezTerm"}, ""),
    ],
)
def test_each_terminal_gets_its_own_escape_sequence_and_others_none(variables, start):
    text = shown(bytes(9000), variables)
    assert text.startswith(start)
    assert bool(text) == bool(start)
    if start.startswith("\x1b_G"):
        assert [part[:3] for part in text.split("\x1b_G")[2:]] == ["m=1", "m=0"]


def test_of_an_image_that_is_refused_nothing_is_drawn(server, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"no image")
    result = carso("classify", image, "--explain", tmp_path / "out", url=server.url)
    assert result.exit_code == 1
    assert list((tmp_path / "out").iterdir()) == []
