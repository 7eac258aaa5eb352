"""Request options, from the query and from a JSON body."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlencode

import pytest
from carso.errors import ConflictingParameters, InvalidParameter, RequestError, UnknownParameter
from carso.inference.pipeline import MAX_SEED
from carso.options import FastOptions, RobustOptions, parse, robust_options
from hypothesis import given
from hypothesis import strategies as st

ROBUST = robust_options(RobustOptions, samples=1500, max_samples=2000, risk=1e-3)

given_options = st.fixed_dictionaries(
    {},
    optional={
        "samples": st.integers(1, 2000),
        "seed": st.integers(0, MAX_SEED),
        "risk": st.just(0) | st.floats(1e-12, 0.5),
        "deadline_ms": st.integers(1, 600_000),
        "resize": st.booleans(),
        "fit": st.sampled_from(["pad", "stretch"]),
        "invert": st.booleans(),
        "background": st.sampled_from(["black", "white", "00ff80", "FFFFFF"]),
        "certify": st.sampled_from(["off", "report", "decide", "max"]),
        "certify_eps": st.floats(1e-6, 1),
    },
)
DEFAULTS = {"samples": 1500, "seed": None, "risk": 1e-3, "deadline_ms": None}
DEFAULTS |= {"resize": False, "fit": "pad", "invert": False, "background": None, "certify": "off", "certify_eps": 0.3}


def query(options: dict[str, object]) -> bytes:
    return urlencode(options).encode()


@given(given_options, given_options)
def test_options_come_from_query_and_body_and_the_rest_has_defaults(in_query, in_body):
    in_body = {name: value for name, value in in_body.items() if in_query.get(name, value) == value}
    assert parse(ROBUST, query(in_query), in_body).model_dump() == DEFAULTS | in_query | in_body


@given(given_options)
def test_an_option_given_in_both_places_may_not_differ(options):
    for name, value in options.items():
        match name:
            case "resize" | "invert":
                other = not value
            case "risk":
                other = 1e-4
            case "fit":
                other = "pad" if value == "stretch" else "stretch"
            case "certify":
                other = "max" if value == "off" else "off"
            case "certify_eps":
                other = value / 2 + 1e-6
            case "background":
                other = "123456"
            case _:
                other = value % 2000 + 1
        if other != value:
            with pytest.raises(ConflictingParameters, match=name):
                parse(ROBUST, query({name: value}), {name: other})


def test_an_option_may_not_be_twice_in_the_query_with_different_values():
    assert parse(ROBUST, b"seed=1&seed=1", {}).seed == 1
    with pytest.raises(ConflictingParameters, match="seed"):
        parse(ROBUST, b"seed=1&seed=2", {})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("samples", 0, "an integer from 1 to 2000"),
        ("samples", 2001, "an integer from 1 to 2000"),
        ("samples", 1.5, "an integer from 1 to 2000"),
        ("seed", -1, "an integer from 0 to 9007199254740991"),
        ("seed", MAX_SEED + 1, "an integer from 0 to 9007199254740991"),
        ("risk", -0.1, "0 or a number from 1e-12 to 0.5"),
        ("risk", 1e-13, "0 or a number from 1e-12 to 0.5"),
        ("risk", 0.51, "0 or a number from 1e-12 to 0.5"),
        ("risk", float("nan"), "0 or a number from 1e-12 to 0.5"),
        ("risk", float("inf"), "0 or a number from 1e-12 to 0.5"),
        ("deadline_ms", 0, "an integer from 1 to 600000"),
        ("deadline_ms", 600_001, "an integer from 1 to 600000"),
        ("resize", "maybe", "true or false"),
        ("fit", "crop", "one of pad, stretch"),
        ("invert", "maybe", "true or false"),
        ("background", "#ffffff", "one of black, white or a string that matches ^[0-9A-Fa-f]{6}$"),
        ("background", "ffffff\n", "one of black, white"),
        ("samples", "", "an integer from 1 to 2000"),
        ("seed", "x" * 10_000, "an integer from 0 to 9007199254740991"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_the_range(name, value, allowed):
    for in_query, in_body in ((query({name: value}), {}), (b"", {name: value})):
        with pytest.raises(InvalidParameter) as refusal:
            parse(ROBUST, in_query, in_body)
        assert name in str(refusal.value)
        assert allowed in str(refusal.value)
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "body", [{"samples": "10"}, {"samples": True}, {"resize": 1}, {"risk": "0.1"}, {"samples": None}]
)
def test_values_in_json_have_their_own_type(body):
    with pytest.raises(InvalidParameter):
        parse(ROBUST, b"", body)


def test_an_unknown_option_is_refused_with_the_list_of_those_known():
    with pytest.raises(UnknownParameter, match=r"'sample' .* samples, seed, risk, deadline_ms"):
        parse(ROBUST, b"sample=10", {})
    with pytest.raises(UnknownParameter, match="'sample'"):
        parse(ROBUST, b"", {"sample": 10})


def test_the_fast_path_has_no_options_of_the_vote():
    assert parse(FastOptions, b"resize=true", {}).resize
    with pytest.raises(UnknownParameter, match="'samples'"):
        parse(FastOptions, b"samples=10", {})


@given(st.binary(max_size=100))
def test_any_query_is_parsed_or_refused(data):
    with suppress(RequestError):
        parse(ROBUST, data, {})
