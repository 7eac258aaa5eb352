"""Errors -> answers."""

from __future__ import annotations

import json

import pytest
from carso.errors import RequestError
from carso.http.refusals import answer
from carso.http.statuses import STATUS
from carso.inference.engine import EngineError

KINDS = RequestError.__subclasses__()


def test_every_error_has_a_name_of_its_own_in_snake_case():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and name.isidentifier() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_status_and_says_what_it_is_about(kind):
    assert 400 <= STATUS[kind] < 600
    assert kind.__doc__
    response = answer(kind("why"), "an-id")
    assert response.status_code == STATUS[kind]
    assert json.loads(response.body) == {"error": kind.name, "message": "why", "request_id": "an-id"}


@pytest.mark.parametrize(
    "error", [EngineError("CUDA error 700 in secret.cu"), KeyError("secret"), MemoryError("secret")]
)
def test_a_fault_of_the_service_shows_nothing_of_its_inside(error):
    response = answer(error, "an-id")
    assert response.status_code == 500
    assert b"secret" not in response.body
