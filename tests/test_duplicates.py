"""Near-duplicates of earlier queries: what is one, who is told, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from carso import Client, RequestRefused
from carso.api.answers import FastAnswer, FastLabels, RobustAnswer
from carso.bundle import Bundle
from carso.http.exchange import Exchange
from carso.inference.duplicates import Recent
from carso.inference.sessions import Sessions
from carso_training.datasets.examples import Examples
from carso_training.robustness import duplicates
from carso_training.robustness.blackbox import Service

from tests.bundles import COLOUR, NEAR, SMALL, random_images, shared_bundle
from tests.calls import as_npy, logged, refused, sample
from tests.duplex import streaming
from tests.grpc_calls import call, channel, inference, predictions
from tests.pictures import npy
from tests.server import Server, serving
from tests.test_settings import start
from tests.waiting import comes_to

CODES = np.random.default_rng(0).random((60, 3), dtype=np.float32)
ALICE, BOB = "alice-0123456789", "bob-0123456789ab"


def recent(**limits: int) -> Recent:
    return Recent(distance=0.2, code=3, **limits)


def image(number: int) -> np.ndarray:
    return np.full((1, 2, 2), number, np.float32)


def is_near(memory: Recent, number: int, caller: str = "a") -> bool:
    return memory.is_near(caller, image(number), CODES[number])


# the memory


def test_an_image_is_near_if_its_code_is_within_the_distance_of_an_earlier_one_of_the_same_caller():
    distances = np.linalg.norm(CODES[:, None] - CODES[None], axis=-1)
    expected = [bool((distances[number, :number] < 0.2).any()) for number in range(60)]
    assert {True, False} == set(expected)
    memory = recent()
    assert [is_near(memory, number) for number in range(60)] == expected
    assert [is_near(memory, number, "b") for number in range(60)] == expected


def test_the_same_image_again_gets_the_verdict_of_its_first_time():
    memory = recent()
    first = [is_near(memory, number) for number in range(60)]
    assert [is_near(memory, number) for number in range(60)] == first
    changed = image(7).copy()
    changed[0, 0, 0] += 1e-6
    assert memory.is_near("a", changed, CODES[7])


def test_the_oldest_image_of_a_caller_is_forgotten_first_and_a_repeat_takes_no_room():
    memory = recent(remembered=2)
    far = np.eye(3, dtype=np.float32)
    assert not any(memory.is_near("a", image(number), far[number]) for number in (0, 1, 1, 1, 0))
    assert memory.is_near("a", image(9), far[0])  # in the place of image 0
    assert memory.is_near("a", image(8), far[0])  # in that of 1, which image 9 is enough for
    assert not memory.is_near("a", image(7), far[1])


def test_the_caller_who_was_silent_for_longest_is_forgotten_first():
    memory = recent(callers=2)
    for caller in ("a", "b", "a", "c"):
        memory.is_near(caller, image(0), CODES[0])
    assert memory.is_near("a", image(1), CODES[0])
    assert not memory.is_near("b", image(1), CODES[0])


@pytest.mark.parametrize(
    ("host", "sender"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("", ""),
        ("unix:/run/carso", "unix:/run/carso"),
    ],
)
def test_without_keys_a_caller_is_an_address_or_the_network_of_an_ipv6_customer(host, sender):
    assert Exchange(request_id="x", host=host).sender == sender


def test_the_distance_is_one_that_few_validation_images_are_within():
    images = random_images(400, seed=2)
    bundle = Bundle.load(shared_bundle(SMALL))
    data = Examples(torch.from_numpy(np.round(images * 255).astype(np.uint8)), torch.zeros(400, dtype=torch.int64))
    found = duplicates.near_duplicates_of(bundle, validation=data, seed=0)
    assert (found.images, found.share) == (400, 0.001)
    codes = duplicates.codes_of(Sessions(bundle, device="cpu", threads=1), data.pixels().numpy())
    memory = Recent(distance=found.distance, code=codes.shape[1])
    verdicts = [memory.is_near("a", *each) for each in zip(data.pixels().numpy(), codes, strict=True)]
    assert sum(verdicts) <= 4
    assert duplicates.near_duplicates_of(bundle, validation=data, seed=0) == found


# the service


@pytest.fixture(scope="module")
def pairs() -> np.ndarray:
    """[20, 2, 1, 8, 8]: images that are far from each other, and each with a little noise, which leaves it near."""
    images = random_images(400, seed=3)
    noise = 0.004 * np.sign(np.random.default_rng(4).random(images.shape) - 0.5)
    changed = np.clip(images + noise, 0, 1).astype(np.float32)
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1)
    codes, moved = (duplicates.codes_of(sessions, array) for array in (images, changed))
    chosen: list[int] = []
    for number, code in enumerate(codes):
        apart = all(np.linalg.norm(codes[other] - code) > 3 * NEAR["distance"] for other in chosen)
        if apart and np.linalg.norm(moved[number] - code) < NEAR["distance"] / 2:
            chosen.append(number)
    assert len(chosen) >= 20
    return np.stack([images[chosen[:20]], changed[chosen[:20]]], axis=1)


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys: its callers here have one address, and so share pairs."""
    log = tmp_path_factory.mktemp("marking") / "log"
    with serving(shared_bundle(SMALL), log, duplicates="mark", grpc_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "keys").write_text(f"alice: {ALICE} rate=1000000\nbob: {BOB}\n")
    settings = {"api_keys_file": folder / "keys", "grpc_port": 0, "evidence": "label"}
    with serving(shared_bundle(SMALL), folder / "log", duplicates="refuse", **settings) as server:
        yield server


