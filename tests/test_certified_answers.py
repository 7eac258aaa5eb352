"""Answers with a proof, through the service: both paths, batches, tensors, the client, the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from carso import Client, FastFrame, RequestRefused, RobustFrame
from carso.api.answers import FastPrediction, RobustPrediction
from carso.bundle import Bundle
from carso.command import command_line
from carso.inference.certificate import STEPS
from carso.inference.sessions import Sessions
from typer.testing import CliRunner

from tests.bundles import SMALL, random_images, shared_bundle
from tests.calls import as_npy, refused, sample
from tests.duplex import streaming
from tests.server import Server, serving
from tests.test_certificate import without_bounds
from tests.test_settings import start

EPS = 2.0**-10  # random networks are steep: some images are proven within it, and some are not
IMAGES = random_images(24, SMALL, seed=11)


@pytest.fixture(scope="module")
def proven() -> np.ndarray:
    """Which of IMAGES are proven, by the sessions themselves."""
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1)
    found = sessions.first_pass_with_bounds(IMAGES, np.full(len(IMAGES), EPS, np.float32)).margins > 0
    assert 3 < found.sum() < len(IMAGES) - 3
    return found


def value(client: httpx.Client, name: str) -> float:
    return sample(client.get("/metrics").text, name)


def ask(client: httpx.Client, path: str, images: np.ndarray = IMAGES, **options: object) -> list[dict]:
    response = as_npy(path, client, images, **options)
    assert response.status_code == 200, response.text
    predictions = response.json()["predictions"]
    model = FastPrediction if path.endswith("fast") else RobustPrediction
    for prediction in predictions:
        model.model_validate(prediction)
    return predictions


@pytest.mark.parametrize("path", ["/classify", "/classify/fast"])
def test_nobody_who_does_not_ask_is_told_of_proofs(client, path):
    for options in ({}, {"certify": "off"}):
        assert not {"certified", "decided_by"} & ask(client, path, **options)[0].keys()


@pytest.mark.parametrize("path", ["/classify", "/classify/fast"])
@pytest.mark.parametrize("mode", ["report", "decide"])
def test_each_image_of_a_batch_says_what_is_proven_of_it(client, proven, path, mode):
    predictions = ask(client, path, certify=mode, certify_eps=EPS)
    assert [prediction["certified"] is not None for prediction in predictions] == proven.tolist()
    for prediction in predictions:
        assert prediction["certified"] is None or prediction["certified"]["eps"] == EPS
        assert prediction["certified"] is None or prediction["certified"]["margin"] > 0


def test_a_report_changes_nothing_of_the_vote(client):
    plain = ask(client, "/classify", seed=5)
    for prediction, before in zip(ask(client, "/classify", seed=5, certify="report"), plain, strict=True):
        assert prediction.pop("decided_by") == "vote"
        del prediction["certified"]
        assert prediction == before


def test_a_certificate_decides_with_the_first_passs_label_and_without_a_vote(client, proven):
    fast = ask(client, "/classify/fast")
    voted = ask(client, "/classify", seed=5)
    for index, found in enumerate(ask(client, "/classify", seed=5, certify="decide", certify_eps=EPS)):
        if proven[index]:
            assert found["label"] == found["fast_label"] == fast[index]["label"] and found["agree"]
            assert (found["decided_by"], found["rule"], found["complete"]) == ("certificate", "certificate", True)
            assert (found["votes"], found["share"], sum(found["tally"]), found["risk_reached"]) == (0, 0.0, 0, 1.0)
        else:
            assert found["decided_by"] == "vote"
            for name in ("label", "tally", "votes", "rule", "seed"):
                assert found[name] == voted[index][name]
        assert isinstance(found["typical"], bool)  # a certificate does not say what is in the image


def test_a_batch_of_which_every_image_is_decided_is_answered_without_a_round(server, client, proven):
    before = value(client, 'carso_votes_saved_total{reason="certificate"}')
    rounds = value(client, "carso_rounds_total")
    images = IMAGES[proven]
    found = ask(client, "/classify", images, certify="decide", certify_eps=EPS, samples=1000, deadline_ms=600_000)
    assert all(prediction["decided_by"] == "certificate" for prediction in found)
    assert value(client, 'carso_votes_saved_total{reason="certificate"}') == before + 1000 * len(images)
    assert value(client, "carso_rounds_total") == rounds
    assert value(client, 'carso_queue_rows{path="robust"}') == 0


@pytest.mark.parametrize("path", ["/classify", "/classify/fast"])
def test_max_finds_an_eps_that_is_proven_and_whose_next_step_is_not(client, path):
    faint = IMAGES[:4]
    for image, found in zip(faint, ask(client, path, faint, certify="max"), strict=True):
        step = 0 if found["certified"] is None else round(found["certified"]["eps"] * STEPS)
        for tried, expected in ((step, step > 0), (step + 1, False)):
            if tried:
                (again,) = ask(client, path, image[None], certify="report", certify_eps=tried / STEPS)
                assert (again["certified"] is not None) == expected
        if path == "/classify":
            assert found["decided_by"] == "vote" and found["votes"] > 0


def test_options_may_stand_in_the_body_too(client):
    body = {"images": IMAGES[:1].tolist(), "certify": "report", "certify_eps": 0.25}
    answer = client.post("/classify", json=body).json()
    assert answer["predictions"][0]["decided_by"] == "vote"
    assert (answer["options"]["certify"], answer["options"]["certify_eps"]) == ("report", 0.25)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"certify": "always"}, "certify: 'always' is not allowed; it must be one of off, report, decide, max"),
        ({"certify_eps": 0}, "certify_eps: '0' is not allowed; it must be a number"),
        ({"certify_eps": 1.5}, "certify_eps: '1.5' is not allowed; it must be a number"),
    ],
)
def test_options_outside_their_range_are_refused_by_name(client, options, why):
    for path in ("/classify", "/classify/fast"):
        assert why in refused(as_npy(path, client, IMAGES[:1], **options), 422, "invalid_parameter")


def test_the_metrics_count_what_is_proven_and_no_agreement_that_nobody_voted_on(client, proven):
    def counted() -> list[float]:
        series = ('certified_images_total{certified="true",path="robust"}', 'path_agreement_total{agree="true"}')
        return [value(client, f"carso_{name}") for name in series]

    before = counted()
    ask(client, "/classify", IMAGES[proven], certify="decide", certify_eps=EPS)
    certified, agreed = counted()
    assert (certified - before[0], agreed - before[1]) == (proven.sum(), 0)


def test_proven_images_are_no_evidence_of_an_attack(client, proven):
    """They lower it: the rest of the clean images disagree more often than all of them."""
    ask(client, "/classify", IMAGES[proven], certify="decide", certify_eps=EPS)
    before = value(client, "carso_attack_evidence")
    ask(client, "/classify", IMAGES[proven], certify="decide", certify_eps=EPS)
    assert value(client, "carso_attack_evidence") < before


@pytest.mark.parametrize("model", ["random", "random-fast"])
def test_the_open_inference_protocol_has_a_proof_as_tensors(client, proven, model):
    tensor = {"name": "images", "datatype": "FP32", "shape": list(IMAGES.shape), "data": IMAGES.ravel().tolist()}
    body = {"inputs": [tensor], "parameters": {"certify": "report", "certify_eps": EPS}}
    answer = client.post(f"/v2/models/{model}/infer", json=body).json()
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["certified_eps"]["datatype"] == "FP64"
    assert outputs["certified_eps"]["data"] == np.where(proven, EPS, 0.0).tolist()
    assert (np.array(outputs["certified_margin"]["data"]) > 0).tolist() == proven.tolist()
    plain = client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]}).json()["outputs"]
    assert not any(next(output["data"] for output in plain if output["name"] == "certified_eps"))


def test_both_answers_to_a_frame_of_a_stream_say_what_is_proven(server, proven):
    one_of_each = IMAGES[proven.argmax()], IMAGES[proven.argmin()]
    with streaming(server, rate=1, certify="decide", certify_eps=EPS) as stream:
        for image, decided_by in zip(one_of_each, ("certificate", "vote"), strict=True):
            stream.send(image.tolist())
            fast, robust = stream.line()["prediction"], stream.line()["prediction"]
            assert robust["decided_by"] == decided_by
            assert [found["certified"] is not None for found in (fast, robust)] == 2 * [decided_by == "certificate"]
            assert (robust["votes"] == 0) == (decided_by == "certificate")


@pytest.mark.parametrize(("mode", "eps"), [("report", EPS), ("decide", EPS), ("max", 1)])
def test_a_stream_may_look_twice_at_what_is_not_proven_at_its_eps_and_at_nothing_else(server, proven, mode, eps):
    doubtful = ~proven | (eps == 1)  # nothing is proven so far
    with Client(server.url) as client:
        answers = list(client.stream(IMAGES, rate=0, uncertified=True, certify=mode, certify_eps=eps))
    fast = {answer.id: answer for answer in answers if isinstance(answer, FastFrame)}
    assert [answer.counted for answer in fast.values()] == doubtful.tolist()
    assert {answer.id for answer in answers if isinstance(answer, RobustFrame)} == set(np.flatnonzero(doubtful))
    assert {answer.chosen for answer in fast.values() if answer.counted} == {("uncertified",)}


# --- the client and the commands --------------------------------------------------------------------------------------


def test_the_client_returns_the_proof(server, proven):
    with Client(server.url) as client:
        robust = client.classify(IMAGES, certify="decide", certify_eps=EPS).predictions
        fast = client.classify_fast(IMAGES, certify="report", certify_eps=EPS).predictions
        (plain,) = client.classify(IMAGES[0]).predictions
    assert [p.certified is not None for p in robust] == [p.certified is not None for p in fast] == proven.tolist()
    assert [p.decided_by == "certificate" for p in robust] == proven.tolist()
    assert (plain.certified, plain.decided_by) == (None, None)


def carso(server: Server, *arguments: object):
    return CliRunner().invoke(command_line(), list(map(str, arguments)), env={"CARSO_URL": server.url})


def test_the_table_of_carso_classify_has_a_column_for_it(server, proven, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    shown = carso(server, "classify", tmp_path / "images.npy", "--certify", "decide", "--certify-eps", EPS)
    assert shown.exit_code == 0, shown.stderr
    heads, *rows = shown.stdout.splitlines()
    assert heads.endswith("proven within")
    assert [not row.endswith("-") for row in rows] == proven.tolist()
    plain = carso(server, "classify", tmp_path / "images.npy", "--fast")
    assert "proven" not in plain.stdout


@pytest.mark.parametrize("by", ["bundle", "service"])
@pytest.mark.parametrize("mode", ["report", "decide"])
def test_carso_verify_proves_again(server, client, proven, tmp_path, by, mode):
    image = IMAGES[proven][0]
    np.save(tmp_path / "image.npy", image)
    answer = as_npy("/classify", client, image[None], certify=mode, certify_eps=EPS).json()
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    where = ("--url", server.url) if by == "service" else ("--bundle", shared_bundle(SMALL))
    verified = carso(server, "verify", tmp_path / "answer.json", tmp_path / "image.npy", *where)
    assert verified.exit_code == 0, verified.output
    assert f"proven within {EPS:g}: the same" in verified.stdout

    answer["predictions"][0]["certified"]["eps"] = 0.4
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    forged = carso(server, "verify", tmp_path / "answer.json", tmp_path / "image.npy", *where)
    assert forged.exit_code == 1
    assert "NOT the same" in forged.stdout and "certified 0.4, counted None" in forged.stdout


# --- what an operator sets --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deciding_server(tmp_path_factory) -> Iterator[Server]:
    """A service that proves by default, and tells labels only."""
    log = tmp_path_factory.mktemp("deciding") / "log"
    with serving(shared_bundle(SMALL), log, certify="decide", certify_eps=EPS, evidence="label") as server:
        yield server


@pytest.fixture(scope="module")
def deciding(deciding_server) -> Iterator[httpx.Client]:
    with deciding_server.client() as connected:
        yield connected


def test_the_ratio_counts_each_image_once_of_which_a_proof_was_asked_at_the_services_eps(
    deciding_server, deciding, proven
):
    def counted(certified: str) -> float:
        paths = ("fast", "robust")
        series = (f'carso_certified_images_total{{certified="{certified}",path="{path}"}}' for path in paths)
        return sum(value(deciding, each) for each in series)

    with_proof, without = counted("true"), counted("false")
    frames = [*np.flatnonzero(proven)[:3], *np.flatnonzero(~proven)[:3]]
    with streaming(deciding_server, rate=0, uncertified=True) as stream:
        for frame in frames:
            stream.send(IMAGES[frame].tolist())
            assert stream.line()["path"] == "fast"
            assert proven[frame] or stream.line()["path"] == "robust"  # these are answered twice
    for options in ({"certify": "max"}, {"certify_eps": 1.0}):  # not what the service asks for
        assert as_npy("/classify/fast", deciding, IMAGES, **options).status_code == 200
    expected = (with_proof + 3) / (with_proof + without + 6)
    assert value(deciding, "carso_certified_ratio") == pytest.approx(expected)


def test_the_operators_default_holds_where_a_request_does_not_say_and_info_tells_it(deciding, proven):
    before = value(deciding, 'carso_elections_total{rule="certificate"}')
    as_npy("/classify", deciding, IMAGES)
    assert value(deciding, 'carso_elections_total{rule="certificate"}') == before + proven.sum()
    as_npy("/classify", deciding, IMAGES, certify="off")
    assert value(deciding, 'carso_elections_total{rule="certificate"}') == before + proven.sum()
    limits = deciding.get("/info").json()["limits"]
    assert (limits["certify"], limits["certify_eps"]) == ("decide", EPS)


def test_withheld_evidence_includes_the_proof(deciding):
    for path in ("/classify", "/classify/fast"):
        (prediction,) = as_npy(path, deciding, IMAGES[:1]).json()["predictions"]
        assert not {"certified", "decided_by"} & prediction.keys()
    outputs = deciding.get("/v2/models/random").json()["outputs"]
    assert not [output for output in outputs if output["name"].startswith("certified")]


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Iterator[tuple[httpx.Client, str]]:
    """A service over a bundle of an earlier release, and the bundle's folder."""
    folder = tmp_path_factory.mktemp("older")
    bundle = without_bounds(folder)
    with serving(bundle, folder / "log") as server, server.client() as connected:
        yield connected, str(bundle)


