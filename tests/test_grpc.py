"""The Open Inference Protocol over gRPC, by a real channel to a real server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import carso
import grpc
import numpy as np
import pytest
from carso.grpc.protocol import METHODS, SERVICE
from carso.grpc.statuses import CODE
from carso.http.statuses import STATUS
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.bundles import SMALL, shared_bundle
from tests.calls import BATCH, ENDLESS, FEW, PIXELS, VALUES, as_npy, in_flight, logged, sample
from tests.environments import python_with
from tests.grpc_calls import MODEL, address, call, channel, grpc_addresses, inference, method, predictions
from tests.pictures import encoded
from tests.server import ROOT, Server, environment, serving
from tests.test_listening import listening, needs_ipv6
from tests.test_settings import start
from tests.waiting import PATIENCE, comes_to, eventually

FAST = f"{MODEL}-fast"
INFER = f"/{SERVICE}/ModelInfer"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("grpc") / "log"
    with serving(shared_bundle(SMALL), log, grpc_port=0, max_body_bytes=2**20, bodies_bytes=2**21) as running:
        yield running


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that casts 20 000 votes a second, so that a count is under way for as long as a test wants."""
    limits = {"max_samples": 100_000, "queue_rows": 64 * 100_001, "grpc_calls": 2}
    log = tmp_path_factory.mktemp("busy") / "log"
    with serving(shared_bundle(SMALL), log, per_second=20_000, grpc_port=0, **limits) as running:
        yield running


@pytest.fixture
def remote(server: Server) -> Iterator[grpc.Channel]:
    with channel(server) as connected:
        yield connected


def refused(connected: grpc.Channel, name: str, message: object, code: grpc.StatusCode, **options: object) -> grpc.Call:
    with pytest.raises(grpc.RpcError) as caught:
        call(connected, name, message, **options)
    assert caught.value.code() == code, caught.value
    return caught.value


def trailing(error: grpc.Call) -> dict[str, str]:
    return dict(error.trailing_metadata())


# what is served


def test_a_client_finds_server_and_models(remote):
    assert call(remote, "ServerLive").live
    assert call(remote, "ServerReady").ready
    metadata = call(remote, "ServerMetadata")
    assert (metadata.name, metadata.version) == ("carso", carso.__version__)
    for name in (MODEL, FAST):
        for version in ("", "0.0.1"):
            assert call(remote, "ModelReady", METHODS["ModelReady"][0](name=name, version=version)).ready
            model = call(remote, "ModelMetadata", METHODS["ModelMetadata"][0](name=name, version=version))
            (images,) = model.inputs
            assert (model.name, list(model.versions)) == (name, ["0.0.1"])
            assert (images.name, images.datatype, list(images.shape)) == ("images", "FP32", [-1, 1, 8, 8])


@pytest.mark.parametrize("name", [MODEL, FAST])
def test_every_output_of_the_metadata_is_answered_as_it_says(remote, name):
    described = call(remote, "ModelMetadata", METHODS["ModelMetadata"][0](name=name)).outputs
    answer = call(remote, "ModelInfer", inference(VALUES, model=name))
    assert [(found.name, found.datatype) for found in answer.outputs] == [(it.name, it.datatype) for it in described]
    for found, entry in zip(answer.outputs, described, strict=True):
        assert list(found.shape) == [3, *entry.shape[1:]]


FILES = [encoded(image) for image in PIXELS]
FORMS = {
    "FP32": ("fp32_contents", VALUES),
    "FP64": ("fp64_contents", VALUES.astype(np.float64)),
    "UINT8": ("uint_contents", PIXELS[:, None]),
    "INT32": ("int_contents", PIXELS[:, None].astype(np.int32)),
    "INT64": ("int64_contents", PIXELS[:, None].astype(np.int64)),
    "UINT64": ("uint64_contents", PIXELS[:, None].astype(np.uint64)),
    "BYTES": ("bytes_contents", FILES),
}


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "by datatype"])
@pytest.mark.parametrize("datatype", FORMS)
def test_it_gives_the_native_answer_in_every_datatype_and_form(remote, server, datatype, raw):
    field, values = FORMS[datatype]
    shape = [3] if datatype == "BYTES" else list(values.shape)
    message = METHODS["ModelInfer"][0](model_name=MODEL, id="mine")
    message.parameters["seed"].int64_param = 7
    tensor = message.inputs.add(name="anything", datatype=datatype, shape=shape)
    if not raw:
        getattr(tensor.contents, field).extend(values if datatype == "BYTES" else values.ravel().tolist())
    elif datatype == "BYTES":
        message.raw_input_contents.append(b"".join(len(file).to_bytes(4, "little") + file for file in values))
    else:
        message.raw_input_contents.append(values.tobytes())
    answer = call(remote, "ModelInfer", message)
    with server.client() as client:
        native = as_npy("/classify", client, VALUES, seed=7).json()["predictions"]
    unproven = dict.fromkeys(("certified_eps", "certified_margin"), [0.0] * len(native))  # no proof was asked for
    assert predictions(answer) == {name: [one[name] for one in native] for name in native[0]} | unproven
    assert (answer.model_name, answer.model_version, answer.id) == (MODEL, "0.0.1", "mine")
    assert bool(answer.raw_output_contents) is raw
    assert answer.parameters["provider"].string_param == "CPUExecutionProvider"


