"""What answers say of images that are not like the ones that the bundle knows, and the risk that a tally reached."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from carso import Client
from carso.api.answers import FastAnswer, RobustAnswer, RobustLabels
from carso.bundle import Bundle
from carso.inference.sessions import Sessions
from carso.settings import Settings, SettingsError

from tests.bundles import COLOUR, SMALL, TYPICAL, random_images, shared_bundle
from tests.calls import as_npy, refused, sample
from tests.server import Server, serving
from tests.test_settings import start
from tests.waiting import comes_to

IMAGES = np.concatenate([random_images(20), 0.1 * random_images(1, seed=1)])


@pytest.fixture(scope="module")
def checking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that looks at the images of both paths, and refuses none."""
    with serving(shared_bundle(SMALL), tmp_path_factory.mktemp("checking") / "log", typical="all") as server:
        yield server


def expected() -> list[bool]:
    """Whether each of IMAGES is typical, from the definition."""
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1)
    zeros = np.zeros((len(IMAGES), SMALL.purifier.latent), np.float32)
    purified = sessions.purify(sessions.first_pass(IMAGES).codes, np.arange(len(IMAGES)), zeros)
    excess = np.maximum(np.abs(IMAGES - purified) - TYPICAL["eps"], 0).mean(axis=(1, 2, 3))
    contrast = np.ptp(IMAGES, axis=(1, 2, 3))
    return list((excess <= TYPICAL["excess"]) & (contrast >= TYPICAL["contrast"]))


def test_both_paths_mark_the_images_that_are_not_typical_and_give_the_same_figures(checking):
    with checking.client() as client:
        robust = as_npy("/classify", client, IMAGES)
        fast = as_npy("/classify/fast", client, IMAGES)
    RobustAnswer.model_validate_json(robust.content)
    FastAnswer.model_validate_json(fast.content)
    figures = [
        [(each["typical"], each["excess"], each["contrast"]) for each in answer.json()["predictions"]]
        for answer in (robust, fast)
    ]
    found = [typical for typical, _, _ in figures[0]]
    assert found == expected() == [typical for typical, _, _ in figures[1]]
    assert {True, False} == set(found)
    assert found[-1] is False  # too faint
    np.testing.assert_allclose(*[[row[1:] for row in rows] for rows in figures], atol=2e-6)


def test_the_figures_do_not_depend_on_the_seed(checking):
    with checking.client() as client:
        one, other = (as_npy("/classify", client, IMAGES, seed=seed).json()["predictions"] for seed in (1, 2))
    assert [each["excess"] for each in one] == pytest.approx([each["excess"] for each in other], abs=2e-6)


def test_the_metrics_count_images_by_whether_they_are_typical(checking):
    def count(typical: str) -> float:
        return sample(checking.metrics(), f'carso_typical_images_total{{path="robust",typical="{typical}"}}')

    before = {name: count(name) for name in ("true", "false")}
    with checking.client() as client:
        as_npy("/classify", client, IMAGES)
    for name, number in (("true", sum(expected())), ("false", len(IMAGES) - sum(expected()))):
        comes_to(lambda name=name: count(name), before[name] + number)


def test_the_models_of_the_protocol_have_the_figures_as_outputs(checking):
    with checking.client() as client:
        outputs = {output["name"]: output["datatype"] for output in client.get("/v2/models/random").json()["outputs"]}
        tensor = {"name": "images", "datatype": "FP32", "shape": list(IMAGES.shape), "data": IMAGES.ravel().tolist()}
        answer = client.post("/v2/models/random/infer", json={"inputs": [tensor]}).json()
    assert {"typical": "BOOL", "excess": "FP64", "contrast": "FP64", "risk_reached": "FP64"}.items() <= outputs.items()
    (found,) = (output["data"] for output in answer["outputs"] if output["name"] == "typical")
    assert found == expected()


def test_info_tells_the_thresholds_with_what_they_flag(checking):
    with checking.client() as client:
        info = client.get("/info").json()
    assert info["bundle"]["typical"]["excess"] == TYPICAL["excess"]
    assert info["bundle"]["typical"]["table"][0]["untypical"] == 1
    assert (info["limits"]["typical"], info["limits"]["untypical"]) == ("all", "mark")


def test_the_python_client_has_the_figures(checking):
    with Client(checking.url) as client:
        found = client.classify(IMAGES).predictions
    assert [prediction.typical for prediction in found] == expected()
    assert all(0 <= prediction.risk_reached <= prediction.risk for prediction in found)
    assert found[-1].contrast < 0.1


def test_by_default_the_fast_path_does_not_look(client):
    robust, fast = (as_npy(path, client, IMAGES[:1]).json() for path in ("/classify", "/classify/fast"))
    assert "typical" in robust["predictions"][0]
    assert not {"typical", "excess", "contrast"} & fast["predictions"][0].keys()
    fast_outputs = {output["name"] for output in client.get("/v2/models/random-fast").json()["outputs"]}
    assert not {"typical", "excess", "contrast"} & fast_outputs


def test_a_bundle_without_thresholds_says_so_and_its_answers_say_nothing(strict_client):
    image = random_images(1, COLOUR)
    (prediction,) = as_npy("/classify", strict_client, image).json()["predictions"]
    assert not {"typical", "excess", "contrast"} & prediction.keys()
    assert strict_client.get("/info").json()["bundle"]["typical"] is None


@pytest.mark.parametrize("evidence", ["full", "label"])
def test_an_operator_can_have_untypical_images_refused_and_keep_the_figures_to_himself(tmp_path, evidence):
    typical = expected()
    good, bad = typical.index(True), typical.index(False)
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", untypical="refuse", evidence=evidence) as server,
        server.client() as client,
    ):
        message = refused(as_npy("/classify", client, IMAGES[[good, bad]]), 422, "untypical_image")
        assert message.startswith("image 1 is not like the images that this service knows")
        assert ("excess" in message) == (evidence == "full")
        answer = as_npy("/classify", client, IMAGES[[good]])
        assert as_npy("/classify/fast", client, IMAGES[[bad]]).status_code == 200  # it does not look there
    assert answer.status_code == 200
    (prediction,) = answer.json()["predictions"]
    assert prediction["typical"] is True  # without it the label would be worth less than it seems
    if evidence == "label":
        RobustLabels.model_validate_json(answer.content)
        assert prediction.keys() == {"label", "class_name", "typical", "complete"}


def test_refusing_needs_a_look_and_a_bundle_with_thresholds():
    with pytest.raises(SettingsError, match="CARSO_UNTYPICAL: refuse is not allowed with CARSO_TYPICAL off"):
        Settings(untypical="refuse", typical="off")
    ended = start(untypical="refuse", bundle=shared_bundle(COLOUR))
    assert ended.returncode == 2
    assert "no thresholds of typical images" in ended.stderr


def test_every_answer_tells_the_risk_that_its_tally_reached(client):
    def reached(**options: object) -> list[tuple[str, float, float]]:
        answer: httpx.Response = as_npy("/classify", client, IMAGES, **options)
        return [(each["rule"], each["risk"], each["risk_reached"]) for each in answer.json()["predictions"]]

    assert all(found == ("exact", 0, 0) for found in reached(risk=0))
    for rule, risk, bound in reached(risk=1e-3):
        assert (bound == 0) if rule == "exact" else (0 < bound <= risk)
