"""What is refused, each by its name, and what the OpenAPI document says of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.calls import COLOUR_PNG, PATHS, PNG, VALUES, refused
from tests.pictures import encoded, npy, saved

SHAPE = (1, 8, 8)
REFUSALS = [
    ("image/png", PNG[:-30], 400, "undecodable_image"),
    ("image/png", b"", 400, "undecodable_image"),
    ("image/png", saved(Image.new("L", (8, 8)), "GIF"), 400, "undecodable_image"),
    ("application/json", b'{"images": [', 400, "undecodable_json"),
    ("application/json", b'{"images": ["@"]}', 400, "undecodable_base64"),
    ("application/json", json.dumps({"images": ["aGVsbG8="]}).encode(), 400, "undecodable_image"),
    ("application/x-npy", npy(VALUES)[:-1], 400, "undecodable_npy"),
    ("multipart/form-data; boundary=x", b"--x\r\n", 400, "undecodable_multipart"),
    ("text/plain", PNG, 415, "unsupported_media_type"),
    ("image/gif", PNG, 415, "unsupported_media_type"),
    ("application/x-npy", npy(np.zeros((65, 8, 8), np.float32)), 413, "too_many_images"),
    ("application/json", json.dumps({"images": [0] * 65}).encode(), 413, "too_many_images"),
    ("image/png", encoded(np.zeros((4200, 4200), bool)), 413, "too_many_pixels"),
    ("image/png", encoded(np.zeros((9, 8), np.uint8)), 422, "wrong_shape"),
    ("application/x-npy", npy(np.zeros((2, 2, 8, 8), np.float32)), 422, "wrong_shape"),
    ("application/x-npy", npy(np.full(SHAPE, np.nan)), 422, "not_finite"),
    ("application/x-npy", npy(np.full(SHAPE, np.inf)), 422, "not_finite"),
    ("application/json", json.dumps({"images": [[[float("nan")] * 8] * 8]}).encode(), 422, "not_finite"),
    ("application/x-npy", npy(np.full(SHAPE, 1.5)), 422, "out_of_range"),
    ("application/x-npy", npy(np.full(SHAPE, -0.1)), 422, "out_of_range"),
    ("application/x-npy", npy(np.zeros((0, 8, 8))), 422, "empty_batch"),
    ("application/json", b'{"images": []}', 422, "empty_batch"),
    ("application/json", b'{"images": [[[0, 0], [0]]]}', 422, "ragged_array"),
    ("application/json", b'{"images": [[["a", "b"]]]}', 422, "not_numbers"),
    ("application/json", b'{"images": [null]}', 422, "not_numbers"),
    ("application/json", b'{"images": 3}', 422, "missing_images"),
    ("application/json", b"{}", 422, "missing_images"),
    ("application/json", b'{"images": [[[0]]], "sample": 3}', 422, "unknown_parameter"),
    ("application/x-npy", npy(np.array([None])), 422, "object_array"),
    ("application/x-npy", npy(np.zeros(SHAPE, np.complex64)), 422, "unsupported_dtype"),
    ("application/x-npy", npy(np.zeros((8, 8, 1), np.uint8)), 422, "wrong_shape"),
    ("application/x-npy", npy(np.eye(8, dtype=np.uint8)), 422, "wrong_scale"),
    ("application/json", json.dumps({"images": [[[0.5] * 8] * 8]}).encode(), 422, "blank_image"),
    ("image/png", saved(Image.new("LA", (8, 8), (0, 0))), 422, "transparent_image"),
    (
        "image/png",
        saved(Image.new("L", (8, 8)), save_all=True, append_images=[Image.new("L", (8, 8), 9)]),
        422,
        "animated_image",
    ),
    (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--x--\r\n',
        422,
        "unexpected_part",
    ),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("content_type", "body", "status", "error"), REFUSALS)
def test_what_cannot_be_classified_is_refused_by_name(client, path, content_type, body, status, error):
    response = client.post(path, content=body, headers={"content-type": content_type})
    assert refused(response, status, error)


def test_a_body_without_a_media_type_is_refused_if_its_bytes_do_not_tell(client):
    message = refused(client.post("/classify", content=b"digit"), 415, "unsupported_media_type")
    assert "image/png" in message and "application/json" in message


@pytest.mark.parametrize(
    ("path", "query", "error"),
    [
        ("/classify", "samples=0", "invalid_parameter"),
        ("/classify", "samples=100001", "invalid_parameter"),
        ("/classify", "seed=-1", "invalid_parameter"),
        ("/classify", "risk=0.6", "invalid_parameter"),
        ("/classify", "deadline_ms=600001", "invalid_parameter"),
        ("/classify", "resize=2", "invalid_parameter"),
        ("/classify", "sample=3", "unknown_parameter"),
        ("/classify", "seed=1&seed=2", "conflicting_parameters"),
        ("/classify/fast", "samples=3", "unknown_parameter"),
        ("/classify/fast", "seed=3", "unknown_parameter"),
        ("/classify/fast", "risk=0", "unknown_parameter"),
        ("/classify/fast", "deadline_ms=3", "unknown_parameter"),
    ],
)
def test_a_bad_option_is_refused_with_its_name(client, path, query, error):
    response = client.post(f"{path}?{query}", content=PNG, headers={"content-type": "image/png"})
    assert query.partition("=")[0] in refused(response, 422, error)


def test_a_seed_is_refused_where_the_operator_keeps_it(strict_client):
    response = strict_client.post("/classify?seed=1", content=COLOUR_PNG, headers={"content-type": "image/png"})
    assert "seed" in refused(response, 403, "seed_refused")


def test_paths_and_methods_that_are_not_there_are_refused_in_the_same_shape(client):
    refused(client.get("/nothing"), 404, "not_found")
    response = client.get("/classify")
    assert "POST" in refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


# the OpenAPI document


@pytest.fixture
def document(client) -> dict:
    return client.get("/openapi.json").json()


@pytest.mark.parametrize("path", PATHS)
def test_the_document_lists_every_body_that_is_read(client, document, path):
    content = document["paths"][path]["post"]["requestBody"]["content"]
    assert set(content) == set(client.get("/info").json()["media_types"])


@pytest.mark.parametrize("path", PATHS)
def test_the_document_lists_every_option_with_its_range(document, path):
    options = {p["name"]: p["schema"] for p in document["paths"][path]["post"]["parameters"]}
    assert options["resize"] == options["invert"] == {"type": "boolean", "default": False}
    assert options["fit"] == {"type": "string", "enum": ["pad", "stretch"], "default": "pad"}
    assert options["background"]["anyOf"][0] == {"enum": ["black", "white"]}
    if path == "/classify":
        assert options["samples"] == {"type": "integer", "minimum": 1, "maximum": 100_000, "default": 1500}
        assert options["seed"] == {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}
        assert options["deadline_ms"] == {"type": "integer", "minimum": 1, "maximum": 600_000}
        assert options["risk"]["default"] == 1e-3
    else:
        assert list(options) == ["resize", "fit", "invert", "background", "certify", "certify_eps"]


@pytest.mark.parametrize(("content_type", "body", "status", "error"), REFUSALS)
def test_the_document_names_every_error(document, content_type, body, status, error):
    for path in PATHS:
        response = document["paths"][path]["post"]["responses"][str(status)]
        assert f"`{error}`" in response["description"]
        assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}


def test_the_fast_path_documents_no_error_of_the_vote(document):
    assert {"403", "504"} <= set(document["paths"]["/classify"]["post"]["responses"])
    assert not {"403", "504"} & set(document["paths"]["/classify/fast"]["post"]["responses"])


def test_the_document_tells_of_the_headers_of_every_answer(document):
    headers = document["components"]["headers"]
    assert headers.keys() == {"X-Request-ID", "Retry-After"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                told = {"X-Request-ID", "Retry-After"} if status in ("429", "503") else {"X-Request-ID"}
                assert response["headers"].keys() == told, (path, status)


def test_operations_are_named_after_their_paths(document):
    named = {op["operationId"]: path for path, operations in document["paths"].items() for op in operations.values()}
    assert len(named) == sum(map(len, document["paths"].values()))
    assert all(name.isidentifier() for name in named)
    assert named["classify"] == "/classify"
    assert named["classify_fast"] == "/classify/fast"
    assert named["v2_models_random_fast_infer"] == "/v2/models/random-fast/infer"