def test_bool_and_half_precision_are_read(remote):
    ends = PIXELS[:, None] > 127
    message = METHODS["ModelInfer"][0](model_name=FAST)
    message.inputs.add(name="images", datatype="BOOL", shape=ends.shape).contents.bool_contents.extend(ends.ravel())
    as_bool = predictions(call(remote, "ModelInfer", message))
    as_half = predictions(call(remote, "ModelInfer", inference(ends.astype(np.float16), model=FAST, datatype="FP16")))
    assert as_bool == as_half


def test_only_the_outputs_that_are_asked_for_are_answered(remote):
    message = inference(VALUES)
    message.outputs.add(name="agree")
    message.outputs.add(name="label")
    assert list(predictions(call(remote, "ModelInfer", message))) == ["agree", "label"]


def test_the_services_are_described_by_reflection(remote):
    found = ProtoReflectionDescriptorDatabase(remote).get_services()
    assert {SERVICE, "grpc.health.v1.Health"} <= set(found)


# errors


def edited(edit, **options) -> object:
    message = inference(VALUES, **options)
    edit(message)
    return message


REFUSED = {
    "an unknown model": (inference(VALUES, model="other"), "NOT_FOUND", "random-fast (0.0.1) and random (0.0.1)"),
    "an unknown version": (edited(lambda it: setattr(it, "model_version", "9")), "NOT_FOUND", "of version '9'"),
    "a wrong shape": (inference(VALUES[..., :4]), "INVALID_ARGUMENT", "wrong_shape"),
    "NaN": (inference(VALUES * np.nan), "INVALID_ARGUMENT", "not_finite"),
    "an unknown datatype": (inference(VALUES, datatype="FP8"), "INVALID_ARGUMENT", "invalid_tensor: inputs.0.datatype"),
    "too few bytes": (
        edited(lambda it: it.raw_input_contents.__setitem__(0, b"123")),
        "INVALID_ARGUMENT",
        "and 3 were sent",
    ),
    "raw contents without an input": (
        edited(lambda it: it.raw_input_contents.append(b"")),
        "INVALID_ARGUMENT",
        "2 raw_input_contents for 1 inputs",
    ),
    "both kinds of contents": (
        edited(lambda it: it.inputs[0].contents.fp32_contents.append(1)),
        "INVALID_ARGUMENT",
        "both contents and raw_input_contents",
    ),
    "contents of another datatype": (
        edited(lambda it: [it.raw_input_contents.pop(), it.inputs[0].contents.int_contents.append(1)]),
        "INVALID_ARGUMENT",
        "the values of FP32 go into fp32_contents, or into raw_input_contents, not int_contents",
    ),
    "contents of a datatype that has none": (
        edited(lambda it: [it.raw_input_contents.pop(), it.inputs[0].contents.int_contents.append(1)], datatype="FP16"),
        "INVALID_ARGUMENT",
        "'FP16' go into raw_input_contents",
    ),
    "too many values": (
        edited(lambda it: [it.raw_input_contents.pop(), it.inputs[0].contents.fp32_contents.extend([0] * 2**17 + [1])]),
        "INVALID_ARGUMENT",
        "body_too_large: the tensor holds 131073 values",
    ),
    "no input": (METHODS["ModelInfer"][0](model_name=MODEL), "INVALID_ARGUMENT", "invalid_tensor: inputs"),
    "shared memory": (
        edited(lambda it: setattr(it.inputs[0].parameters["shared_memory_region"], "string_param", "x")),
        "INVALID_ARGUMENT",
        "shared_memory_region is not offered",
    ),
    "an unknown output": (edited(lambda it: it.outputs.add(name="x")), "INVALID_ARGUMENT", "unknown_output: 'x'"),
    "a bad option": (inference(VALUES, risk=2.0), "INVALID_ARGUMENT", "invalid_parameter: risk: 2.0 is not allowed"),
    "too large a message": (
        inference(np.zeros((9000, 1, 8, 8), np.float32)),
        "RESOURCE_EXHAUSTED",
        "larger than max (2304",
    ),
}


