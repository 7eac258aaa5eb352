"""The evidence of an attack: false alarms within the promise, and attacks that are noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf, isnan, log10, nan, prod
from pathlib import Path

import pytest
from carso.board.whole import OwnCell, Whole
from carso.bundle import Bundle, Proofs
from carso.inference.jobs import Certify, Outcome
from carso.telemetry import evidence
from carso.telemetry.alarms import Alarms
from carso.telemetry.cgroup import Cgroup
from carso.telemetry.evidence import ALARM, BOUND_FAILS, CEILING, SHARES, Evidence, upper_bound
from prometheus_client import CollectorRegistry, generate_latest

from tests.bundles import shared_bundle

CLEAN = 41 / 3000  # of disagreement, as of models/mnist-fcn
NULL = upper_bound(41, 3000)
UNPROVEN = 210 / 3000  # of images that are not proven: published networks for bounds leave about so many
UNPROVEN_NULL = upper_bound(210, 3000)


def images_until_alarm(test: Evidence, rate: float, *, seed: int, most: int, alarm: float = ALARM) -> float:
    """How many images it takes, of which a share of `rate` shows the sign; infinite if more than `most`."""
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


@pytest.mark.parametrize(("null", "lives", "most"), [(NULL, 300, 27), (UNPROVEN_NULL, 100, 12)])
def test_false_alarms_at_the_worst_clean_rate_are_within_the_promise(null, lives, most):
    """An alarm at 20 may be false in 5 % of the lives. Of 300 lives, that are 15 on average, and more than 27 in one of
    a thousand such tests; of 100, they are 5, and more than 12 in two of a thousand."""
    alarms = [images_until_alarm(Evidence(null), null, seed=seed, most=1500, alarm=20) < inf for seed in range(lives)]
    assert 0 < sum(alarms) <= most


@pytest.mark.parametrize(("clean", "null"), [(CLEAN, NULL), (UNPROVEN, UNPROVEN_NULL)])
def test_clean_traffic_raises_no_alarm(clean, null):
    assert images_until_alarm(Evidence(null), clean, seed=1, most=50_000) == inf


@pytest.mark.parametrize(
    ("clean", "null", "attacked", "within"),
    [(CLEAN, NULL, 0.05, 1200), (CLEAN, NULL, 0.2, 150), (UNPROVEN, UNPROVEN_NULL, 0.2, 300)],
)
def test_an_attack_is_noticed_also_after_long_clean_traffic(clean, null, attacked, within):
    """Attacked images that always show the sign, after ten thousand clean ones."""
    rate = clean * (1 - attacked) + attacked
    for seed in range(3):
        test = Evidence(null)
        assert images_until_alarm(test, clean, seed=seed, most=10_000) == inf
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

VOTED = Outcome(label=0, votes=9, tally=[9], ending="exact", risk_reached=0.0, seed=1)
DECIDED = Outcome(label=0, votes=0, tally=[0], ending="certificate", risk_reached=1.0, seed=1)


Page = Callable[[], str]


def alarms_of(disagreement: dict[str, int] | None, *, proofs: dict[str, float] | None = None) -> tuple[Alarms, Page]:
    """The alarms of a bundle that was measured so, at an eps of 0.3, and the page of their metrics."""
    manifest = Bundle.load(shared_bundle()).manifest
    measured = manifest.model_dump() | {"disagreement": disagreement, "proofs": proofs}
    registry = CollectorRegistry()
    alarms = Alarms(type(manifest).model_validate(measured), certify_eps=0.3, whole=Whole(), registry=registry)
    return alarms, lambda: generate_latest(registry).decode()


def values_of(page: Page) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in page().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def test_a_bundle_that_was_not_measured_or_always_disagrees_has_no_evidence():
    assert "evidence" not in alarms_of(None)[1]()
    alarms, page = alarms_of({"images": 10, "disagree": 10})
    assert "carso_clean_disagreement_ratio 1.0" in page() and "evidence" not in page()
    alarms.elections([VOTED], agree=[False], caller="shop")
    assert "evidence" not in page()


def test_each_caller_has_evidence_of_its_own():
    outcome = VOTED
    alarms, page = alarms_of({"images": 3000, "disagree": 41})
    assert "carso_attack_evidence 0.0" in page() and "carso_caller_attack_evidence" not in page()
    for _ in range(20):
        alarms.elections([outcome], agree=[False], caller="mallory")
        alarms.elections([outcome] * 3, agree=[True] * 3, caller="shop")
    values = values_of(page)
    mallory, shop, total = (
        values[name]
        for name in (
            'carso_caller_attack_evidence{caller="mallory"}',
            'carso_caller_attack_evidence{caller="shop"}',
            "carso_attack_evidence",
        )
    )
    assert mallory > total > log10(ALARM) > 0 > shop


def test_images_that_a_certificate_decided_are_no_evidence_of_disagreement():
    """Those that are left to the vote disagree more often than all clean images do."""
    alarms, page = alarms_of({"images": 3000, "disagree": 41})
    for _ in range(100):
        alarms.elections([DECIDED] * 19 + [VOTED], agree=[True] * 19 + [False], caller=None)
    all_of_them = values_of(page)["carso_attack_evidence"]
    expected = Evidence(NULL)
    expected.add_all(([False] * 19 + [True]) * 100)
    assert all_of_them == pytest.approx(expected.log10)


PROOFS = {"eps": 0.3, "images": 3000, "proven": 2790}
REPORT = Certify("report", 0.3)


def test_fewer_proofs_than_on_clean_images_are_evidence_of_all_images_and_of_each_caller():
    alarms, page = alarms_of(None, proofs=PROOFS)
    assert "carso_clean_certified_ratio 0.93" in page() and "carso_certified_ratio NaN" in page()
    assert "carso_uncertified_evidence 0.0" in page() and "carso_caller_uncertified_evidence" not in page()
    for _ in range(20):
        alarms.certified([False], asked=Certify("decide", 0.3), caller="mallory")
        alarms.certified([True] * 3, asked=REPORT, caller="shop")
    values = values_of(page)
    mallory, shop = (values[f'carso_caller_uncertified_evidence{{caller="{name}"}}'] for name in ("mallory", "shop"))
    assert mallory > values["carso_uncertified_evidence"] > log10(ALARM) > 0 > shop
    assert values["carso_certified_ratio"] == 0.75


@pytest.mark.parametrize("asked", [Certify("report", 0.29), Certify("decide", 1.0), Certify("max", 0.3)])
def test_only_a_proof_that_is_asked_at_the_services_own_eps_is_compared_with_clean_images(asked):
    alarms, page = alarms_of(None, proofs=PROOFS)
    alarms.certified([False] * 1000, asked=asked, caller=None)
    assert values_of(page)["carso_uncertified_evidence"] == 0
    assert isnan(values_of(page)["carso_certified_ratio"])


@pytest.mark.parametrize("proofs", [None, PROOFS | {"eps": 0.2}, PROOFS | {"proven": 0}])
def test_a_bundle_whose_proofs_were_not_counted_at_this_eps_or_that_proves_nothing_has_no_such_evidence(proofs):
    alarms, page = alarms_of(None, proofs=proofs)
    alarms.certified([False] * 1000, asked=REPORT, caller="shop")
    assert "uncertified_evidence" not in page()
    assert values_of(page)["carso_certified_ratio"] == 0


def test_more_proofs_than_images_are_refused():
    with pytest.raises(ValueError, match="3001 of 3000 images cannot be proven"):
        Proofs(eps=0.3, images=3000, proven=3001)


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
