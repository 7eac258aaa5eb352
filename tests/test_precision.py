"""Which precision the votes have where the operator leaves the choice to the service."""

from __future__ import annotations

import pytest
from carso.bundle import Bundle, Recount, Threat
from carso.choices import CPU, CUDA
from carso.inference import precision
from carso.inference.precision import chosen
from carso.inference.processors import multiplies_bytes
from carso.settings import REFERENCE_BUNDLE

CLEAN = Threat(attack="none", norm="linf", eps=0, sees="nothing")
ATTACKED = Threat(attack="adaptive", norm="linf", eps=0.3, sees="system")


def recounts(*, clean: int = 0, attacked: int = 0) -> tuple[Recount, ...]:
    """What int8 changes, in images of a thousand."""
    return tuple(
        Recount(threat=threat, images=1000, correct_float32=700, correct_int8=700 + change)
        for threat, change in ((CLEAN, clean), (ATTACKED, attacked))
    )


@pytest.mark.parametrize(
    ("measured", "provider", "fast", "expected", "because"),
    [
        (recounts(), CPU, True, "int8", "no accuracy (+0.0 % clean, +0.0 % at eps 0.30)"),
        (recounts(clean=-5, attacked=8), CPU, True, "int8", "(-0.5 % clean, +0.8 % at eps 0.30)"),
        (recounts(clean=-6), CPU, True, "float32", "too much accuracy (-0.6 % clean"),
        (recounts(attacked=-6), CPU, True, "float32", "-0.6 % at eps 0.30"),
        (recounts(), CPU, False, "float32", "no 8-bit dot products"),
        (recounts(), CUDA, True, "float32", "unless tf32 is asked for"),
        (recounts()[:1], CPU, True, "float32", "no measurement of int8"),
        ((), CPU, True, "float32", "no measurement of int8"),
    ],
)
def test_int8_is_chosen_where_it_is_fast_and_measured_to_cost_no_accuracy(
    monkeypatch, measured, provider, fast, expected, because
):
    monkeypatch.setattr(precision, "multiplies_bytes", lambda: fast)
    found = chosen("auto", measured, provider=provider)
    assert found.precision == expected
    assert because in found.because


def test_what_was_asked_for_is_what_is_chosen():
    assert chosen("int8", (), provider=CPU).precision == "int8"
    assert chosen("float32", recounts(), provider=CPU).precision == "float32"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t: avx512_vnni\n", False),
        ("processor\t: 0\n", False),
        (None, False),
    ],
)
def test_linux_tells_whether_the_processors_have_8_bit_dot_products(tmp_path, told, expected):
    path = tmp_path / "cpuinfo"
    if told is not None:
        path.write_text(told)
    assert multiplies_bytes(path) is expected


def test_the_shipped_bundle_has_measured_what_int8_changes():
    """So that `auto` may choose it."""
    found = Bundle.load(REFERENCE_BUNDLE).recounts
    assert {recount.threat.sees for recount in found} == {"nothing", "system"}


def test_info_says_which_precision_was_chosen_and_why(client):
    device = client.get("/info").json()["device"]
    assert device["precision_asked"] == "auto"
    assert device["precision"] == "float32"  # of this bundle, nothing was measured
    assert "measurement" in device["precision_because"] or "8-bit" in device["precision_because"]
