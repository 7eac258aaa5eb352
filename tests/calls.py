"""Requests as the tests send them, and what they assert of every refusal. The images fit the server of conftest.py."""

from __future__ import annotations

import httpx
import numpy as np
from carso.api.answers import ErrorAnswer

from tests.pictures import encoded, npy

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)  # three images
VALUES = (PIXELS / np.float32(255)).astype(np.float32)[:, None]  # [3, 1, 8, 8]
PNG = encoded(PIXELS[0])
COLOUR_PNG = encoded(np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8))
PATHS = ("/classify", "/classify/fast")


def as_png(path: str, client: httpx.Client, **options: object) -> httpx.Response:
    return client.post(path, content=PNG, headers={"content-type": "image/png"}, params=options)


def as_npy(path: str, client: httpx.Client, array: np.ndarray, **options: object) -> httpx.Response:
    return client.post(path, content=npy(array), headers={"content-type": "application/x-npy"}, params=options)


def refused(response: httpx.Response, code: int, error: str) -> str:
    """Asserts the one shape of errors; returns the message."""
    assert response.status_code == code, response.text
    assert response.headers["content-type"] == "application/json"
    answer = ErrorAnswer.model_validate_json(response.content)
    assert answer.error == error
    assert answer.request_id == response.headers["x-request-id"]
    return answer.message


def sample(page: str, name: str) -> float:
    """The value of one series; 0 if it is not there yet."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name} "))
