"""Streams by the Python client, against a real server."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from carso import (
    AsyncClient,
    Client,
    FastFrame,
    Frame,
    FrameError,
    RequestRefused,
    RobustFrame,
    Unavailable,
    UnexpectedAnswer,
)
from carso.client.images import json_of

from tests.bundles import SMALL, shared_bundle
from tests.calls import PIXELS, PNG, VALUES
from tests.server import serving, silent_port, url_of

KEY = "k" * 32


def test_every_frame_gets_its_fast_answer_in_order_and_the_counted_ones_the_robust_answer(server):
    with Client(server.url) as client:
        answers = list(client.stream([PNG] * 10, rate=0.5))
    fast = [answer for answer in answers if isinstance(answer, FastFrame)]
    robust = [answer for answer in answers if isinstance(answer, RobustFrame)]
    assert [answer.id for answer in fast] == list(range(10))
    assert sorted(answer.id for answer in robust) == [answer.id for answer in fast if answer.counted]
    assert all(answer.prediction.fast_label == fast[answer.id].prediction.label for answer in robust)


def test_a_frame_may_depend_on_the_answer_to_the_last_one(server):
    answered = threading.Semaphore(0)

    def frames():
        for number in range(5):
            yield Frame(PNG, id=f"frame {number}")
            assert answered.acquire(timeout=60)

    seen = []
    with Client(server.url) as client:
        for answer in client.stream(frames(), rate=0):
            seen.append(answer.id)
            answered.release()
    assert seen == [f"frame {number}" for number in range(5)]


async def test_the_asynchronous_client_takes_frames_while_it_reads(server):
    waiting: asyncio.Queue[int] = asyncio.Queue()
    waiting.put_nowait(0)

    async def frames():
        for _ in range(5):
            yield Frame(PNG, id=await waiting.get())

    async with AsyncClient(server.url) as client:
        seen = []
        async for answer in client.stream(frames(), rate=0):
            seen.append(answer.id)
            waiting.put_nowait(answer.id + 1)
    assert seen == [0, 1, 2, 3, 4]


def test_images_of_all_kinds_are_frames(server, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(PNG)
    images = [PNG, bytearray(PNG), file, str(file), PIXELS[0], PIXELS[0][None], VALUES[0], VALUES[0, 0]]
    with Client(server.url) as client:
        labels = {answer.prediction.label for answer in client.stream(images, rate=0)}
        (alone,) = client.classify_fast(PNG).predictions
    assert labels == {alone.label}


def test_pixels_in_colour_are_sent_without_loss():
    import base64
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), np.uint8)
    with Image.open(io.BytesIO(base64.b64decode(json_of(pixels)))) as image:
        assert (np.asarray(image).transpose(2, 0, 1) == pixels).all()


@pytest.mark.parametrize(
    ("image", "kind", "told"),
    [
        (np.zeros((2, 8, 8), np.uint8), ValueError, r"shape \[2, 8, 8\]"),
        (np.zeros((8, 8), np.int64), TypeError, "int64"),
        (5, TypeError, "an image is a int"),
        ("nowhere.png", FileNotFoundError, "nowhere.png"),
    ],
)
def test_what_is_no_image_is_raised_where_the_answers_are_read(server, image, kind, told):
    with Client(server.url) as client, pytest.raises(kind, match=told):
        list(client.stream([PNG, image]))


def test_what_the_frames_raise_is_raised_too(server):
    def frames():
        yield PNG
        raise RuntimeError("the camera is gone")

    with Client(server.url) as client, pytest.raises(RuntimeError, match="the camera is gone"):
        list(client.stream(frames()))


def test_a_frame_that_is_refused_is_an_answer_and_no_exception(server):
    with Client(server.url) as client:
        wrong, right = client.stream([b"no image", PNG], rate=0)
    assert isinstance(wrong, FrameError)
    assert (wrong.id, wrong.line, wrong.error) == (0, 0, "undecodable_image")
    assert (right.id, type(right)) == (1, FastFrame)


def test_options_travel_and_are_refused_by_name(server):
    with Client(server.url) as client:
        answers = list(client.stream([Frame(PNG, deadline=60)], rate=1, samples=20, risk=0, deadline=600))
        assert answers[1].prediction.samples == 20
        with pytest.raises(RequestRefused) as refusal:
            list(client.stream([PNG], rate=0.5, max_rate=0.1))
    assert refusal.value.error == "invalid_parameter"


def test_a_stream_that_is_left_early_is_hung_up(server):
    with Client(server.url) as client:
        answers = client.stream((PNG for _ in iter(int, 1)), rate=0)
        assert next(answers).id == 0
        answers.close()
        assert client.classify_fast(PNG).predictions


def one_and_a_pause(more: threading.Event) -> Iterator[bytes]:
    """One frame, and no end until there is more to send."""
    yield PNG
    more.wait(60)


def test_a_service_that_stops_ends_the_stream_by_an_error_that_says_so(tmp_path):
    more = threading.Event()
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, Client(server.url) as client:
        answers = client.stream(one_and_a_pause(more), rate=0)
        assert next(answers).id == 0
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Unavailable) as stopped:
            next(answers)
        more.set()
    assert stopped.value.error == "stopping"


def test_a_service_that_dies_cuts_the_stream_off(tmp_path):
    more = threading.Event()
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, Client(server.url) as client:
        answers = client.stream(one_and_a_pause(more), rate=0)
        assert next(answers).id == 0
        server.process.kill()
        with pytest.raises(Unavailable, match="was cut off"):
            next(answers)
        more.set()


def test_a_service_that_is_not_there_is_unavailable():
    with silent_port() as port, Client(url_of(port), retries=0) as client, pytest.raises(Unavailable):
        list(client.stream([PNG]))


def test_a_key_is_sent_and_a_wrong_one_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"camera: {KEY}\n")
    with serving(shared_bundle(SMALL), tmp_path / "log", api_keys_file=keys) as server:
        with Client(server.url, KEY) as client:
            assert len(list(client.stream([PNG], rate=0))) == 1
        with Client(server.url, "x" * 32) as client, pytest.raises(RequestRefused) as refusal:
            list(client.stream([PNG], rate=0))
    assert refusal.value.status == 401


def test_an_answer_of_another_server_is_unexpected():
    from carso.client.streaming import Conversation

    for line in (b"<html>\n", b"{}\n", b"[]\n", b'{"path": "fast"}\n'):
        with pytest.raises(UnexpectedAnswer, match="is the URL right"):
            list(Conversation("http://x", "1").answers(line))
