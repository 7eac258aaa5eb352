"""Shadow mode: fast answers that are examined later, when nothing else is to be done."""

from __future__ import annotations

import numpy as np
from carso.bundle import Bundle
from carso.inference import shadow
from carso.inference.engine import Engine
from carso.inference.jobs import VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.shadow import Shadow
from carso.inference.thread import InThread

from tests.bundles import SMALL, random_images, shared_bundle
from tests.calls import BATCH, VALUES, as_npy, sample, under_way
from tests.server import Server, serving
from tests.waiting import comes_to

OUTCOMES = ("agree", "disagree", "dropped")


def shadowed(server: Server) -> dict[str, float]:
    page = server.metrics()
    return {name: sample(page, f'carso_shadow_images_total{{outcome="{name}"}}') for name in OUTCOMES}


def test_fast_answers_are_examined_when_the_engine_is_idle_and_feed_the_signs_of_an_attack(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", shadow=1) as server, server.client() as client:
        answer = as_npy("/classify/fast", client, BATCH).json()
        comes_to(lambda: sum(shadowed(server).values()), len(BATCH))
        found = shadowed(server)
        votes = as_npy("/classify", client, BATCH).json()["predictions"]
        page = server.metrics()
        fast = [prediction["label"] for prediction in answer["predictions"]]
    assert found["dropped"] == 0
    assert fast == [prediction["fast_label"] for prediction in votes]
    for agree, outcome in (("true", "agree"), ("false", "disagree")):
        own = sum(prediction["agree"] is (agree == "true") for prediction in votes)
        assert sample(page, f'carso_path_agreement_total{{agree="{agree}"}}') == found[outcome] + own


def test_by_default_nothing_is_examined(server, client):
    as_npy("/classify/fast", client, BATCH)
    as_npy("/classify", client, VALUES)
    assert shadowed(server) == dict.fromkeys(OUTCOMES, 0)


def test_frames_of_streams_are_not_examined_a_second_time(tmp_path):
    from tests.duplex import streaming

    with (
        serving(shared_bundle(SMALL), tmp_path / "log", shadow=1) as server,
        server.client() as client,
    ):
        with streaming(server, rate=0) as stream:
            stream.send()
            stream.end()
            stream.lines()
        as_npy("/classify/fast", client, VALUES)
        comes_to(lambda: sum(shadowed(server).values()), len(VALUES))


def test_a_busy_engine_is_left_alone_and_what_does_not_fit_is_dropped(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 64 * 100_001, "shadow": 1}
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, **limits) as server,
        under_way(server),
        server.client() as client,
    ):
        for _ in range(2):
            as_npy("/classify/fast", client, BATCH)
        assert shadowed(server) == {"agree": 0, "disagree": 0, "dropped": 2 * len(BATCH) - shadow.MOST}


async def test_a_share_of_the_images_is_drawn(tmp_path):
    bundle = Bundle.load(shared_bundle(SMALL))
    engine = Engine(InThread(Pipeline(Sessions(bundle, device="cpu", threads=1), latent=6, classes=10, round_rows=128)))
    engine.start()
    draws = iter([0.05, 0.5, 0.0999, 0.1, 0.99])
    found: list[tuple[bool, str | None]] = []
    watching = Shadow(
        engine,
        share=0.1,
        plan=VotePlan(samples=100, risk=0.1),
        counted=lambda outcome, agrees, caller: found.append((agrees, caller)),
        dropped=lambda: found.append((False, "dropped")),
        draw=lambda: next(draws),
    )
    images = random_images(5)
    watching.offer(images, [-1] * 5, "camera")
    await watching._task
    assert found == [(False, "camera")] * 2
    watching.offer(np.empty((0, *images.shape[1:]), np.float32), [], None)
    await engine.stop()
    watching._draw = lambda: 0.0
    watching.offer(images[:1], [0], None)  # an engine that has ended takes nothing, and nothing is raised
    await watching._task
    assert len(found) == 2
