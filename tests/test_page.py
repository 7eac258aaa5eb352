"""The page, its samples and `carso demo`, without a browser; tests/test_browser.py has one."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import carso
import httpx
import pytest
from carso.api.answers import SampleImages
from carso.browser import opens
from carso.bundle import Bundle
from carso.settings import REFERENCE_BUNDLE

from tests.bundles import SMALL, shared_bundle
from tests.calls import refused
from tests.server import ROOT, environment, serving
from tests.waiting import PATIENCE, eventually

PREFIX = "/vision/carso"
KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
LARGEST = 120_000  # bytes of all files, so that there is room for the first samples and the first answer in 150 kB
FILES = Path(carso.__file__).parent / "page"


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Has no key, asks a service that wants one, behind a prefix."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys").write_text("tests: a-key-for-the-tests\n")
    settings = {"root_path": PREFIX, "api_keys_file": folder / "keys"}
    with serving(REFERENCE_BUNDLE, folder / "log", **settings) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_all_that_the_page_loads_is_found_below_it_without_a_key(keyless, prefix):
    page = keyless.get(f"{prefix}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = set(re.findall(r'(?:src|href)="(page/[^"]*)"', page.text))
    assert addresses == {f"page/{file.name}" for file in FILES.iterdir() if file.suffix != ".html"}
    for address in addresses:
        part = keyless.get(urljoin(f"{prefix}/", address))
        assert part.status_code == 200
        assert part.headers["content-type"] == KINDS[Path(address).suffix]
        for name in re.findall(r'from "\./([^"]*)"', part.text):
            assert f"page/{name}" in addresses  # preloaded, so that no file waits for another


def test_the_page_is_small_names_no_other_host_and_has_neither_inline_scripts_nor_styles():
    assert sum(file.stat().st_size for file in FILES.iterdir()) < LARGEST
    for file in FILES.iterdir():
        text = file.read_text()
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}, file
        assert not re.search(r"<style|\sstyle=|\son\w+=\"|<script>|javascript:|eval\(|innerHTML", text), file


def test_the_policy_lets_the_page_ask_this_service_alone(keyless):
    policy = dict(part.strip().split(" ", 1) for part in keyless.get("/").headers["content-security-policy"].split(";"))
    assert policy.pop("img-src") == "'self' data:"
    for name in ("script-src", "style-src", "connect-src"):
        assert policy.pop(name) == "'self'"
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'none'"}


def test_the_page_is_open_and_the_samples_need_a_key(keyless):
    assert keyless.head("/").status_code == 200
    for path in ("/samples", "/samples/00000-clean.png", "/page/other.js"):
        refused(keyless.get(path), 401, "unauthorized")
    key = {"authorization": "Bearer a-key-for-the-tests"}
    assert keyless.get("/samples", headers=key).status_code == 200


def test_the_samples_of_the_bundle_are_served_with_what_was_answered(keyless):
    key = {"authorization": "Bearer a-key-for-the-tests"}
    bundle = Bundle.load(REFERENCE_BUNDLE)
    samples = SampleImages.model_validate_json(keyless.get("/samples", headers=key).content)
    assert (samples.split, samples.images) == (bundle.samples.split, bundle.samples.images)
    for sample in (samples.images[0], samples.images[-1]):
        picture = keyless.get(f"/samples/{sample.file}", headers=key)
        assert picture.headers["content-type"] == "image/png"
        assert picture.content == bundle.sample_files[sample.file]
    for name in ("samples.json", "none.png", "..%2Fmanifest.json"):
        assert keyless.get(f"/samples/{name}", headers=key).json()["error"] == "not_found"


def test_a_bundle_without_samples_says_so(client):
    assert client.get("/samples").json() == {"split": None, "risk": None, "images": []}


def test_an_operator_can_do_without_the_page(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", page="false") as server, server.client() as client:
        for path in ("/", "/page/app.js"):
            refused(client.get(path), 404, "not_found")
        assert client.get("/docs").status_code == 200


# carso demo


def demo(tmp_path: Path, *arguments: str, **variables: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the command; what it says is written to a file."""
    told = tmp_path / "told"
    settings = environment(bundle=shared_bundle(SMALL), port=0, device="cpu", threads=1)
    windows = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "WSL_DISTRO_NAME")
    clean = {name: value for name, value in settings.items() if name not in windows}
    with told.open("wb") as out, (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "carso.command", "demo", *arguments]
        return subprocess.Popen(command, env=clean | variables, stdout=out, stderr=log, cwd=ROOT), told


def ended(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_the_demo_serves_the_page_and_opens_it_in_a_browser(tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    process, told = demo(tmp_path, "--root-path", PREFIX, BROWSER=f"{browser} %s")
    try:
        url = eventually(lambda: (tmp_path / "opened").read_text().strip() if (tmp_path / "opened").exists() else "")
        assert re.fullmatch(rf"http://127\.0\.0\.1:\d+{PREFIX}/", url)
        assert "CARSO" in httpx.get(url, timeout=PATIENCE).text  # it waits while the service starts
        assert told.read_text() == f"The page is at {url}\n"
    finally:
        ended(process)


def test_the_demo_says_where_the_page_is_on_a_machine_without_a_browser(tmp_path):
    process, told = demo(tmp_path)
    try:
        line = eventually(told.read_text)
        assert re.fullmatch(
            r"The page is at http://127\.0\.0\.1:\d+/ \(there is no browser here to open it in\)\n", line
        )
        assert httpx.get(line.split()[4], timeout=PATIENCE).status_code == 200
    finally:
        ended(process)


def test_a_demo_without_its_page_is_refused(tmp_path):
    process, _ = demo(tmp_path, "--no-page")
    assert process.wait(PATIENCE) == 2
    assert "--page: false is not allowed with `carso demo`" in (tmp_path / "log").read_text()


def test_a_machine_without_any_known_browser_opens_none(monkeypatch):
    monkeypatch.setenv("BROWSER", "no-such-browser")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("webbrowser._browsers", {})
    monkeypatch.setattr("webbrowser._tryorder", [])
    assert not opens("http://127.0.0.1/")
