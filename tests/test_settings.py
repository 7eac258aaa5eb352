"""The settings, as whoever starts the service meets them: in the environment, and as exit codes and messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from carso.complaints import allowed
from carso.settings import Settings, SettingsError, unknown_variables

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.server import environment

HTTP = Path(__file__).parents[1] / "docs/http.md"


def start(**settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "carso.command"],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_setting_has_a_description_and_a_default():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


DEFAULTS_IN_WORDS = {"bundle": "models/mnist-fcn", "threads": "the processors it may use", "api_keys_file": "none"}


def test_the_documented_table_says_names_defaults_and_ranges():
    rows = re.findall(r"^\| `CARSO_(\w+)` \|([^|]*)\|([^|]*)\|", HTTP.read_text(), re.MULTILINE)
    documented = [(name.lower(), default.strip(), in_digits(bounds.strip())) for name, default, bounds in rows]
    assert documented == [
        (name, DEFAULTS_IN_WORDS.get(name, str(field.default).lower()), range_of(name))
        for name, field in Settings.model_fields.items()
    ]


def in_digits(bounds: str) -> str:
    """2^10 as 1024, and a comma where sentences have an or."""
    return re.sub(r"2\^(\d+)", lambda power: str(2 ** int(power[1])), bounds).replace(", or ", " or ")


def range_of(name: str) -> str:
    """As a message says it, without the noun."""
    text = allowed(Settings, name).replace("true or false", "true, false")
    return re.sub(r"an? (integer|number) from |one of |a path|a string that is not empty", "", text)


def test_settings_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("CARSO_PORT", "9000")
    monkeypatch.setenv("CARSO_BUNDLE", "somewhere/else")
    monkeypatch.setenv("CARSO_ALLOW_SEED", "false")
    monkeypatch.setenv("CARSO_RISK", "0")
    monkeypatch.setenv("CARSO_THREADS", "")  # as if it were not there
    settings = Settings.read()
    assert (settings.port, settings.bundle, settings.allow_seed) == (9000, Path("somewhere/else"), False)
    assert (settings.risk, settings.threads) == (0, None)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "70000", "an integer from 0 to 65535"),
        ("port", "tcp://10.0.0.1:80", "an integer from 0 to 65535"),
        ("device", "gpu", "one of auto, cuda, cpu"),
        ("threads", "0", "an integer from 1 to 1024"),
        ("spin", "perhaps", "true or false"),
        ("round_rows", "10", "an integer from 16 to 65536"),
        ("risk", "0.9", "0 or a number from 1e-12 to 0.5"),
        ("risk", "nan", "0 or a number from 1e-12 to 0.5"),
        ("max_samples", "0", "an integer from 1 to 100000"),
        ("max_images", "-1", "an integer from 1 to 4096"),
        ("max_body_bytes", "1", "an integer from 1024 to 1073741824"),
        ("max_pixels", "many", "an integer from 1 to 67108864"),
        ("decode_threads", "65", "an integer from 1 to 64"),
        ("log_level", "loud", "one of debug, info, warning, error"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_its_value_and_the_allowed_range(monkeypatch, name, value, allowed):
    monkeypatch.setenv(f"CARSO_{name.upper()}", value)
    with pytest.raises(SettingsError) as refusal:
        Settings.read()
    assert str(refusal.value) == f"CARSO_{name.upper()}: {value!r} is not allowed; it must be {allowed}"


def test_a_misspelt_setting_is_noticed(monkeypatch):
    monkeypatch.setenv("CARSO_PROT", "80")
    monkeypatch.setenv("CARSO_PORT", "80")
    assert unknown_variables() == ["CARSO_PROT"]


def test_a_bad_setting_stops_the_start_with_exit_code_2_and_one_line():
    ended = start(port=70000)
    assert ended.returncode == 2
    assert ended.stderr == "carso-serve: CARSO_PORT: '70000' is not allowed; it must be an integer from 0 to 65535\n"


def test_a_limit_below_the_default_of_the_bundle_stops_the_start():
    ended = start(bundle=shared_bundle(SMALL), device="cpu", max_samples=1000)
    assert ended.returncode == 2
    assert "CARSO_MAX_SAMPLES: 1000" in ended.stderr
    assert "at least 1500" in ended.stderr


def test_a_folder_that_is_no_bundle_stops_the_start_with_its_name(tmp_path):
    ended = start(bundle=tmp_path)
    assert ended.returncode == 1
    assert f"{tmp_path} holds no manifest.json" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_bundle_stops_the_start_with_the_name_of_the_file(tmp_path):
    folder = copy_of(shared_bundle(SMALL), tmp_path / "damaged")
    graph = folder / "vote.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    ended = start(bundle=folder)
    assert ended.returncode == 1
    assert f"{graph} is damaged" in ended.stderr
    assert "Traceback" not in ended.stderr
