"""Messages between processes: the same at the other end, however the way cuts them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from carso.inference.jobs import Job, VotePlan
from carso.inference.remote import Asked, Left
from carso.inference.wire import Unpacker, packed

IMAGES = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)
MESSAGES = [
    [Left(1)],
    [Asked(number, Job(IMAGES[:number], VotePlan(samples=1500, risk=0.0, seed=3)), ()) for number in (1, 5)],
    "a text",
    [Asked(7, Job(IMAGES[:, :, ::2]), ())],  # not in one piece
    [],
]


def received(pieces: Iterable[bytes]) -> list[Any]:
    unpacker = Unpacker()
    return [message for piece in pieces for message in unpacker.feed(piece)]


def shown(message: Any) -> Any:
    """What can be compared."""
    if not isinstance(message, list):
        return message
    return [(m.number, m.job.images.tolist(), m.job.plan, m.followed) if isinstance(m, Asked) else m for m in message]


@pytest.mark.parametrize("longest", [1, 7, 100, 1000, 10**6])
def test_messages_arrive_as_they_were_sent(longest):
    chance = random.Random(longest)
    sent = b"".join(bytes(part) for message in MESSAGES for part in packed(message))
    pieces = []
    while sent:
        size = chance.randint(1, longest)
        pieces.append(sent[:size])
        sent = sent[size:]
    assert list(map(shown, received(pieces))) == list(map(shown, MESSAGES))


def test_images_are_not_pickled_and_arrive_as_views():
    job = Job(np.zeros((64, 1, 28, 28), np.float32))
    sent = packed([Asked(1, job, ())])
    assert sum(part.nbytes for part in sent if isinstance(part, memoryview)) == job.images.nbytes
    assert sum(len(part) for part in sent if isinstance(part, bytes)) < 1000
    ((asked,),) = received([b"".join(map(bytes, sent))])
    assert not asked.job.images.flags.owndata
