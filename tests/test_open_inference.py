"""The Open Inference Protocol, spoken by Triton's own client, and by hand where that client never errs."""

from __future__ import annotations

import base64
import json
from contextlib import suppress

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.bundles import SMALL, shared_bundle
from tests.calls import ENDLESS, FEW, PIXELS, PNG, VALUES, as_npy
from tests.pictures import encoded
from tests.server import Server, serving
from tests.waiting import PATIENCE

ROBUST, FAST = "random", "random-fast"
MODELS = (ROBUST, FAST)


@pytest.fixture
def remote(server: Server):
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def tensor(array: np.ndarray, datatype: str, *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput("images", list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_a_client_of_triton_finds_server_and_models(remote):
    assert remote.is_server_live()
    assert remote.is_server_ready()
    assert remote.get_server_metadata()["extensions"] == [
        "binary_tensor_data",
        "model_configuration",
        "statistics",
    ]
    for name in MODELS:
        assert remote.is_model_ready(name)
        assert remote.is_model_ready(name, "0.0.1")
        metadata = remote.get_model_metadata(name)
        assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
        assert metadata["versions"] == ["0.0.1"]


def test_every_output_of_the_metadata_is_answered_as_it_says(remote):
    for name in MODELS:
        answer = remote.infer(name, [tensor(VALUES, "FP32")], parameters={"seed": 1} if name == ROBUST else None)
        outputs = {output["name"]: output for output in answer.get_response()["outputs"]}
        described = remote.get_model_metadata(name)["outputs"]
        assert list(outputs) == [entry["name"] for entry in described]
        for entry in described:
            found = outputs[entry["name"]]
            assert found["datatype"] == entry["datatype"]
            assert found["shape"] == [3, *entry["shape"][1:]]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("values", "datatype"),
    [
        (VALUES, "FP32"),
        (VALUES[:, 0], "FP32"),
        (VALUES.astype(np.float64), "FP64"),
        (PIXELS[:, None], "UINT8"),
        (np.array([encoded(image) for image in PIXELS], np.object_), "BYTES"),
        (np.array([[encoded(image)] for image in PIXELS], np.object_), "BYTES"),
    ],
)
def test_it_gives_the_native_answer_in_every_datatype_and_form(remote, client, values, datatype, binary):
    if datatype == "BYTES" and not binary:  # text, for JSON
        values = np.array([base64.b64encode(image) for image in values.ravel()], np.object_).reshape(values.shape)
    native = as_npy("/classify", client, VALUES, seed=7).json()["predictions"]
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in native[0]]
    answer = remote.infer(
        ROBUST, [tensor(values, datatype, binary=binary)], outputs=wanted, request_id="mine", parameters={"seed": 7}
    )
    assert answer.get_response()["id"] == "mine"
    assert answer.get_response()["model_name"] == ROBUST
    for name in native[0]:
        told = answer.as_numpy(name)
        if told.dtype == np.object_:
            told = np.array([text.decode() if isinstance(text, bytes) else text for text in told])
        assert told.tolist() == [prediction[name] for prediction in native], name


def test_half_floats_are_read(remote, client):
    native = as_npy("/classify/fast", client, VALUES.astype(np.float16)).json()["predictions"]
    answer = remote.infer(FAST, [tensor(VALUES.astype(np.float16), "FP16")])
    assert answer.as_numpy("probabilities").tolist() == [prediction["probabilities"] for prediction in native]


def test_parameters_carry_the_options_and_outputs_are_picked(remote):
    wanted = [triton.InferRequestedOutput("votes"), triton.InferRequestedOutput("label", binary_data=False)]
    parameters = {"samples": 50, "risk": 0, "seed": 3}
    answer = remote.infer(ROBUST, [tensor(VALUES[:1], "FP32")], outputs=wanted, parameters=parameters)
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["votes", "label"]
    assert answer.as_numpy("votes")[0] <= 50


def test_errors_reach_the_client_with_name_and_message(remote):
    for arguments, part in (
        ({"model_name": "large"}, "the models here are"),
        ({"model_name": ROBUST, "parameters": {"samples": 0}}, "invalid_parameter: samples"),
        ({"model_name": FAST, "parameters": {"seed": 0}}, "unknown_parameter"),
        ({"model_name": FAST, "outputs": [triton.InferRequestedOutput("tally")]}, "unknown_output: 'tally'"),
        ({"model_name": ROBUST, "model_version": "9"}, "not_found"),
    ):
        with pytest.raises(InferenceServerException, match=part):
            remote.infer(inputs=[tensor(VALUES, "FP32")], **arguments)