@pytest.mark.parametrize(("message", "code", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said_by_a_status_code_and_a_message(remote, message, code, part):
    error = refused(remote, "ModelInfer", message, grpc.StatusCode[code])
    assert part in error.details()


@pytest.mark.parametrize("name", ["ModelReady", "ModelMetadata"])
def test_an_unknown_model_is_not_found_by_any_method(remote, name):
    error = refused(remote, name, METHODS[name][0](name="other"), grpc.StatusCode.NOT_FOUND)
    assert "there is no model 'other'" in error.details()


def test_every_error_has_a_status_code():
    assert CODE.keys() == STATUS.keys()


def test_a_method_that_is_not_offered_is_unimplemented(remote):
    infer = remote.unary_unary(f"/{SERVICE}/RepositoryIndex", bytes, bytes)
    with pytest.raises(grpc.RpcError) as caught:
        infer(b"", timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_call_is_counted_and_logged_as_a_request_of_http_is(remote, server):
    before = server.metrics()
    given = (("x-request-id", "mine-1"), ("traceparent", f"00-{'4' * 32}-{'5' * 16}-01"))
    _, ended = method(remote, "ModelInfer").with_call(inference(VALUES), timeout=PATIENCE, metadata=given)
    assert dict(ended.trailing_metadata())["x-request-id"] == "mine-1"
    error = refused(remote, "ModelInfer", inference(VALUES * 2), grpc.StatusCode.INVALID_ARGUMENT)
    answered, refusal = logged(server, "mine-1")[0], logged(server, trailing(error)["x-request-id"])[0]
    told = ("method", "endpoint", "status")
    assert [answered[name] for name in told] == ["gRPC", INFER, 200]
    assert (answered["trace_id"], answered["images"], len(answered["labels"])) == ("4" * 32, 3, 3)
    assert [refusal[name] for name in told] == ["gRPC", INFER, 422]
    assert refusal["error"] == "out_of_range"
    for series in (
        f'carso_requests_total{{endpoint="{INFER}",status="200"}}',
        f'carso_requests_total{{endpoint="{INFER}",status="422"}}',
        'carso_rejections_total{reason="out_of_range"}',
    ):
        assert sample(server.metrics(), series) == sample(before, series) + 1


# keys


def test_keys_open_the_service_and_its_health_needs_none(tmp_path):
    (tmp_path / "keys").write_text(f"team-a: {'a' * 32}\nteam-b: {'b' * 32} rate=1\n")
    settings = {"api_keys_file": tmp_path / "keys", "grpc_port": 0}
    with serving(shared_bundle(SMALL), tmp_path / "log", **settings) as server, channel(server) as connected:
        assert call(connected, "ServerLive").live
        assert call(connected, "ServerReady").ready
        health = health_pb2_grpc.HealthStub(connected)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == SERVING
        for metadata in ((), (("authorization", f"Bearer {'c' * 32}"),)):
            for name, message in (("ModelInfer", inference(VALUES)), ("ServerMetadata", None)):
                error = refused(connected, name, message, grpc.StatusCode.UNAUTHENTICATED, metadata=metadata)
                assert "unauthorized: " in error.details()
        key = (("authorization", f"Bearer {'a' * 32}"),)
        assert call(connected, "ModelInfer", inference(VALUES), metadata=key).outputs
        assert 'carso_caller_requests_total{caller="team-a",status="200"} 1.0' in server.metrics()
        slow = (("authorization", f"Bearer {'b' * 32}"),)
        call(connected, "ModelInfer", inference(VALUES), metadata=slow)
        error = refused(connected, "ModelInfer", inference(VALUES), grpc.StatusCode.RESOURCE_EXHAUSTED, metadata=slow)
        assert int(trailing(error)["retry-after"]) >= 1


# time


def endless(images: np.ndarray) -> object:
    return inference(images, samples=ENDLESS["samples"], risk=0)


def test_the_clients_deadline_ends_the_count_in_time_for_its_answer(busy):
    def in_time() -> dict[str, list[object]]:  # a machine that stands still may miss it
        try:
            return predictions(call(connected, "ModelInfer", endless(FEW), timeout=4))
        except grpc.RpcError as e:
            assert e.code() != grpc.StatusCode.DEADLINE_EXCEEDED
            raise

    with channel(busy) as connected:
        found = eventually(in_time)
        assert not any(found["complete"])
        assert set(found["rule"]) == {"deadline"}
        assert all(votes > 0 for votes in found["votes"])
        sooner = inference(FEW, samples=ENDLESS["samples"], risk=0, deadline_ms=1)
        try:
            met = predictions(call(connected, "ModelInfer", sooner, timeout=PATIENCE))
        except grpc.RpcError as e:
            assert e.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "no vote was cast" in e.details()
        else:  # a machine that casts a vote of each within a millisecond
            assert not any(met["complete"])
            assert all(votes > 0 for votes in met["votes"])


def test_a_call_that_is_cancelled_ends_its_count(busy):
    before = sample(busy.metrics(), 'carso_cancellations_total{reason="client_gone"}')
    with channel(busy) as connected:
        calling = method(connected, "ModelInfer").future(
            endless(BATCH), timeout=PATIENCE, metadata=(("x-request-id", "gone-1"),)
        )
        comes_to(lambda: in_flight(busy), 1)
        calling.cancel()
        comes_to(lambda: in_flight(busy), 0)
    comes_to(lambda: sample(busy.metrics(), 'carso_cancellations_total{reason="client_gone"}'), before + 1)
    (line,) = logged(busy, "gone-1")
    assert (line["status"], line["error"]) == (499, "client_gone")


def test_a_full_queue_refuses_and_says_when_to_come_back(busy):
    with channel(busy) as connected:
        calling = method(connected, "ModelInfer").future(endless(BATCH), timeout=PATIENCE)
        comes_to(lambda: in_flight(busy), 1)
        error = refused(connected, "ModelInfer", endless(BATCH), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "overloaded: " in error.details()
        assert int(trailing(error)["retry-after"]) >= 1
        calling.cancel()
        comes_to(lambda: in_flight(busy), 0)


def test_more_calls_than_are_allowed_are_refused(busy):
    with channel(busy) as connected:
        first, second = (
            method(connected, "ModelInfer").future(endless(images), timeout=PATIENCE) for images in (FEW, FEW)
        )
        comes_to(lambda: in_flight(busy), 2)
        refused(connected, "ServerLive", None, grpc.StatusCode.RESOURCE_EXHAUSTED)
        first.cancel()
        second.cancel()
        comes_to(lambda: in_flight(busy), 0)
        assert eventually(lambda: _live(connected))


def _live(connected: grpc.Channel) -> bool:
    try:
        return call(connected, "ServerLive").live
    except grpc.RpcError:
        return False


# health, and the end


def test_health_is_told_of_the_process_and_of_the_service_and_of_no_other(remote):
    health = health_pb2_grpc.HealthStub(remote)
    for name in ("", SERVICE):
        assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_dead_engine_is_not_ready(tmp_path):
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", failing=True, grpc_port=0) as server,
        channel(server) as connected,
    ):
        health = health_pb2_grpc.HealthStub(connected)
        watched = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
        assert next(watched).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            call(connected, "ModelInfer", inference(VALUES))
        assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        comes_to(lambda: call(connected, "ServerReady").ready, False)
        assert not call(connected, "ServerLive").live
        assert next(watched).status == NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == NOT_SERVING


def test_a_stop_is_told_to_whoever_watches_and_calls_in_flight_are_answered(tmp_path):
    settings = {"drain_delay_s": 3600, "drain_timeout_s": 600}
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", per_second=2000, grpc_port=0, **settings) as server,
        channel(server) as connected,
    ):
        watched = health_pb2_grpc.HealthStub(connected).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert next(watched).status == SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watched).status == NOT_SERVING
        assert call(connected, "ModelInfer", inference(VALUES, model=FAST)).outputs  # the delay goes on
        calling = method(connected, "ModelInfer").future(inference(VALUES, samples=2000, risk=0.0), timeout=PATIENCE)
        comes_to(lambda: in_flight(server), 1)
        server.process.send_signal(signal.SIGTERM)  # which ends the delay
        assert list(watched) == []  # it ends
        assert all(predictions(calling.result())["complete"])
        assert server.leaves() == 0


def test_calls_that_outlast_the_drain_are_told_that_the_service_is_stopping(tmp_path):
    settings = {"drain_timeout_s": 0.5, "max_samples": 100_000, "queue_rows": 64 * 100_001}
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, grpc_port=0, **settings) as server,
        channel(server) as connected,
        ThreadPoolExecutor(1) as pool,
    ):
        calling = pool.submit(
            refused, connected, "ModelInfer", endless(BATCH), grpc.StatusCode.UNAVAILABLE, timeout=PATIENCE
        )
        comes_to(lambda: in_flight(server), 1)
        server.process.terminate()
        assert "not_ready: the service is stopping" in calling.result(PATIENCE).details()
        assert server.leaves() == 0


