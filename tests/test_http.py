"""What the endpoints answer, through a real server on a real port, to every way of sending an image."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from carso.api.answers import FastAnswer, RobustAnswer
from carso.bundle import Bundle
from carso.inference.jobs import VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions

from tests.bundles import SMALL, shared_bundle
from tests.calls import BATCH, COLOUR_PNG, ENDLESS, FEW, PATHS, PIXELS, PNG, VALUES, as_npy, as_png, refused
from tests.pictures import encoded, npy


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The same bundle as the server's, without a server."""
    bundle = Bundle.load(shared_bundle(SMALL))
    sessions = Sessions(bundle, device="cpu", threads=1)
    return Pipeline(sessions, latent=bundle.manifest.latent, classes=len(bundle.manifest.classes), round_rows=512)


def test_the_robust_path_answers_what_the_pipeline_does(client, pipeline):
    response = as_npy("/classify", client, VALUES, seed=5, samples=800, risk=1e-2)
    assert response.status_code == 200, response.text
    answer = RobustAnswer.model_validate_json(response.content)
    outcomes = pipeline.classify(VALUES, VotePlan(samples=800, risk=1e-2, seed=5))
    first = pipeline.sessions.first_pass(VALUES).probabilities.argmax(axis=1)
    for prediction, outcome, fast_label in zip(answer.predictions, outcomes, first, strict=True):
        assert prediction.label == outcome.label == int(np.argmax(prediction.tally))
        assert prediction.tally == outcome.tally
        assert prediction.votes == outcome.votes == sum(prediction.tally)
        assert prediction.class_name == str(prediction.label)
        assert prediction.share == prediction.tally[prediction.label] / prediction.votes
        assert (prediction.samples, prediction.risk, prediction.seed) == (800, 1e-2, 5)
        assert prediction.fast_label == fast_label
        assert prediction.agree == (prediction.label == prediction.fast_label)
        assert prediction.rule == outcome.ending
        assert prediction.complete


def test_the_fast_path_answers_what_the_first_pass_does(client, pipeline):
    response = as_npy("/classify/fast", client, VALUES)
    assert response.status_code == 200, response.text
    answer = FastAnswer.model_validate_json(response.content)
    probabilities = pipeline.sessions.first_pass(VALUES).probabilities
    np.testing.assert_allclose([p.probabilities for p in answer.predictions], probabilities, atol=1e-6)
    assert [p.label for p in answer.predictions] == probabilities.argmax(axis=1).tolist()
    assert [p.class_name for p in answer.predictions] == [str(p.label) for p in answer.predictions]


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_says_what_gave_it_and_how_long_it_took(client, path):
    answer = as_png(path, client).json()
    bundle = Bundle.load(shared_bundle(SMALL))
    assert answer["bundle"] == {"name": "random", "version": "0.0.1", "checksum": bundle.checksum}
    assert answer["provider"] == "CPUExecutionProvider"
    timings = answer["timings"]
    stages = sum(value for name, value in timings.items() if name != "total_ms")
    assert 0 < stages <= timings["total_ms"]
    assert ("vote_ms" in timings) == (path == "/classify")


def test_the_defaults_are_those_of_bundle_and_settings(client):
    (prediction,) = as_png("/classify", client).json()["predictions"]
    assert (prediction["samples"], prediction["risk"]) == (1500, 1e-3)


def test_without_a_seed_every_image_gets_its_own(client):
    seeds = [p["seed"] for p in as_npy("/classify", client, VALUES, samples=5).json()["predictions"]]
    assert len(set(seeds)) == 3


def test_the_seed_of_an_answer_gives_the_same_votes_again(client):
    first = as_npy("/classify", client, VALUES[:1], risk=0).json()["predictions"]
    again = as_npy("/classify", client, VALUES, risk=0, seed=first[0]["seed"]).json()["predictions"]
    assert again[0] == first[0]


def test_a_risk_of_0_stops_only_when_the_outcome_is_certain(client):
    for prediction in as_npy("/classify", client, VALUES, risk=0, samples=301).json()["predictions"]:
        assert prediction["rule"] == "exact"
        second, first = sorted(prediction["tally"])[-2:]
        assert prediction["votes"] == 301 or first - second > 301 - prediction["votes"]


