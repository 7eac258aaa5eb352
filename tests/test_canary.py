"""The canary: the samples of the bundle that ships, asked of the service that ships."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest
from carso.board.whole import Whole
from carso.bundle import Bundle, BundleError
from carso.images.reader import Reader
from carso.inference.canary import Canary, canary_ratio
from carso.inference.engine import Engine
from carso.inference.jobs import Job, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.thread import InThread
from carso.samples import INDEX
from carso.settings import REFERENCE_BUNDLE
from prometheus_client.parser import text_string_to_metric_families

from tests import calls
from tests.bundles import copy_of
from tests.server import serving
from tests.test_bundle import reseal
from tests.waiting import comes_to

TIMEOUT = 60.0  # seconds: nothing may hang


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(REFERENCE_BUNDLE)


@pytest.fixture
async def engine(bundle):
    sessions = Sessions(bundle, device="cpu", threads=1)
    engine = Engine(InThread(Pipeline(sessions, latent=bundle.manifest.latent, classes=10, round_rows=128)))
    engine.start()
    yield engine
    await asyncio.wait_for(engine.stop(), TIMEOUT)


def images(bundle: Bundle) -> list:
    reader = Reader(bundle.manifest.input, max_images=1, max_pixels=784)
    return [(sample, reader.read([bundle.sample_files[sample.file]])[0]) for sample in bundle.samples.images]


@pytest.fixture
def whole() -> Whole:
    return Whole()


@pytest.fixture
def canary(engine, bundle, whole):
    def of(samples: list) -> Canary:
        return Canary(engine, samples, votes=bundle.manifest.samples, risk=bundle.samples.risk, every=0, whole=whole)

    return of


async def test_every_sample_that_was_right_when_it_was_made_is_right_again(bundle, canary, whole):
    watching = canary(images(bundle))
    right = watching._samples
    assert all(sample.robust_right for sample, _ in right) and len(right) < len(bundle.samples.images)
    assert math.isnan(canary_ratio(whole))
    for sample, image in right[::7]:
        await asyncio.wait_for(watching.ask(sample, image), TIMEOUT)
    assert canary_ratio(whole) == 1


async def test_a_wrong_answer_shows_in_the_ratio_and_once_in_the_log_until_it_is_right_again(
    bundle, caplog, canary, whole
):
    first, second = [(sample, image) for sample, image in images(bundle) if sample.kind == "none"][:2]
    watching = canary([first, second])
    await asyncio.wait_for(watching.ask(*first), TIMEOUT)
    for _ in range(2):  # the image of another class: as if the weights had changed
        await asyncio.wait_for(watching.ask(second[0], first[1]), TIMEOUT)
    assert canary_ratio(whole) == 0.5
    assert caplog.text.count("is answered") == 1
    assert f"the canary sample {second[0].file} is a {second[0].label}" in caplog.text
    await asyncio.wait_for(watching.ask(*second), TIMEOUT)
    assert canary_ratio(whole) == 1


async def test_the_canary_waits_while_the_engine_has_work_and_ends_with_it(engine, bundle, canary, whole):
    watching = canary(images(bundle)[:1])
    endless = asyncio.create_task(
        engine.run(Job(np.zeros((1, 1, 28, 28), np.float32), VotePlan(samples=2**60, risk=0)))
    )
    await asyncio.sleep(0)
    running = asyncio.create_task(watching.run())
    for _ in range(100):
        await asyncio.sleep(0)
    assert math.isnan(canary_ratio(whole))
    endless.cancel()
    async with asyncio.timeout(TIMEOUT):
        while math.isnan(canary_ratio(whole)):
            await asyncio.sleep(0.01)
        await engine.stop()
        await running


def test_the_service_shows_the_ratio_and_does_not_count_the_samples_as_answers(tmp_path):
    def told() -> dict[str, float]:
        families = text_string_to_metric_families(server.metrics())
        return {sample.name: sample.value for family in families for sample in family.samples}

    with serving(REFERENCE_BUNDLE, tmp_path / "log", canary_s=0.01) as server:
        comes_to(lambda: told()["carso_canary_correct_ratio"], 1.0)
        found = told()
        assert found["carso_first_pass_images_total"] >= 1
        assert found["carso_votes_per_image_count"] == 0
    with serving(REFERENCE_BUNDLE, tmp_path / "log", canary_s=0) as server:
        assert "carso_canary_correct_ratio" not in told()


def test_the_canary_asks_in_the_process_of_the_engine_and_the_worker_shows_what_came_of_it(tmp_path):
    folder = copy_of(REFERENCE_BUNDLE, tmp_path / "bundle")
    index = json.loads((folder / INDEX).read_text())
    for each in index["images"]:
        each["label"] = each["robust_label"] = (each["robust_label"] + 1) % 10  # so that every answer is wrong
    (folder / INDEX).write_text(json.dumps(index))
    reseal(folder)
    with serving(folder, tmp_path / "log", workers=1, engine="shared", canary_s=0.01) as server:
        comes_to(lambda: calls.sample(server.metrics(), "carso_canary_correct_ratio"), 0.0)
    told = [line for line in map(json.loads, server.log.read_text().splitlines()) if "canary" in line["message"]]
    assert told
    assert not any("worker" in line for line in told)


def test_a_sample_that_is_no_image_of_the_bundle_ends_the_start(tmp_path):
    from carso.app import build
    from carso.settings import Settings

    folder = copy_of(REFERENCE_BUNDLE, tmp_path / "bundle")
    (folder / "samples/00000-clean.png").write_bytes(b"no image")
    reseal(folder)
    with pytest.raises(BundleError, match=r"00000-clean\.png cannot be classified: .*carso-train samples"):
        build(Settings(bundle=folder, device="cpu", threads=1))