def test_the_timeout_of_tritons_client_is_the_deadline(remote, endless_server, client):
    batch = tensor(FEW, "FP32")
    with triton.InferenceServerClient(endless_server.url.removeprefix("http://"), network_timeout=PATIENCE) as slow:
        with pytest.raises(InferenceServerException, match="within 1 ms"):
            slow.infer(ROBUST, [batch], parameters=ENDLESS, timeout=1)  # microseconds
        for timeout in (500_000, 2_000_000, 8_000_000, 16_000_000):  # until it leaves a slow machine time to vote
            with suppress(InferenceServerException):
                answer = slow.infer(ROBUST, [batch], parameters=ENDLESS, timeout=timeout)
                break
        assert not answer.as_numpy("complete").all()
    assert remote.infer(ROBUST, [tensor(VALUES, "FP32")], timeout=0).as_numpy("complete").all()
    for model, parameters, error in (
        (ROBUST, {"timeout": -1}, "invalid_parameter: timeout: -1"),
        (ROBUST, {"timeout": "soon"}, "invalid_parameter: timeout: 'soon'"),
        (ROBUST, {"timeout": 1000, "deadline_ms": 1}, "conflicting_parameters: timeout and deadline_ms"),
        (FAST, {"timeout": 1000}, "unknown_parameter: 'timeout'"),
    ):
        answer = client.post(f"/v2/models/{model}/infer", json=body() | {"parameters": parameters})
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(error)


def test_a_seed_is_refused_here_too_where_the_operator_keeps_it(strict_client):
    entry = {"name": "images", "shape": [1, 3, 6, 5], "datatype": "FP32", "data": [0.5, 0.9] * 45}
    answer = strict_client.post(f"/v2/models/{ROBUST}/infer", json={"inputs": [entry], "parameters": {"seed": 1}})
    assert answer.status_code == 403
    assert answer.json()["error"].startswith("seed_refused: ")


def body(**changes: object) -> dict[str, object]:
    entry = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": VALUES[0].ravel().tolist()}
    changed = {name: value for name, value in (entry | changes).items() if value is not None}
    return {"inputs": [changed]}


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        ({}, 422, "invalid_tensor"),
        ({"inputs": []}, 422, "invalid_tensor"),
        (body(name=1), 422, "invalid_tensor"),
        (body(parameters={"shared_memory_region": "mine"}), 422, "invalid_tensor"),
        (body(datatype="INT4"), 422, "invalid_tensor"),
        (body(datatype="INT8"), 422, "not_numbers"),
        (body(shape=[-1, 1, 8, 8]), 422, "invalid_tensor"),
        (body(shape=[1, 1, 8, 9]), 422, "invalid_tensor"),
        (body(shape=[2**62, 2**62]), 422, "invalid_tensor"),
        (body(shape=[0]), 422, "empty_batch"),
        (body(data=None), 422, "invalid_tensor"),
        (body(parameters={"binary_data_size": 4}), 422, "invalid_tensor"),
        (body(data=[["x"] * 64]), 422, "not_numbers"),
        (body(data=[[1], [1, 2]]), 422, "ragged_array"),
        (body(data=[2.0] * 64), 422, "out_of_range"),
        (body(data=[0.5] * 64, datatype="UINT8"), 422, "not_numbers"),
        (body(data=[256] * 64, datatype="UINT8"), 422, "out_of_range"),
        (body(datatype="BYTES", shape=[65], data=["AAAA"] * 65), 413, "too_many_images"),
        (body(datatype="BYTES", shape=[1, 2], data=["AAAA"] * 2), 422, "invalid_tensor"),
        (body(datatype="BYTES", shape=[2], data=["AAAA"]), 422, "invalid_tensor"),
        (body(datatype="BYTES", shape=[1], data=["!"]), 400, "undecodable_base64"),
        (body(datatype="BYTES", shape=[1], data=[None]), 400, "undecodable_base64"),
        (body(datatype="BYTES", shape=[1], data=["AAAA"]), 400, "undecodable_image"),
        ("{", 400, "undecodable_json"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(client, content, status, error):
    text = content if isinstance(content, str) else json.dumps(content)
    answer = client.post(f"/v2/models/{ROBUST}/infer", content=text)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"] == f"{error}: {answer.json()['message']}"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("size", "behind", "part"),
    [
        ("-1", b"", "Inference-Header-Content-Length"),
        ("9" * 30, b"", "Inference-Header-Content-Length"),
        ("x", b"", "Inference-Header-Content-Length"),
        (None, b"\0" * 3, "3 bytes follow the JSON"),
        (None, b"\xff\xff\xff\xff", "ends within its element 0"),
        (None, b"\1\0\0", "ends within its element 0"),
    ],
)
def test_damaged_binary_forms_are_refused(client, size, behind, part):
    due = {"binary_data_size": len(behind) if b"\xff" in behind or b"\1" in behind else 8}
    head = json.dumps(body(datatype="BYTES", shape=[1], data=None, parameters=due)).encode()
    headers = {"inference-header-content-length": size or str(len(head))}
    answer = client.post(f"/v2/models/{ROBUST}/infer", content=head + behind, headers=headers)
    assert answer.status_code == 422
    assert part in answer.json()["message"]


def asked(**fields: object) -> dict[str, object]:
    return body() | fields