# the port


@needs_ipv6
def test_both_families_reach_the_service_where_it_listens_everywhere(tmp_path):
    log = tmp_path / "log"
    with listening("::", log, grpc_port=0):
        (everywhere,) = grpc_addresses(log)
        port = everywhere.removeprefix("[::]:")
        for host in ("127.0.0.1", "[::1]"):
            with grpc.insecure_channel(f"{host}:{port}") as connected:
                assert call(connected, "ServerLive").live, host


def test_a_port_that_is_taken_ends_the_start_with_its_address():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = start(bundle=shared_bundle(SMALL), device="cpu", port=0, grpc_port=port)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"carso: cannot listen at 127.0.0.1:{port}: another process listens there")
    assert "CARSO_GRPC_PORT or --grpc-port" in last
    assert "ready" not in ended.stderr.replace(last, "")


def test_http_and_grpc_need_a_port_each():
    ended = start(port=8000, grpc_port=8000)
    assert ended.returncode == 2
    assert ended.stderr.startswith("carso: CARSO_GRPC_PORT: 8000 is not allowed with CARSO_PORT 8000")


def test_several_workers_do_not_speak_grpc():
    ended = start(workers=2, grpc_port=0, device="cpu")
    assert ended.returncode == 2
    assert ended.stderr.startswith("carso: CARSO_GRPC_PORT: 0 is not allowed with several processes")


