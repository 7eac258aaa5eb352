"""`carso verify`: answers of a real service, counted again from the bundle alone, or by a service."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from carso import Client
from carso.command import command_line
from typer.testing import CliRunner, Result

from tests.bundles import COLOUR, SMALL, shared_bundle
from tests.calls import COLOUR_PNG, ENDLESS, FEW, PIXELS, PNG, as_npy
from tests.pictures import encoded, npy
from tests.server import serving


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{index}.png" for index in range(len(PIXELS))]
    for path, image in zip(paths, PIXELS, strict=True):
        path.write_bytes(encoded(image))
    return paths


def verify(answer: dict[str, Any] | str, *images: Path, bundle: Path | None = None, **options: str) -> Result:
    """Write an answer beside the first image, and verify it."""
    file = images[0].parent / "answer.json"
    file.write_text(answer if isinstance(answer, str) else json.dumps(answer))
    given = [f"--{name}={value}" for name, value in options.items()]
    where = [] if "url" in options else [f"--bundle={bundle or shared_bundle(SMALL)}"]
    return CliRunner().invoke(command_line(), ["verify", str(file), *map(str, images), *given, *where])


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"samples": 777, "risk": 0}, {"samples": 1, "risk": 0.5}])
def test_the_bundle_alone_gives_the_same_count(server, files, options):
    with Client(server.url) as client:
        answer = client.classify(files, **options)
    seeds = {prediction.seed for prediction in answer.predictions}
    assert len(seeds) == (1 if "seed" in options else 3)  # those that the service drew are in the answer too
    result = verify(answer.model_dump_json(), *files)
    assert result.exit_code == 0, result.stderr
    assert [line.endswith(": the same") for line in result.stdout.splitlines()] == [True] * 3


def test_a_batch_in_one_file_and_options_for_images_are_understood(server, client, tmp_path):
    batch = tmp_path / "batch.npy"
    batch.write_bytes(npy(PIXELS))
    assert verify(as_npy("/classify", client, PIXELS).json(), batch).exit_code == 0
    large = tmp_path / "large.png"
    large.write_bytes(encoded(np.arange(400, dtype=np.uint8).reshape(20, 20)))
    with Client(server.url) as asking:
        assert verify(asking.classify(large, resize=True).model_dump_json(), large).exit_code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("label", 3), ("class_name", "three"), ("votes", 1), ("tally", [0] * 10), ("fast_label", 3), ("seed", 1)],
)
def test_a_count_that_is_not_the_images_is_found(server, files, name, value):
    with Client(server.url) as client:
        answer = client.classify(files[0], risk=0).model_dump(mode="json")
    (prediction,) = answer["predictions"]
    assert verify(answer, files[0]).exit_code == 0
    prediction[name] = value if prediction[name] != value else value + 1
    result = verify(answer, files[0])
    assert result.exit_code == 1
    assert "NOT the same: " in result.stdout


def test_another_image_bundle_or_number_of_images_is_named(server, files):
    with Client(server.url) as client:
        answer = client.classify(files[0]).model_dump(mode="json")
    for result, part in (
        (verify(answer, files[1]), "image 0 is not the one of this answer: its SHA-256 is"),
        (verify(answer, files[0], bundle=shared_bundle(COLOUR)), "the answer is of bundle random 0.0.1 ("),
        (verify(answer, files[0], files[1]), "images"),
        (verify(answer, files[0].parent / "none.png"), "No such file"),
        (verify(answer, files[0], bundle=files[0].parent), "manifest"),
        (verify("{", files[0]), "not a whole answer of /classify"),
        (verify({"predictions": 1}, files[0]), "not a whole answer of /classify"),
    ):
        assert result.exit_code == 1
        assert part in result.stderr
        assert not result.stdout


def test_an_answer_without_its_evidence_cannot_be_counted_again(tmp_path, files):
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", evidence="label") as server,
        Client(server.url) as client,
    ):
        answer = client.classify(files[0]).model_dump_json()
    assert "withheld its evidence" in verify(answer, files[0]).stderr


def test_the_votes_until_a_deadline_are_counted_again(endless_server, tmp_path):
    for deadline in (250, 1000, 4000, 16_000):  # until it leaves a slow machine time to vote
        with endless_server.client() as client, suppress(httpx.TimeoutException):
            answer = as_npy("/classify", client, FEW[:1], **ENDLESS, deadline_ms=deadline)
            if answer.status_code == 200:
                break
    (prediction,) = answer.json()["predictions"]
    assert prediction["rule"] == "deadline"
    image = tmp_path / "image.npy"
    image.write_bytes(npy(FEW[:1]))
    assert verify(answer.json(), image).exit_code == 0
    changed = answer.json()
    changed["predictions"][0]["tally"][0] += 1
    assert verify(changed, image).exit_code == 1
    assert "no service can repeat" in verify(answer.json(), image, url=endless_server.url).stderr


def test_a_service_that_allows_seeds_counts_again_too(server, strict_server, files):
    with Client(server.url) as client:
        answer = client.classify(files).model_dump(mode="json")
    assert verify(answer, *files, url=server.url).exit_code == 0
    assert "is not the one of this answer" in verify(answer, *reversed(files), url=server.url).stderr
    answer["predictions"][1]["tally"][0] += 1
    changed = verify(answer, *files, url=server.url)
    assert changed.exit_code == 1
    assert [": the same" in line for line in changed.stdout.splitlines()] == [True, False, True]
    colour = files[0].parent / "colour.png"
    colour.write_bytes(COLOUR_PNG)
    with Client(strict_server.url) as client:
        answer = client.classify(colour).model_dump_json()
    assert verify(answer, colour, bundle=shared_bundle(COLOUR)).exit_code == 0
    assert "seed_refused" in verify(answer, colour, url=strict_server.url).stderr


def test_an_answer_as_curl_saves_it_is_enough(client, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(PNG)
    answer = client.post("/classify", content=PNG, headers={"content-type": "image/png"})
    assert verify(answer.text, image).exit_code == 0