@pytest.mark.parametrize(
    "content",
    [
        asked(model_name="random"),  # KServe's SDK
        asked(parameters={}),
        asked(parameters={"content_type": "np", "headers": {"x": "y"}}),  # MLServer's codecs
        asked(parameters=None, outputs=None, id=None),  # their types, written with everything that is None
        asked(parameters={"seed": None, "priority": 1, "sequence_id": 2}),
        asked(outputs=[{"name": "label", "parameters": None}]),
        asked(outputs=[{"name": "label", "parameters": {"content_type": "np"}, "surprise": 1}]),
        body(name="input-0"),
        body(parameters={"content_type": "np", "headers": None}),
        body(parameters={}) | {"surprise": [1]},
        {"inputs": [body()["inputs"][0] | {"parameters": None, "surprise": 1}]},
    ],
)
def test_what_the_protocol_lets_clients_add_is_ignored(client, content):
    for model in MODELS:
        answer = client.post(f"/v2/models/{model}/infer", json=content)
        assert answer.status_code == 200, answer.text


def test_what_would_change_a_tensor_is_refused_and_not_ignored(remote):
    with pytest.raises(InferenceServerException, match="classification is not offered here"):
        remote.infer(ROBUST, [tensor(VALUES, "FP32")], outputs=[triton.InferRequestedOutput("label", class_count=3)])
    shared = triton.InferInput("images", [1, 1, 8, 8], "FP32")
    shared.set_shared_memory("mine", 256)
    with pytest.raises(InferenceServerException, match="shared_memory_region is not offered here"):
        remote.infer(ROBUST, [shared])


def test_the_repository_lists_the_models(remote, client):
    index = remote.get_model_repository_index()
    assert index == [{"name": name, "version": "0.0.1", "state": "READY", "reason": ""} for name in (FAST, ROBUST)]
    for content in (b"", b"{}", b'{"ready": true}', b'{"ready": null}'):
        assert client.post("/v2/repository/index", content=content).json() == index
    assert client.post("/v2/repository/index", content=b"{").json()["error"].startswith("undecodable_json")


def test_a_models_configuration_agrees_with_its_metadata(remote, client):
    images = client.get("/info").json()["limits"]["max_images"]
    for name in MODELS:
        config, metadata = remote.get_model_config(name), remote.get_model_metadata(name)
        assert remote.get_model_config(name, "0.0.1") == config
        assert (config["name"], config["max_batch_size"]) == (name, images)
        for mine, other in (("input", "inputs"), ("output", "outputs")):
            described = [
                {
                    "name": entry["name"],
                    "data_type": f"TYPE_{entry['datatype']}".replace("BYTES", "STRING"),
                    "dims": entry["shape"][1:],
                }
                for entry in metadata[other]
            ]
            assert config[mine] == described


def test_statistics_count_images_requests_and_failures(remote):
    def counts(name: str) -> tuple[int, int, int]:
        (entry,) = remote.get_inference_statistics(name)["model_stats"]
        assert entry["name"] == name
        return entry["inference_count"], entry["execution_count"], entry["inference_stats"]["fail"]["count"]

    for name in MODELS:
        images, requests, failures = counts(name)
        remote.infer(name, [tensor(VALUES, "FP32")])
        with suppress(InferenceServerException):
            remote.infer(name, [tensor(VALUES, "FP32")], outputs=[triton.InferRequestedOutput("surprise")])
        assert counts(name) == (images + 3, requests + 1, failures + 1)
        (entry,) = remote.get_inference_statistics(name, "0.0.1")["model_stats"]
        stages = entry["inference_stats"]
        inside = ("queue", "compute_input", "compute_infer", "compute_output")
        assert sum(stages[stage]["ns"] for stage in inside) == pytest.approx(stages["success"]["ns"], abs=1e4)
    assert [entry["name"] for entry in remote.get_inference_statistics()["model_stats"]] == [FAST, ROBUST]


def test_evidence_can_be_withheld_from_both_apis(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", evidence="label") as server, server.client() as client:
        image = {"content": PNG, "headers": {"content-type": "image/png"}}
        robust, fast = (client.post(path, **image).json() for path in ("/classify", "/classify/fast"))
        assert set(robust["predictions"][0]) == {"label", "class_name", "typical", "complete"}
        assert set(fast["predictions"][0]) == {"label", "class_name"}
        assert "timings" not in robust
        assert "timings" not in fast
        assert client.get("/info").json()["limits"]["evidence"] == "label"
        outputs = client.post(f"/v2/models/{ROBUST}/infer", json=body()).json()["outputs"]
        assert [output["name"] for output in outputs] == ["label", "class_name", "typical", "complete"]
        (statistics,) = client.get(f"/v2/models/{ROBUST}/stats").json()["model_stats"]
        assert statistics["execution_count"] == 1
        assert statistics["inference_stats"] is None
        schema = client.get("/openapi.json").json()["components"]["schemas"]
        assert "RobustPrediction" not in schema