def test_without_its_libraries_the_start_ends_and_says_how_to_install_them():
    program = "import sys; sys.modules['grpc'] = None; from carso.command import main; main()"
    words = [sys.executable, "-c", program, "serve", "--port", "0", "--grpc-port", "0"]
    variables = environment(bundle=shared_bundle(SMALL), device="cpu")
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 2
    assert "--grpc-port: 0 is not allowed without its libraries" in ended.stderr
    assert "pip install 'carso[grpc]'" in ended.stderr


# other projects' own


@pytest.mark.slow
def test_the_compiled_protocol_is_that_of_its_source(tmp_path):
    folder = ROOT / "service/carso/grpc"
    compiled = tmp_path / "compiled"
    tools = [python_with("grpcio-tools==1.81.1"), "-m", "grpc_tools.protoc"]
    subprocess.run([*tools, "-I", folder, "--descriptor_set_out", compiled, "open_inference.proto"], check=True)
    shipped = FileDescriptorSet.FromString((folder / "open_inference.binpb").read_bytes())
    assert FileDescriptorSet.FromString(compiled.read_bytes()) == shipped


@pytest.mark.slow
def test_tritons_own_client_gets_the_native_answer(server, tmp_path):
    np.save(tmp_path / "images.npy", VALUES)
    for index, file in enumerate(FILES):
        (tmp_path / f"{index}.png").write_bytes(file)
    program = [python_with("tritonclient[grpc]==2.73.0"), ROOT / "tests/clients/triton_grpc.py"]
    ended = subprocess.run([*program, address(server), MODEL, tmp_path], capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    with server.client() as client:
        native = as_npy("/classify", client, VALUES, seed=7).json()["predictions"]
    expected = {name: [prediction[name] for prediction in native] for name in native[0]}
    expected |= dict.fromkeys(("certified_eps", "certified_margin"), [0.0] * len(native))  # no proof was asked for
    answers = json.loads(ended.stdout)
    assert len(answers) == 2
    for answer in answers:
        assert answer == expected
