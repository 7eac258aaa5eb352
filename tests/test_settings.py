"""The settings, as whoever starts the service meets them: variables, options, exit statuses and messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from carso.settings import SECURITY, Settings, SettingsError, group_of, option, page, unknown_variables, variable

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.server import environment

ROOT = Path(__file__).parents[1]


def start(*options: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "carso.command", "serve", *map(str, options)],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_setting_has_a_description_a_group_and_a_default():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert group_of(name), name
        assert not field.is_required(), name


def test_the_settings_of_one_group_stand_together():
    groups = [group_of(name) for name in Settings.model_fields]
    changes = [group for before, group in zip(["", *groups], groups, strict=False) if group != before]
    assert len(changes) == len(set(changes))


def test_the_page_of_settings_is_the_one_that_the_code_writes():
    assert (ROOT / "docs/settings.md").read_text() == page(), "python -m carso.settings > docs/settings.md"


def test_settings_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("CARSO_PORT", "9000")
    monkeypatch.setenv("CARSO_BUNDLE", "somewhere/else")
    monkeypatch.setenv("CARSO_ALLOW_SEED", "false")
    monkeypatch.setenv("CARSO_RISK", "0")
    monkeypatch.setenv("CARSO_THREADS", "")  # as if it were not there
    settings = Settings.read()
    assert (settings.port, settings.bundle, settings.allow_seed) == (9000, Path("somewhere/else"), False)
    assert (settings.risk, settings.threads) == (0, None)


def test_an_option_wins_over_its_variable(monkeypatch):
    monkeypatch.setenv("CARSO_PORT", "9000")
    monkeypatch.setenv("CARSO_RISK", "0")
    settings = Settings.read({"port": "9001"})
    assert (settings.port, settings.risk) == (9001, 0)
    assert (settings.called("port"), settings.called("risk")) == ("--port", "CARSO_RISK")


def test_the_bundle_that_is_served_by_default_is_the_reference_bundle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mnist-conv").mkdir(parents=True)  # a folder of this name where the command runs is not meant
    assert Settings().bundle == ROOT / "models/mnist-conv"


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
    with pytest.raises(SettingsError) as refusal:
        Settings.read({name: value})
    assert str(refusal.value) == f"{option(name)}: {value!r} is not allowed; it must be {allowed}"
    monkeypatch.setenv(variable(name), value)
    with pytest.raises(SettingsError) as refusal:
        Settings.read()
    assert str(refusal.value) == f"{variable(name)}: {value!r} is not allowed; it must be {allowed}"


def test_a_security_setting_that_is_present_but_empty_is_refused(monkeypatch):
    names = [name for name in Settings.model_fields if group_of(name) == SECURITY]
    assert {"api_keys_file", "allow_seed", "evidence"} <= set(names)
    for name in names:
        with monkeypatch.context() as only, pytest.raises(SettingsError, match=f"{variable(name)}: ''"):
            only.setenv(variable(name), "")
            Settings.read()


@pytest.mark.parametrize("name", ["threads", "bundle", "api_keys_file"])
def test_an_option_that_is_empty_is_refused(name):
    with pytest.raises(SettingsError, match=f"{option(name)}: ''"):
        Settings.read({name: ""})


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("queue_rows", 1000, 64 * 10_001), ("fast_queue_rows", 1, 64 * 15), ("bodies_bytes", 1024, 8 * 2**20)],
)
def test_limits_that_could_never_take_the_largest_request_are_refused(monkeypatch, name, value, least):
    with pytest.raises(SettingsError, match=rf"^{variable(name)}: {value} .* at least {least} \("):
        Settings(**{name: value})
    with pytest.raises(SettingsError, match=rf"^{option(name)}: {value} .*CARSO_MAX_"):
        Settings.read({name: str(value)})


def test_limits_of_each_other_name_the_option_that_was_given():
    with pytest.raises(SettingsError, match=r"^CARSO_QUEUE_ROWS: .*--max-images 4096 at CARSO_MAX_SAMPLES 10000"):
        Settings.read({"max_images": "4096"})


def test_a_misspelt_setting_is_noticed(monkeypatch):
    monkeypatch.setenv("CARSO_PROT", "80")
    monkeypatch.setenv("CARSO_PORT", "80")
    assert unknown_variables() == ["CARSO_PROT"]


def test_a_bad_setting_stops_the_start_with_exit_status_2_and_one_line():
    message = "'70000' is not allowed; it must be an integer from 0 to 65535"
    for ended, name in ((start(port=70000), "CARSO_PORT"), (start("--port", 70000, port=1), "--port")):
        assert ended.returncode == 2
        assert ended.stderr == f"carso: {name}: {message}\n"


@pytest.mark.parametrize("args", [("--prot", "80"), ("8000",), ("--spin", "yes"), ("--port",)])
def test_an_argument_that_serve_does_not_know_stops_the_start_with_exit_status_2(args):
    ended = start(*args)
    assert ended.returncode == 2
    assert args[0] in ended.stderr or "yes" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_limit_below_the_default_of_the_bundle_stops_the_start():
    ended = start(bundle=shared_bundle(SMALL), device="cpu", max_samples=1000)
    assert ended.returncode == 2
    assert "CARSO_MAX_SAMPLES: 1000" in ended.stderr
    assert "at least 1500" in ended.stderr


def test_an_empty_file_of_keys_stops_the_start():
    ended = start(api_keys_file="")
    assert ended.returncode == 2
    assert "CARSO_API_KEYS_FILE" in ended.stderr


def test_a_folder_that_is_not_a_bundle_stops_the_start_with_its_name(tmp_path):
    ended = start("--bundle", tmp_path)
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


def test_the_help_of_serve_shows_every_setting_with_its_variable():
    ended = subprocess.run(
        [sys.executable, "-m", "carso.command", "serve", "--help"],
        env=environment() | {"COLUMNS": "200", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    text = re.sub(r"[│\s]+", " ", ended.stdout)
    for name in Settings.model_fields:
        assert f" {option(name)} " in text
        assert f"Variable: {variable(name)}." in text
        assert group_of(name) in text