def test_a_changed_image_is_marked_on_either_path_and_the_same_image_is_not(marking, pairs):
    first, changed = pairs[0]

    def marked(path: str, array: np.ndarray) -> bool:
        answer = as_npy(path, client, array)
        (RobustAnswer if path == "/classify" else FastAnswer).model_validate_json(answer.content)
        (prediction,) = answer.json()["predictions"]
        return prediction["near_duplicate"]

    with marking.client() as client:
        assert not marked("/classify", first)
        assert not marked("/classify", first)
        assert marked("/classify/fast", changed)
        assert marked("/classify", changed)  # again: as it was


def test_the_images_of_one_request_are_compared_with_each_other_and_counted(marking, pairs):
    def count(near: str) -> float:
        return sample(marking.metrics(), f'carso_near_duplicate_images_total{{near_duplicate="{near}",path="fast"}}')

    before = {near: count(near) for near in ("true", "false")}
    with marking.client() as client:
        answer = as_npy("/classify/fast", client, pairs[1:3].reshape(4, 1, 8, 8))
    assert [each["near_duplicate"] for each in answer.json()["predictions"]] == [False, True, False, True]
    for near, number in before.items():
        comes_to(lambda near=near: count(near), number + 2)
    (line,) = logged(marking, answer.headers["x-request-id"])
    assert line["near_duplicates"] == 2


