"""/docs in a browser: everything comes from this service, with or without keys, below any prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urljoin

import httpx
import pytest

from tests.bundles import SMALL, shared_bundle
from tests.server import serving

PREFIX = "/vision/carso"
KINDS = {".css": "text/css", ".js": "text/javascript"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Has no key, asks a service that wants one, behind a prefix."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "keys").write_text("tests: a-key-for-the-tests\n")
    settings = {"root_path": PREFIX, "api_keys_file": folder / "keys"}
    with serving(shared_bundle(SMALL), folder / "log", **settings) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_all_that_the_page_loads_is_found_beside_it_without_a_key(browser, prefix):
    page = browser.get(f"{prefix}/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = [address for address in re.findall(r'(?:src|href)="([^"]*)"', page.text) if address != "data:,"]
    assert len(addresses) == 3
    for address in addresses:
        part = browser.get(urljoin(f"{prefix}/docs", address))
        assert part.status_code == 200
        assert part.headers["content-type"].startswith(KINDS[re.search(r"\.\w+$", address)[0]])
    (document,) = re.findall(r'url: "([^"]*)"', browser.get(f"{prefix}/docs/start.js").text)
    schema = browser.get(urljoin(f"{prefix}/docs", document)).json()
    assert schema["servers"] == [{"url": PREFIX}]
    assert schema["paths"]["/classify"]["post"]["security"] == [{"key": []}]  # so there is a button to type a key into


def test_the_page_names_no_other_host_and_its_policy_lets_it_ask_none(browser):
    page = browser.get("/docs")
    style = browser.get("/docs/swagger-ui.css").text
    for text in (page.text, browser.get("/docs/start.js").text):
        assert "//" not in text
    for address in re.findall(r"url\(([^)]{,40})|@import", style):
        assert address.strip("\"'").startswith("data:")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy.pop("img-src") == "'self' data:"
    for name in ("script-src", "style-src", "connect-src"):
        assert policy.pop(name) == "'self'"
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'none'"}
    assert "validatorUrl: null" in browser.get("/docs/start.js").text  # Swagger UI would ask a host of its own


def test_the_page_and_the_document_are_open_and_nothing_else_is(browser):
    for path in ("/docs", "/openapi.json"):
        assert browser.head(path).status_code == 200
    for path in ("/info", "/v2", "/docs/other.js", "/docs/../info"):
        assert browser.get(path).status_code == 401
