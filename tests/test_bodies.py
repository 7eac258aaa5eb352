"""The body of a request -> image sources and options."""

from __future__ import annotations

import base64
import json
from contextlib import suppress

import httpx
import numpy as np
import pytest
from carso.errors import (
    EmptyBatch,
    MissingImages,
    RequestError,
    TooManyImages,
    UndecodableBase64,
    UndecodableJson,
    UndecodableMultipart,
    UnexpectedPart,
    UnsupportedMediaType,
)
from carso.images import bodies
from hypothesis import given
from hypothesis import strategies as st

from tests.pictures import npy

JSON, FORM = "application/json", "multipart/form-data; boundary=frontier"


def parsed(content_type: str, data: bytes) -> bodies.Body:
    return bodies.parse(content_type, data, max_images=4, max_values=2**17)


def multipart(*files: tuple[str, bytes]) -> tuple[str, bytes]:
    files = [(name, ("x.png", content)) for name, content in files]
    request = httpx.Request("POST", "http://test", files=files, headers={"content-type": FORM})  # its own is random
    return request.headers["content-type"], request.read()


@pytest.mark.parametrize(
    "content_type", ["image/png", "IMAGE/PNG", "image/jpeg", "image/jpg", "image/webp", "image/bmp", "image/png; q=1"]
)
def test_a_raw_image_is_one_source(content_type):
    assert parsed(content_type, b"anything").sources == [b"anything"]


@pytest.mark.parametrize("content_type", ["", "text/plain", "image/gif", "image/tiff", "application/octet-stream", "x"])
def test_any_other_media_type_is_refused_with_the_list_of_those_read(content_type):
    with pytest.raises(UnsupportedMediaType, match="application/x-npy"):
        parsed(content_type, b"anything")


def test_an_npy_body_is_one_source():
    (source,) = parsed("application/x-npy", npy(np.eye(3))).sources
    np.testing.assert_array_equal(source, np.eye(3))


@given(st.lists(st.binary(max_size=50) | st.lists(st.floats(0, 1), max_size=3), min_size=1, max_size=4), st.booleans())
def test_json_images_are_numbers_or_base64_with_or_without_a_data_url(images, data_url):
    prefix = "data:image/png;base64," if data_url else ""
    sent = [prefix + base64.b64encode(i).decode() if isinstance(i, bytes) else i for i in images]
    body = parsed(JSON, json.dumps({"images": sent, "seed": 3}).encode())
    assert body.sources == images
    assert body.options == {"seed": 3}


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (b"", UndecodableJson),
        (b"{", UndecodableJson),
        (b'{"images": [1,]}', UndecodableJson),
        (b'{"images": ["\xff"]}', UndecodableJson),
        (b"[" * 100_000, UndecodableJson),
        (b"[]", MissingImages),
        (b"null", MissingImages),
        (b"{}", MissingImages),
        (b'{"images": "iVBORw0KGgo="}', MissingImages),
        (b'{"images": {}}', MissingImages),
        (b'{"images": []}', EmptyBatch),
        (b'{"images": [0, 0, 0, 0, 0]}', TooManyImages),
        (b'{"images": ["not base64!"]}', UndecodableBase64),
        (b'{"images": ["iVBORw0KGg"]}', UndecodableBase64),
        ('{"images": ["é"]}'.encode(), UndecodableBase64),
    ],
)
def test_a_json_body_without_images_is_refused_by_name(body, refusal):
    with pytest.raises(refusal):
        parsed(JSON, body)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: json.dumps({"images": [text]}).encode()))
def test_any_json_body_is_parsed_or_refused(data):
    with suppress(RequestError):
        parsed(JSON, data)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_the_files_of_a_multipart_body_come_out_as_they_went_in(contents):
    assert parsed(*multipart(*[("file", content) for content in contents])).sources == contents


@given(st.binary(max_size=100), st.integers(5, 10_000))
def test_a_truncated_multipart_body_is_refused_wherever_it_is_cut(content, missing):
    content_type, data = multipart(("file", content))
    with pytest.raises(UndecodableMultipart):
        parsed(content_type, data[: max(len(data) - missing, 0)])


@pytest.mark.parametrize(
    ("content_type", "body", "refusal"),
    [
        ("multipart/form-data", b"", UndecodableMultipart),
        (FORM, b"", UndecodableMultipart),
        (FORM, b"no boundary", UndecodableMultipart),
        ("multipart/form-data; boundary=" + "x" * 500, b"--", UndecodableMultipart),
        (*multipart(("image", b"x")), UnexpectedPart),
        (*multipart(("file", b"x"), ("samples", b"10")), UnexpectedPart),
        (*multipart(*[("file", b"x")] * 5), TooManyImages),
        (FORM, b"--frontier\r\n\r\nx\r\n--frontier--\r\n", UnexpectedPart),
    ],
)
def test_a_multipart_body_without_files_is_refused_by_name(content_type, body, refusal):
    with pytest.raises(refusal):
        parsed(content_type, body)


@given(st.lists(st.sampled_from([b"--frontier", b"--", b"\r\n", b"a", b": ", b'name="file"', b"\x00"]), max_size=20))
def test_any_multipart_body_is_parsed_or_refused(pieces):
    with suppress(RequestError):
        parsed(FORM, b'--frontier\r\nContent-Disposition: form-data; name="file"\r\n' + b"".join(pieces))