def test_the_open_inference_protocol_and_grpc_say_it_too_and_know_the_caller_by_its_address(marking, pairs):
    first, changed = pairs[3]
    with marking.client() as client, channel(marking) as remote:
        outputs = {output["name"]: output["datatype"] for output in client.get("/v2/models/random").json()["outputs"]}
        assert outputs["near_duplicate"] == "BOOL"
        tensor = {"name": "images", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": first.ravel().tolist()}
        answer = client.post("/v2/models/random/infer", json={"inputs": [tensor]}).json()
        (found,) = (output["data"] for output in answer["outputs"] if output["name"] == "near_duplicate")
        assert found == [False]
        assert predictions(call(remote, "ModelInfer", inference(changed[None])))["near_duplicate"] == [True]


def test_the_frames_of_a_stream_are_compared_with_all_that_its_address_sent(marking, pairs):
    first, changed = pairs[19]
    with marking.client() as client:
        as_npy("/classify/fast", client, first)
    with streaming(marking, rate=1) as stream:
        for image, near in ((first, False), (changed, True)):
            stream.send(image.tolist())
            answers = stream.line(), stream.line()
            assert [answer["prediction"]["near_duplicate"] for answer in answers] == [near, near]


def test_the_python_client_has_it(marking, pairs):
    with Client(marking.url) as client:
        found = client.classify(pairs[4]).predictions
        assert client.info().limits.duplicates == "mark"
    assert [prediction.near_duplicate for prediction in found] == [False, True]


def test_whoever_hangs_up_once_events_come_is_remembered_all_the_same(marking, pairs):
    first, changed = pairs[5]
    headers = {"accept": "text/event-stream", "content-type": "application/x-npy"}
    with marking.client() as client:
        with client.stream("POST", "/classify", content=npy(first), headers=headers) as answer:
            assert next(answer.iter_lines()) == "event: first_pass"
        (prediction,) = as_npy("/classify", client, changed).json()["predictions"]
    assert prediction["near_duplicate"]


def test_by_default_nobody_looks(client, pairs):
    for path in ("/classify", "/classify/fast"):
        for prediction in as_npy(path, client, pairs[0]).json()["predictions"]:
            assert "near_duplicate" not in prediction
    outputs = {output["name"] for output in client.get("/v2/models/random").json()["outputs"]}
    assert "near_duplicate" not in outputs
    assert client.get("/info").json()["limits"]["duplicates"] == "off"


def test_refused_images_stay_refused_to_one_key_and_not_to_another(refusing, pairs):
    def refusals() -> tuple[float, float]:
        page = refusing.metrics()
        of_all = sample(page, 'carso_rejections_total{reason="near_duplicate"}')
        return of_all, sample(page, 'carso_caller_near_duplicates_total{caller="alice"}')

    first, changed = pairs[0]
    of_all, of_alice = refusals()
    with refusing.client() as client:
        client.headers["authorization"] = f"Bearer {ALICE}"
        answer = as_npy("/classify", client, first)
        assert FastLabels.model_validate_json(as_npy("/classify/fast", client, first).content)
        assert "near_duplicate" not in answer.json()["predictions"][0]  # which would help an attacker
        for path in ("/classify", "/classify", "/classify/fast"):
            message = refused(as_npy(path, client, changed), 409, "near_duplicate")
            assert message.startswith("image 0 is nearly one that the key of alice sent before")
        client.headers["authorization"] = f"Bearer {BOB}"
        assert as_npy("/classify", client, changed).status_code == 200
    comes_to(refusals, (of_all + 3, of_alice + 3))


def test_a_refused_image_costs_its_first_pass_and_no_votes(refusing, pairs):
    def rows() -> float:
        return sample(refusing.metrics(), 'carso_caller_rows_total{caller="alice"}')

    with Client(refusing.url, api_key=ALICE, retries=0) as client:
        logged(refusing, client.classify(pairs[6][0]).request_id)  # and counted before that
        before = rows()
        with pytest.raises(RequestRefused) as caught:
            client.classify(pairs[6][1])
    assert (caught.value.status, caught.value.error) == (409, "near_duplicate")
    comes_to(rows, before + 1)


def test_grpc_refuses_it_in_a_way_that_no_client_sends_again(refusing, pairs):
    first, changed = pairs[7]
    key = {"metadata": (("authorization", f"Bearer {BOB}"),)}
    with channel(refusing) as remote:
        call(remote, "ModelInfer", inference(first[None]), **key)
        with pytest.raises(grpc.RpcError) as caught:
            call(remote, "ModelInfer", inference(changed[None]), **key)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details().startswith("near_duplicate: image 0")


def test_events_stop_before_they_tell_of_a_refused_image(tmp_path: Path, pairs):
    headers = {"accept": "text/event-stream", "content-type": "application/x-npy"}
    with serving(shared_bundle(SMALL), tmp_path / "log", duplicates="refuse") as server, server.client() as client:
        assert as_npy("/classify", client, pairs[0][0]).status_code == 200
        message = refused(client.post("/classify", content=npy(pairs[0][1]), headers=headers), 409, "near_duplicate")
        assert "this address sent before" in message


def test_an_attack_through_the_api_is_refused_by_name(refusing, pairs):
    with Client(refusing.url, api_key=ALICE, retries=0) as client:
        service = Service(client, Bundle.load(shared_bundle(SMALL)))
        said = service.labels(torch.from_numpy(pairs[8]))
    assert said[0] >= 0 > said[1]
    assert service.answers() == {"classified": 1, "near_duplicate": 1}
    assert service.answers() == {}


@pytest.mark.parametrize("action", ["mark", "refuse"])
def test_a_bundle_that_does_not_say_how_near_that_is_ends_the_start(action):
    ended = start(duplicates=action, bundle=shared_bundle(COLOUR))
    assert ended.returncode == 2
    assert f"CARSO_DUPLICATES: {action} is not allowed with bundle random" in ended.stderr
    assert "carso-train duplicates" in ended.stderr
