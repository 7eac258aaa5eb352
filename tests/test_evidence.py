"""The evidence of an attack: false alarms within the promise, and attacks that are noticed."""

from __future__ import annotations

import random
from math import inf, log10, nan, prod
from pathlib import Path

import pytest
from carso.board.whole import OwnCell
from carso.bundle import Bundle
from carso.telemetry import evidence
from carso.telemetry.cgroup import Cgroup
from carso.telemetry.evidence import ALARM, BOUND_FAILS, CEILING, SHARES, Evidence, upper_bound
from carso.telemetry.metrics import Metrics

from tests.bundles import shared_bundle

CLEAN = 41 / 3000  # as of models/mnist-fcn
NULL = upper_bound(41, 3000)


def images_until_alarm(test: Evidence, rate: float, *, seed: int, most: int, alarm: float = ALARM) -> float:
    """How many images it takes, of which a share of `rate` makes the paths disagree; infinite if more than `most`."""
    chance = random.Random(seed)
    for image in range(1, most + 1):
        test.add(chance.random() < rate)
        if test.value >= alarm:
            return image
    return inf


def copied(cell: OwnCell) -> OwnCell:
    copy = OwnCell()
    copy.change(lambda _: cell.read())
    return copy


def test_the_evidence_is_what_the_proof_says_it_is():
    """By the definition, without its recursion: every moment has bets of its own, on every rate."""
    chance = random.Random(0)
    seen = [chance.random() < 0.1 for _ in range(60)]
    test = Evidence(0.02)
    for disagree in seen:
        test.add(disagree)

    def in_hand(images: int) -> float:
        return 1 / (1 + evidence.log1p(images))

    def factor(share: float, disagree: bool) -> float:
        rate = 0.02 + 0.98 * share
        return rate / 0.02 if disagree else (1 - rate) / 0.98

    bets = sum(
        (in_hand(start) - in_hand(start + 1)) / len(SHARES) * prod(factor(share, x) for x in seen[start:])
        for start in range(len(seen))
        for share in SHARES
    )
    assert test.value == pytest.approx(bets + in_hand(len(seen)))
    assert test.log10 == pytest.approx(log10(test.value))


def test_the_mean_of_one_step_never_rises_at_the_null_or_below():
    for rate in (NULL, NULL / 2, 0.0):
        kept = OwnCell()
        test = Evidence(NULL, kept)
        for _ in range(50):
            before = test.value
            after = []
            for disagree in (True, False):
                other = Evidence(NULL, copied(kept))
                other.add(disagree)
                after.append(other.value)
            assert rate * after[0] + (1 - rate) * after[1] <= before * (1 + 1e-12)
            test.add(False)


def test_false_alarms_at_the_worst_clean_rate_are_within_the_promise():
    """An alarm at 20 may be false in 5 % of the lives. Of 300 lives, that are 15 on average, and more than 27 in one of
    a thousand such tests."""
    alarms = [images_until_alarm(Evidence(NULL), NULL, seed=seed, most=1500, alarm=20) < inf for seed in range(300)]
    assert 0 < sum(alarms) <= 27


def test_clean_traffic_raises_no_alarm():
    assert images_until_alarm(Evidence(NULL), CLEAN, seed=1, most=50_000) == inf


@pytest.mark.parametrize(("attacked", "within"), [(0.05, 1200), (0.2, 150)])
def test_an_attack_is_noticed_also_after_long_clean_traffic(attacked, within):
    """Attacked images on which the paths always disagree, after ten thousand clean ones."""
    rate = CLEAN * (1 - attacked) + attacked
    for seed in range(3):
        test = Evidence(NULL)
        assert images_until_alarm(test, CLEAN, seed=seed, most=10_000) == inf
        assert images_until_alarm(test, rate, seed=100 + seed, most=within) <= within


@pytest.mark.slow
def test_an_attack_on_one_image_in_a_hundred_is_noticed_and_one_within_the_bound_is_not():
    for seed in range(3):
        test = Evidence(NULL)
        assert images_until_alarm(test, CLEAN, seed=seed, most=10_000) == inf
        assert images_until_alarm(test, CLEAN * 0.99 + 0.01, seed=100 + seed, most=100_000) < inf
        assert images_until_alarm(Evidence(NULL), CLEAN * 0.99 + 0.0045, seed=seed, most=100_000) == inf


def test_the_evidence_has_a_ceiling_and_falls_again_when_the_attack_is_over():
    test = Evidence(NULL)
    for _ in range(1000):
        test.add(True)
    assert test.value <= CEILING + 1
    for _ in range(5000):
        test.add(False)
    assert test.value < ALARM


