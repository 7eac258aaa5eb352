"""The body of a request -> image sources and options."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from carso.api import tensors
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
from carso.images.media_types import UNSAID
from hypothesis import given
from hypothesis import strategies as st

from tests.pictures import encoded, npy

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
FIELD = b'--frontier\r\ncontent-disposition: form-data; name="file"\r\n\r\n10\r\n--frontier--\r\n'
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


@pytest.mark.parametrize("content_type", ["text/plain", "image/gif", "image/tiff", "x", *UNSAID])
def test_any_other_media_type_is_refused_with_the_list_of_those_read(content_type):
    for data in (b"anything", b"", b"image=iVBORw0KGgo", b"GIF89a"):
        with pytest.raises(UnsupportedMediaType, match="application/x-npy"):
            parsed(content_type, data)


@pytest.mark.parametrize("content_type", [*UNSAID, "application/x-www-form-urlencoded; charset=utf-8"])
def test_where_nothing_is_said_of_the_body_its_bytes_decide(content_type):
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        image = encoded(np.zeros((8, 8), np.uint8), kind)
        assert parsed(content_type, image).sources == [image]
    np.testing.assert_array_equal(parsed(content_type, npy(np.eye(3))).sources[0], np.eye(3))
    for text in ('{"images": [[1]]}', '\n  {"images": [[1]]}'):
        for encoding in ENCODINGS:
            assert parsed(content_type, text.encode(encoding)).sources == [[1]]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_read_in_every_encoding_of_unicode_with_or_without_a_byte_order_mark(encoding):
    body = '{"images": [[0.5, 1]], "\u00e9": "\u2c2c"}'
    assert parsed(JSON, body.encode(encoding)) == bodies.Body([[0.5, 1]], {"\u00e9": "\u2c2c"})


@given(st.binary(max_size=60), st.sampled_from(ENCODINGS))
def test_any_bytes_are_json_or_refused_in_every_encoding(data, encoding):
    with suppress(RequestError):
        parsed(JSON, "{".encode(encoding) + data)


BASE64 = {
    "plain": lambda data: base64.b64encode(data).decode(),
    "with line breaks": lambda data: base64.encodebytes(data).decode(),
    "with Windows' line breaks": lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    "URL-safe": lambda data: base64.urlsafe_b64encode(data).decode(),
    "unpadded": lambda data: base64.b64encode(data).decode().rstrip("="),
    "URL-safe and unpadded": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    "data URL": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    "data URL with parameters": lambda data: (
        "data:image/png;charset=utf-8;name=a%20b.png;base64," + base64.b64encode(data).decode()
    ),
    "data URL without a type": lambda data: "DATA:;BASE64," + base64.b64encode(data).decode(),
    "data URL, escaped": lambda data: "data:image/png;base64," + quote(base64.b64encode(data).decode(), safe=""),
    "data URL with line breaks": lambda data: "data:image/png;base64,\n" + base64.encodebytes(data).decode(),
}


@pytest.mark.parametrize("write", BASE64.values(), ids=BASE64)
@given(st.binary(max_size=200))
def test_base64_is_read_however_it_is_written_in_json_and_in_tensors(write, data):
    assert parsed(JSON, json.dumps({"images": [write(data)]}).encode()).sources == [data]
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [write(data)]}
    _, sources = tensors.parse(json.dumps({"inputs": [tensor]}).encode(), None, max_images=4, max_values=2**17)
    assert sources == [data]


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
        (b'{"images": ["iVBORw0KG"]}', UndecodableBase64),
        (b'{"images": ["data:image/svg+xml,<svg/>"]}', UndecodableBase64),
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


def test_a_file_is_an_image_under_any_name_of_its_field_in_order():
    sent = [("image", b"a"), ("data", b"b"), ("file", b"c"), ("upload[]", b"d")]
    assert parsed(*multipart(*sent)).sources == [b"a", b"b", b"c", b"d"]
    assert parsed(FORM, FIELD).sources == [b"10"]
    for filename in (b'filename=""', b"filename*=utf-8''%C3%A9.png"):
        named = FIELD.replace(b'name="file"', b'name="x"; ' + filename)
        assert parsed(FORM, named).sources == [b"10"]


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
        (FORM, FIELD.replace(b"file", b"samples"), UnexpectedPart),
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
