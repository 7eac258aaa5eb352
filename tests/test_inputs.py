"""Files as people send them, to the bundle that ships, by every way in that takes their format."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from carso import Client, RequestRefused
from carso.settings import REFERENCE_BUNDLE
from PIL import Image

from tests.calls import PATHS, refused
from tests.pictures import npy, saved
from tests.server import Server, serving

INPUTS = Path(__file__).parent / "inputs"
RNG = np.random.default_rng(0)
OK_PNG, OK_NPY = (INPUTS / "ok.png").read_bytes(), (INPUTS / "ok.npy").read_bytes()
DIGIT = np.load(INPUTS / "ok.npy")  # [28, 28] uint8


def photo(width: int, height: int, **options: object) -> bytes:
    """A sheet of paper under a lamp, as a camera sees it."""
    light = np.linspace(150, 230, width)[None] + np.linspace(0, 20, height)[:, None]
    return saved(Image.fromarray(light.astype(np.uint8)).convert("RGB"), "JPEG", **options)


def damaged(data: bytes) -> bytes:
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:middle] + bytes(RNG.integers(0, 255, 300, np.uint8)) + data[middle + 300 :]


def rgba(alpha: np.ndarray, ink: np.ndarray = DIGIT) -> bytes:
    return saved(Image.fromarray(np.dstack([ink, ink, ink, alpha]).astype(np.uint8)))


def of(name: str) -> bytes:
    return (INPUTS / name).read_bytes()


# What each is, its options, and its error; None: it gets the label of ok.png.
AS_OK: dict[str, tuple[bytes, dict[str, object]]] = {
    "ok.png": (OK_PNG, {}),
    "ok.npy": (OK_NPY, {}),
    "bool.npy": (of("bool.npy"), {}),
    "i64.npy": (of("i64.npy"), {}),
    "big-endian 32-bit integers": (npy(DIGIT.astype(">i4")), {}),
    "Fortran order": (npy(np.asfortranarray(DIGIT)), {}),
    "big-endian float64": (npy((DIGIT / 255).astype(">f8")), {}),
    "inv.npy, inverted": (of("inv.npy"), {"invert": True}),
    "inverted.png, inverted": (of("inverted.png"), {"invert": True}),
    "inverted and large": (
        saved(Image.fromarray(255 - np.kron(DIGIT, np.ones((9, 9), np.uint8)))),
        {"resize": True, "invert": True},
    ),
    "a strip, padded": (
        saved(Image.fromarray(np.pad(np.kron(DIGIT, np.ones((4, 4), np.uint8)), ((0, 0), (0, 8))))),
        {"resize": True},
    ),
    "big_icc.png": (of("big_icc.png"), {}),
    "bad_exif.png": (of("bad_exif.png"), {}),
    "no_iend.png": (of("no_iend.png"), {}),
    "no_eoi.jpg": (of("no_eoi.jpg"), {}),
    "bmp32_v5_a0.bmp": (of("bmp32_v5_a0.bmp"), {}),
    "alpha254.png": (of("alpha254.png"), {}),
    "16 bits": (saved(Image.fromarray(DIGIT.astype(np.uint16) * 257)), {}),
    "CMYK": (saved(Image.fromarray(DIGIT).convert("RGB").convert("CMYK"), "JPEG", quality=95), {}),
    "progressive": (saved(Image.fromarray(DIGIT), "JPEG", quality=95, progressive=True), {}),
    "lossless WebP": (saved(Image.fromarray(DIGIT).convert("RGB"), "WEBP", lossless=True), {}),
    "ink on nothing": (rgba(DIGIT, np.zeros_like(DIGIT)), {"background": "white", "invert": True}),
    "white ink on nothing": (rgba(DIGIT, np.full_like(DIGIT, 255)), {"background": "black"}),
}
REFUSED: dict[str, tuple[bytes, dict[str, object], str, str]] = {
    "hwc1.npy": (of("hwc1.npy"), {}, "wrong_shape", "channels last"),
    "hwc3.npy": (of("hwc3.npy"), {}, "wrong_shape", "array.transpose(2, 0, 1)"),
    "flat.npy": (of("flat.npy"), {}, "wrong_shape", "flattened"),
    "ten flat ones": (npy(np.tile(DIGIT.reshape(1, -1), (10, 1))), {}, "wrong_shape", "flattened"),
    "one flat one": (npy(DIGIT.ravel()), {}, "wrong_shape", "flattened"),
    "NHWC": (npy(np.stack([DIGIT] * 3)[..., None]), {}, "wrong_shape", "channels last"),
    "a large array in colour": (npy(np.zeros((56, 40, 3), np.uint8)), {}, "wrong_shape", "channels last"),
    "hwc1.npy, resized": (of("hwc1.npy"), {"resize": True}, "wrong_shape", "channels last"),
    "hwc3.npy, resized": (of("hwc3.npy"), {"resize": True}, "wrong_shape", "channels last"),
    "flat.npy, resized": (of("flat.npy"), {"resize": True}, "wrong_shape", "flattened"),
    "a strip": (npy(np.tile(DIGIT, (1, 4))), {"resize": True}, "wrong_shape", "arrays are not resized"),
    "u8_01.npy": (of("u8_01.npy"), {}, "wrong_scale", "the maximum of a uint8 image is 1"),
    "scaled twice": (npy(DIGIT / np.float32(255) / np.float32(255)), {}, "wrong_scale", "scaled twice"),
    "g12in16.png": (of("g12in16.png"), {}, "wrong_scale", "16-bit"),
    "black.png": (of("black.png"), {}, "blank_image", "the same value"),
    "white.png": (of("white.png"), {}, "blank_image", "the same value"),
    "jpeg_cut30_with_eoi.jpg": (of("jpeg_cut30_with_eoi.jpg"), {}, "undecodable_image", "Corrupt JPEG data"),
    "a damaged photo": (damaged(photo(900, 600)), {"resize": True}, "undecodable_image", "JPEG"),
    "an animation": (
        saved(Image.fromarray(DIGIT), save_all=True, append_images=[Image.fromarray(DIGIT.T)]),
        {},
        "animated_image",
        "2 frames",
    ),
    "a GIF": (saved(Image.fromarray(DIGIT), "GIF"), {}, "undecodable_image", "PNG, JPEG, WebP or BMP"),
    "a truncated WebP": (
        saved(Image.fromarray(DIGIT).convert("RGB"), "WEBP")[:-40],
        {},
        "undecodable_image",
        "send an intact file",
    ),
    "ink on nothing": (rgba(DIGIT, np.zeros_like(DIGIT)), {}, "transparent_image", "background=white"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(REFERENCE_BUNDLE, tmp_path_factory.mktemp("shipped") / "log") as running:
        yield running


def is_array(data: bytes) -> bool:
    return data.startswith(b"\x93NUMPY")


def raw(http: httpx.Client, path: str, data: bytes, options: dict[str, object]) -> httpx.Response:
    kind = "application/x-npy" if is_array(data) else "image/png"  # of images, the bytes decide
    return http.post(path, content=data, headers={"content-type": kind}, params=options)


def as_curl_does(http: httpx.Client, path: str, data: bytes, options: dict[str, object]) -> httpx.Response:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    return http.post(path, content=data, headers=headers, params=options)


def as_json(http: httpx.Client, path: str, data: bytes, options: dict[str, object]) -> httpx.Response:
    return http.post(path, json={"images": [base64.encodebytes(data).decode()], **options})


def as_form(http: httpx.Client, path: str, data: bytes, options: dict[str, object]) -> httpx.Response:
    return http.post(path, files={"upload": ("a.bin", data)}, params=options)


def as_tensor(http: httpx.Client, path: str, data: bytes, options: dict[str, object]) -> httpx.Response:
    """As the Open Inference Protocol has it, in its JSON."""
    if is_array(data):
        array = np.load(io.BytesIO(data))
        kind = {"b": "BOOL", "u": "UINT8", "i": "INT64", "f": "FP64"}[array.dtype.kind]
        entry = {"shape": list(array.shape), "datatype": kind, "data": array.ravel().tolist()}
    else:
        entry = {"shape": [1], "datatype": "BYTES", "data": [base64.urlsafe_b64encode(data).decode()]}
    model = "mnist-conv" if path == "/classify" else "mnist-conv-fast"
    content = {"inputs": [{"name": "images", **entry}], "parameters": options}
    return http.post(f"/v2/models/{model}/infer", json=content)


WAYS = (raw, as_curl_does, as_json, as_form, as_tensor)
FOR_ARRAYS = (raw, as_curl_does, as_tensor)


def ways(data: bytes) -> tuple[Callable[..., httpx.Response], ...]:
    return FOR_ARRAYS if is_array(data) else WAYS


def labels(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    content = answer.json()
    if "outputs" in content:
        return next(output["data"] for output in content["outputs"] if output["name"] == "label")
    return [prediction["label"] for prediction in content["predictions"]]


@pytest.mark.parametrize(("data", "options"), AS_OK.values(), ids=AS_OK)
def test_what_is_the_digit_is_read_as_the_digit_by_every_way_in(server, data, options):
    with server.client() as http:
        for path in PATHS:
            digit = labels(raw(http, path, OK_PNG, {}))
            for way in ways(data):
                assert labels(way(http, path, data, options)) == digit, way.__name__
        with Client(server.url) as client:
            source = np.load(io.BytesIO(data)) if is_array(data) else data
            assert [p.label for p in client.classify(source, **options).predictions] == digit


@pytest.mark.parametrize(("data", "options", "error", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_none_is_refused_by_name_by_every_way_in(server, data, options, error, part):
    status = 400 if error == "undecodable_image" else 422
    with server.client() as http:
        for path in PATHS:
            for way in ways(data):
                answer = way(http, path, data, options)
                if way is as_curl_does and answer.status_code == 415:
                    assert "GIF" in part or data.startswith(b"GIF")  # the bytes tell nothing
                elif way is as_tensor:
                    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (status, error)
                    assert part in answer.json()["message"]
                else:
                    assert part in refused(answer, status, error)
        with Client(server.url) as client, pytest.raises(RequestRefused) as refusal:
            client.classify(np.load(io.BytesIO(data)) if is_array(data) else data, **options)
        assert refusal.value.error == error
        assert part in str(refusal.value)


def test_nested_numbers_are_held_to_their_shape_and_scale_too(server):
    values = DIGIT / 255
    with server.client() as http:
        for path in PATHS:
            digit = labels(raw(http, path, OK_PNG, {}))
            for image in (values, values[None], DIGIT > 127):
                assert labels(http.post(path, json={"images": [image.tolist()]})) == digit
            for image, error in (
                (values[..., None], "wrong_shape"),
                (values.reshape(1, -1), "wrong_shape"),
                (np.kron(values, np.ones((2, 2))), "wrong_shape"),
                (values / 255, "wrong_scale"),
                (values * 0, "blank_image"),
            ):
                for options in ({}, {"resize": True}):
                    refused(http.post(path, json={"images": [image.tolist()], **options}), 422, error)


def test_a_photo_of_12_megapixels_is_read_if_it_may_be_resized(server):
    with server.client() as http:
        for path in PATHS:
            for way in WAYS:
                assert len(labels(way(http, path, photo(4032, 3024), {"resize": True}))) == 1


def test_files_of_a_form_are_answered_in_their_order(server):
    sent = [("image", ("1.png", of("ok.png"))), ("data", ("2.png", of("inverted.png"))), ("x", ("3.png", of("ok.png")))]
    with server.client() as http:
        apart = [labels(raw(http, "/classify/fast", content, {}))[0] for _, (_, content) in sent]
        assert labels(http.post("/classify/fast", files=sent)) == apart


def test_the_command_has_the_same_options(server, tmp_path):
    inverted = tmp_path / "large.png"
    inverted.write_bytes(AS_OK["inverted and large"][0])
    transparent = tmp_path / "transparent.png"
    transparent.write_bytes(AS_OK["ink on nothing"][0])
    with server.client() as http:
        digit = labels(raw(http, "/classify", OK_PNG, {}))
    for file, options in (
        (inverted, ["--resize", "--invert", "--fit", "stretch"]),
        (transparent, ["--background", "white", "--invert", "--fast"]),
    ):
        command = [sys.executable, "-m", "carso.command", "classify", "--json", "--url", server.url, *options, file]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [json.loads(ended.stdout)["label"]] == digit
    command = [sys.executable, "-m", "carso.command", "classify", "--url", server.url, "--resize", INPUTS / "hwc1.npy"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "channels last" in ended.stderr