@pytest.mark.parametrize("rate", [0, 1, -0.1, nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        Evidence(rate)


@pytest.mark.parametrize(("count", "of"), [(0, 10), (3, 10), (41, 3000), (2999, 3000)])
def test_at_the_bound_so_few_images_have_the_stated_chance(count, of):
    bound = upper_bound(count, of)
    assert bound > count / of
    assert evidence._at_most(count, of, bound) == pytest.approx(BOUND_FAILS)


def test_all_of_the_images_bound_nothing():
    assert upper_bound(10, 10) == 1


# --- the metrics ------------------------------------------------------------------------------------------------------


def page_of(disagreement: dict[str, int] | None) -> tuple[Metrics, str]:
    bundle = Bundle.load(shared_bundle())
    manifest = type(bundle.manifest).model_validate(bundle.manifest.model_dump() | {"disagreement": disagreement})
    metrics = Metrics(
        type(bundle)(**vars(bundle) | {"manifest": manifest}),
        device="cpu",
        provider="CPUExecutionProvider",
        precision="float32",
    )
    return metrics, metrics.page().decode()


def test_a_bundle_that_was_not_measured_or_always_disagrees_has_no_evidence():
    assert "evidence" not in page_of(None)[1]
    metrics, page = page_of({"images": 10, "disagree": 10})
    assert "carso_clean_disagreement_ratio 1.0" in page and "evidence" not in page
    metrics.elections([], agree=[], caller="shop")


def test_each_caller_has_evidence_of_its_own():
    from carso.inference.jobs import Outcome

    outcome = Outcome(label=0, votes=9, tally=[9], ending="exact", risk_reached=0.0, seed=1)
    metrics, page = page_of({"images": 3000, "disagree": 41})
    assert "carso_attack_evidence 0.0" in page and "carso_caller_attack_evidence" not in page
    for _ in range(20):
        metrics.elections([outcome], agree=[False], caller="mallory")
        metrics.elections([outcome] * 3, agree=[True] * 3, caller="shop")
    values = dict(line.rsplit(" ", 1) for line in metrics.page().decode().splitlines() if "evidence" in line[:30])
    mallory, shop, total = (
        float(values[name])
        for name in (
            'carso_caller_attack_evidence{caller="mallory"}',
            'carso_caller_attack_evidence{caller="shop"}',
            "carso_attack_evidence",
        )
    )
    assert mallory > total > log10(ALARM) > 0 > shop


# --- the cgroup -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """A process in the cgroup /pod/carso, as the kernel would show it."""
    folder = tmp_path / "pod/carso"
    folder.mkdir(parents=True)
    for name, content in {
        "cgroup.procs": "1\n",
        "cpu.stat": "usage_usec 900\nnr_periods 50\nnr_throttled 20\nthrottled_usec 7\n",
        "memory.current": "5000\n",
        "memory.max": "8000\n",
        "memory.stat": "anon 3000\ninactive_file 1500\n",
    }.items():
        (folder / name).write_text(content)
    (tmp_path / "self").write_text("0::/pod/carso\n")
    return folder


def told(tmp_path: Path) -> dict[str, float]:
    found = Cgroup.find(root=tmp_path, of_this_process=tmp_path / "self")
    return {sample.name: sample.value for family in found.collect() for sample in family.samples}


def test_a_cgroup_tells_of_throttling_and_of_memory_and_its_limit(cgroup, tmp_path):
    assert told(tmp_path) == {
        "carso_cgroup_cpu_periods_total": 50,
        "carso_cgroup_cpu_throttled_periods_total": 20,
        "carso_cgroup_memory_working_set_bytes": 3500,
        "carso_cgroup_memory_limit_bytes": 8000,
    }


def test_what_a_cgroup_does_not_tell_is_left_out(cgroup, tmp_path):
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "cpu.stat").write_text("usage_usec 900\n")
    assert told(tmp_path) == {"carso_cgroup_memory_working_set_bytes": 3500}
    (cgroup / "memory.current").unlink()
    assert told(tmp_path) == {}


@pytest.mark.parametrize("content", [None, "1:cpu:/old\n", "0::/elsewhere\n"], ids=["none", "version 1", "not mounted"])
def test_without_a_cgroup_of_version_2_nothing_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "self").write_text(content)
    assert Cgroup.find(root=tmp_path, of_this_process=tmp_path / "self") is None