def test_a_deadline_ends_the_count_with_the_votes_cast(endless_client):
    for deadline_ms in (500, 2000, 8000, 16_000):  # how soon the first vote is cast depends on the machine
        response = as_npy("/classify", endless_client, FEW, **ENDLESS, deadline_ms=deadline_ms)
        if response.status_code != 504:
            break
    assert response.status_code == 200
    late = [p for p in response.json()["predictions"] if p["rule"] == "deadline"]
    assert late
    assert not any(p["complete"] for p in late)
    assert all(0 < p["votes"] < 100_000 for p in late)


def test_a_deadline_without_any_vote_is_an_error(endless_client):
    """63 images get their first votes in several rounds, which last more than 1 ms together on this server."""
    message = refused(as_npy("/classify", endless_client, BATCH, **ENDLESS, deadline_ms=1), 504, "deadline_exceeded")
    assert "63 images" in message and "1 ms" in message


# every way to send an image


def test_the_same_image_gets_the_same_answer_however_it_is_sent(client):
    base = base64.b64encode(PNG).decode()
    header = {"headers": {"content-type": "image/png"}}
    forms = [
        {"content": PNG, **header},
        {"content": encoded(PIXELS[0], "BMP"), "headers": {"content-type": "image/bmp"}},
        {"content": encoded(PIXELS[0], "BMP"), **header},  # the bytes decide
        {"content": iter([PNG[:20], PNG[20:]]), **header},  # chunked
        {"files": {"file": PNG}},
        {"json": {"images": [base]}},
        {"json": {"images": [f"data:image/png;base64,{base}"]}},
        {"json": {"images": VALUES[0].tolist()}},
        {"json": {"images": [VALUES[0].tolist()]}},
        {"content": npy(PIXELS[0]), "headers": {"content-type": "application/x-npy"}},
        {"content": npy(VALUES[:1]), "headers": {"content-type": "application/x-npy"}},
    ]
    answers = [client.post("/classify/fast", **form) for form in forms]
    assert [answer.status_code for answer in answers] == [200] * len(forms), [answer.text for answer in answers]
    predictions = [answer.json()["predictions"] for answer in answers]
    assert predictions == [predictions[0]] * len(forms)


def test_a_batch_is_answered_in_its_order_however_it_is_sent(client):
    pngs = [encoded(image) for image in PIXELS]
    forms = [
        {"files": [("file", png) for png in pngs]},
        {"json": {"images": [base64.b64encode(png).decode() for png in pngs]}},
        {"json": {"images": VALUES.tolist()}},
        {"content": npy(PIXELS), "headers": {"content-type": "application/x-npy"}},
    ]
    for path, options in (("/classify/fast", {}), ("/classify", {"seed": 1, "samples": 50})):
        single = [
            client.post(path, params=options, content=png, headers={"content-type": "image/png"}).json()["predictions"][
                0
            ]
            for png in pngs
        ]
        for form in forms:
            predictions = client.post(path, params=options, **form).json()["predictions"]
            assert [p["label"] for p in predictions] == [p["label"] for p in single]
            assert path == "/classify/fast" or predictions == single


def test_options_may_stand_in_a_json_body(client):
    body = {"images": VALUES[:1].tolist(), "samples": 33, "seed": 4, "risk": 0.01}
    (prediction,) = client.post("/classify", json=body).json()["predictions"]
    assert (prediction["samples"], prediction["seed"], prediction["risk"]) == (33, 4, 0.01)
    refused(client.post("/classify?seed=5", json=body), 422, "conflicting_parameters")


def test_a_large_image_is_read_if_resizing_is_asked_for(client):
    photo = encoded(np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8))  # too large to decode inline
    send = {"content": photo, "headers": {"content-type": "image/png"}}
    assert len(client.post("/classify/fast?resize=true", **send).json()["predictions"]) == 1
    message = refused(client.post("/classify/fast", **send), 422, "wrong_shape")
    assert "[1, 300, 400]" in message and "[1, 8, 8]" in message and "resize=true" in message


def test_a_small_file_of_a_large_image_is_read_if_resizing_is_asked_for(client):
    body = {"images": [base64.b64encode(encoded(np.eye(1000, dtype=np.uint8) * 255)).decode()], "resize": True}
    assert client.post("/classify/fast", json=body).status_code == 200


def test_a_bundle_of_colour_images_that_are_not_square_is_served_alike(strict_client):
    response = strict_client.post("/classify", content=COLOUR_PNG, headers={"content-type": "image/png"})
    (prediction,) = RobustAnswer.model_validate_json(response.content).predictions
    assert len(prediction.tally) == 3
    assert prediction.rule == "exact"  # by this server's CARSO_RISK