def test_an_older_bundle_answers_as_ever_and_refuses_proofs_with_the_way_to_get_them(older):
    client, folder = older
    for path in ("/classify", "/classify/fast"):
        assert as_npy(path, client, IMAGES[:2]).status_code == 200
        message = refused(as_npy(path, client, IMAGES[:2], certify="report"), 422, "cannot_certify")
        assert f"add it with `carso-train bounds {folder}`" in message
    info = client.get("/info").json()
    assert not info["certifies"] and info["certificate"].startswith("None can be given: bundle random has no ")
    refused(client.post("/classify/stream", params={"certify": "report"}), 422, "cannot_certify")
    outputs = client.get("/v2/models/random").json()["outputs"]
    assert not [output for output in outputs if output["name"].startswith("certified")]
    with Client(str(client.base_url)) as connected, pytest.raises(RequestRefused, match="cannot_certify"):
        connected.classify(IMAGES[:1], certify="decide")


def test_a_default_that_the_bundle_cannot_serve_ends_the_start(tmp_path):
    ended = start("--certify", "report", bundle=without_bounds(tmp_path))
    assert ended.returncode == 2
    assert "--certify: report is not allowed here; it must be off: bundle random has no" in ended.stderr


# --- what the words say -----------------------------------------------------------------------------------------------

CLAIMS = ("every image which differs from the one sent by at most eps in every value", "the first pass")
LIMITS = ("does not prove that the label is right", "says nothing of the vote, of other changes or of a larger eps")


def test_the_words_say_what_is_proven_and_what_is_not(client):
    info = client.get("/info").json()
    assert info["certifies"]
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    fields = [
        s["properties"]["certified"]["description"] for s in schemas.values() if "certified" in s.get("properties", ())
    ]
    assert len(fields) >= 2
    for text in (info["certificate"], *fields):
        for part in (*CLAIMS, *LIMITS):
            assert part in text
    parameters = document["paths"]["/classify"]["post"]["parameters"]
    (option,) = [parameter for parameter in parameters if parameter["name"] == "certify"]
    assert "does not prove that the label is right, and says nothing of the vote" in option["description"]
