"""The page in a real browser: by mouse, by touch and by keyboard alone, wide and narrow, light and dark.

Its other half, without a browser, is tests/test_page.py. The browser is Debian's chromium.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import axe_playwright_python
import numpy as np
import pytest
from carso.settings import REFERENCE_BUNDLE
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.bundles import COLOUR, SMALL, shared_bundle
from tests.calls import as_npy
from tests.pictures import encoded
from tests.server import Server, serving
from tests.waiting import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
LARGEST = 150_000  # bytes of all that the page loads until its first election has ended
PREFIX = "/vision/carso"
# How a page tells of what its policy forbade
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""

expect.set_options(timeout=1000 * PATIENCE)


@dataclass
class Visit:
    """A page, and what happened on it."""

    page: Page
    errors: list[str] = field(default_factory=list)  # of its console, and what no script caught
    hosts: set[str] = field(default_factory=set)
    policies: set[str] = field(default_factory=set)
    received: int = 0  # bytes of bodies

    def settled(self) -> str:
        """Wait for the end of an election; what the page says of it."""
        verdict = self.page.locator("#verdict")
        expect(verdict).to_contain_text(re.compile("say|Draw something"))
        expect(self.page.locator("#robust .label")).to_have_text(re.compile(r"\S|^\s*$"))
        return verdict.inner_text()

    def anew(self, act: Callable[[], Any]) -> str:
        """Do something, and wait for the end of the election that this begins."""
        count = self.page.locator("main").get_attribute("data-ended") or "0"
        act()
        expect(self.page.locator("main")).not_to_have_attribute("data-ended", count)
        return self.settled()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield started
        started.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundle that ships, with its samples."""
    with serving(REFERENCE_BUNDLE, tmp_path_factory.mktemp("reference") / "log") as server:
        yield server


@contextmanager
def visiting(browser: Browser, url: str, **context: Any) -> Iterator[Visit]:
    """Visit a page, and hold it to what every page must keep."""
    opened = browser.new_context(**context)
    opened.add_init_script(VIOLATIONS)
    visit = Visit(opened.new_page())

    def finished(request: Any) -> None:
        visit.received += request.sizes()["responseBodySize"]

    def responded(response: Any) -> None:
        visit.policies |= {response.headers.get("content-security-policy", "none")} if response.url == url else set()

    visit.page.on("console", lambda message: message.type == "error" and visit.errors.append(message.text))
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on("request", lambda request: visit.hosts.add(urlsplit(request.url).netloc))
    visit.page.on("requestfinished", finished)
    visit.page.on("response", responded)
    visit.page.goto(url)
    yield visit
    assert visit.errors == []
    assert visit.hosts - {""} == {urlsplit(url).netloc}
    assert visit.page.evaluate("() => window.violations") == []
    opened.close()


@pytest.fixture
def visit(browser, reference) -> Iterator[Visit]:
    with visiting(browser, f"{reference.url}/") as started:
        started.settled()
        yield started


def strokes(page: Page) -> list[tuple[float, float]]:
    """Where a 1 goes through on the pad."""
    box = page.locator("#pad").bounding_box()
    return [(box["x"] + 0.5 * box["width"], box["y"] + part * box["height"]) for part in (0.2, 0.4, 0.6, 0.8)]


def draw_by_mouse(page: Page) -> None:
    first, *others = strokes(page)
    page.mouse.move(*first)
    page.mouse.down()
    for point in others:
        page.mouse.move(*point, steps=3)
    page.mouse.up()


def axe(page: Page) -> list[str]:
    """What axe-core finds, in a line each."""
    page.evaluate(AXE)
    found = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{rule['id']}: {node['html'][:120]} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


def test_it_opens_with_an_attack_that_fools_the_fast_path_and_fails_on_carso(browser, reference):
    with visiting(browser, f"{reference.url}/") as visit:
        assert "the image may have been manipulated" in visit.settled()
        expect(visit.page.locator("#fast .truth")).to_contain_text("wrong: it was a")
        expect(visit.page.locator("#robust .truth")).to_have_text("right")
        expect(visit.page.locator("#count")).to_contain_text("of at most 1500 votes were cast")
        expect(visit.page.locator("#risk-is")).to_contain_text("Counting stops at 0.001")
        expect(visit.page.locator("#change-is")).to_contain_text(re.compile("what was changed, .[0-9]"))
        expect(visit.page.locator("#voters li")).to_have_count(6)
        assert 0 < visit.received <= LARGEST
        (policy,) = visit.policies
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_drawing_by_mouse(visit):
    assert visit.anew(lambda: visit.page.click("#clear")).startswith("Draw something")
    assert "1" in visit.anew(lambda: draw_by_mouse(visit.page))
    expect(visit.page.locator("#robust .label")).to_have_text("1")
    expect(visit.page.locator("#fast .truth")).to_have_text("")  # nobody knows what a drawing is
    expect(visit.page.locator('input[name="kind"]').first).to_be_disabled()
    expect(visit.page.locator("#change-is")).to_contain_text("what purifying changes")
    middle = "(pad) => pad.getContext('2d').getImageData(pad.width / 2, pad.height / 2, 1, 1).data[0]"
    assert visit.page.locator("#pad").evaluate(middle) == 255
    visit.page.click("#eraser")
    visit.anew(lambda: draw_by_mouse(visit.page))
    assert visit.page.locator("#pad").evaluate(middle) == 0


def test_drawing_by_touch(browser, reference):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with visiting(browser, f"{reference.url}/", **phone) as visit:
        visit.settled()
        visit.anew(lambda: visit.page.tap("#clear"))
        visit.page.locator("#pad").scroll_into_view_if_needed()
        touch = visit.page.context.new_cdp_session(visit.page)

        def draw() -> None:
            # The finger rests before it is lifted. Else it would fling the page, and the next tap would only stop that.
            began = time.time() - 2
            for step, (kind, point) in enumerate(
                zip(("Start", "Move", "Move", "Move"), strokes(visit.page), strict=True)
            ):
                points, at = [{"x": point[0], "y": point[1]}], began + step / 10
                event = {"type": f"touch{kind}", "touchPoints": points, "timestamp": at}
                touch.send("Input.dispatchTouchEvent", event)
            touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": [], "timestamp": began + 1})

        visit.anew(draw)
        expect(visit.page.locator("#robust .label")).to_have_text("1")
        visit.anew(lambda: visit.page.tap("#thumbs button >> nth=0"))
        expect(visit.page.locator("#robust .truth")).to_have_text("right")


def test_everything_by_keyboard_alone(visit):
    page = visit.page
    keys = page.keyboard

    def go_to(selector: str) -> None:
        for _ in range(60):
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
            keys.press("Tab")
        raise AssertionError(f"Tab never comes to {selector}")

    go_to("#pad")
    visit.anew(lambda: keys.press("Delete"))
    for _ in range(8):
        keys.press("ArrowUp")
    keys.press("Space")
    for _ in range(16):
        keys.press("ArrowDown")
    visit.anew(lambda: keys.press("Space"))
    expect(page.locator("#robust .label")).to_have_text("1")
    go_to("#thumbs button")
    visit.anew(lambda: keys.press("Enter"))
    expect(page.locator("#robust .truth")).to_have_text("right")
    go_to('input[name="kind"]')
    visit.anew(lambda: keys.press("ArrowDown"))
    expect(page.locator("#strength-is")).to_have_text("0.3 of 1")
    go_to("#strength")
    visit.anew(lambda: keys.press("Home"))
    expect(page.locator("#strength-is")).to_have_text("none")
    go_to("#risk")
    visit.anew(lambda: keys.press("End"))
    expect(page.locator("#count")).to_contain_text("No vote that is left could change it")
    page.locator("#tab-attack").focus()
    keys.press("ArrowRight")
    expect(page.locator("#figures")).to_be_visible()
    expect(page.locator("#tab-figures")).to_be_focused()


def test_attacks_of_every_strength_and_those_that_fool_carso_are_marked(visit):
    page = visit.page
    fooled = page.locator("#thumbs .fooled")
    assert 0 < fooled.count() < page.locator("#thumbs button").count()
    visit.anew(page.locator("#thumbs button:not(.fooled)").first.click)  # the page may have opened with a fooling one
    visit.anew(fooled.last.click)
    visit.anew(lambda: page.check("text=all of CARSO"))
    assert page.locator("#versions li").count() == 6
    visit.anew(lambda: page.locator("#strength").fill("5"))
    expect(page.locator("#provenance")).to_contain_text("This one fools CARSO.")
    expect(page.locator("#versions li").last).to_have_class("fools-both")
    expect(page.locator("#provenance")).to_contain_text("not a choice")


def test_drawing_over_an_attacked_digit_and_noise_are_seen_in_what_was_changed(visit):
    page = visit.page
    before = page.locator("#change-is").inner_text()
    visit.anew(lambda: draw_by_mouse(page))
    expect(page.locator("#change-is")).to_contain_text("what was changed")
    assert page.locator("#change-is").inner_text() != before  # a stroke changes more than the attack did
    visit.anew(lambda: page.locator("#noise").fill("0.3"))
    expect(page.locator("#noise-is")).to_have_text("up to 0.3")


def test_a_file_of_another_size_is_fitted_and_can_be_inverted(visit, tmp_path):
    page = visit.page
    paper = np.full((120, 90), 255, np.uint8)
    paper[20:100, 40:52] = 0  # a 1 in dark ink
    (tmp_path / "one.png").write_bytes(encoded(paper))
    visit.anew(lambda: page.locator("#file").set_input_files(tmp_path / "one.png"))
    visit.anew(lambda: page.click("#invert"))
    assert page.locator("#robust .label").inner_text()
    (tmp_path / "text.png").write_bytes(b"no image")
    page.locator("#file").set_input_files(tmp_path / "text.png")
    expect(page.locator("#notice")).to_contain_text("text.png is not an image that this browser can read")


def test_a_file_that_is_dropped_or_pasted_is_taken(visit):
    make = """() => {
        const canvas = new OffscreenCanvas(28, 28), context = canvas.getContext("2d");
        context.fillStyle = "white";
        context.fillRect(12, 4, 4, 20);
        return canvas.convertToBlob().then((blob) => {
            window.files = new DataTransfer();
            window.files.items.add(new File([blob], "one.png", { type: "image/png" }));
        });
    }"""
    visit.page.evaluate(make)
    drop = '() => document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: files }))'
    visit.anew(lambda: visit.page.evaluate(drop))
    expect(visit.page.locator("#robust .label")).to_have_text("1")
    visit.anew(lambda: visit.page.click("#clear"))
    paste = '() => document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: files }))'
    visit.anew(lambda: visit.page.evaluate(paste))
    expect(visit.page.locator("#robust .label")).to_have_text("1")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_page_is_as_wide_as_its_screen_and_its_answers_stand_below_the_image(browser, reference, width):
    with visiting(browser, f"{reference.url}/", viewport={"width": width, "height": 844}) as visit:
        visit.settled()
        for tab in ("attack", "figures"):
            visit.page.click(f"#tab-{tab}")
            assert visit.page.evaluate("() => document.documentElement.scrollWidth") <= width
        visit.page.click("#tab-attack")
        tops = [visit.page.locator(part).bounding_box()["y"] for part in ("#image-card", ".answers", "#vote")]
        assert tops == sorted(tops)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1240])
def test_axe_finds_nothing(browser, reference, scheme, width):
    size = {"width": width, "height": 900}
    with visiting(browser, f"{reference.url}/", color_scheme=scheme, viewport=size, reduced_motion="reduce") as visit:
        visit.settled()
        assert axe(visit.page) == []
        visit.page.click("#tab-figures")
        expect(visit.page.locator("#served dd").first).to_be_visible()
        assert axe(visit.page) == []


def test_whoever_wants_less_motion_gets_none(browser, reference):
    with visiting(browser, f"{reference.url}/", reduced_motion="reduce") as visit:
        visit.settled()
        bar = visit.page.locator(".row.leader .track i")
        assert bar.evaluate("(bar) => getComputedStyle(bar).transitionDuration") in ("0s", "")


def test_the_second_tab_shows_the_service_and_has_an_address(browser, reference):
    with visiting(browser, f"{reference.url}/#service") as visit:
        expect(visit.page.locator("#figures")).to_be_visible()
        tile = visit.page.locator(".tile", has_text="Rows of work that are owed")
        expect(tile.locator(".value")).to_have_text("0")
        expect(visit.page.locator("#served")).to_contain_text("mnist-conv")
        expect(visit.page.locator(".tile svg polyline").first).to_be_attached()  # it looked twice


def test_it_works_below_a_prefix_and_asks_for_a_key_which_only_this_tab_keeps(browser, tmp_path):
    (tmp_path / "keys").write_text("tests: a-key-for-the-tests\n")
    settings = {"root_path": PREFIX, "api_keys_file": tmp_path / "keys"}
    with serving(REFERENCE_BUNDLE, tmp_path / "log", **settings) as server:
        url = f"{server.url}{PREFIX}/"
        with visiting(browser, url) as visit:
            page = visit.page
            expect(page.locator("#key")).to_be_visible()
            page.fill("#key-value", "another")
            page.keyboard.press("Enter")
            expect(page.locator("#key-wrong")).to_be_visible()
            page.fill("#key-value", "a-key-for-the-tests")
            page.click("#key button")
            visit.settled()
            expect(page.locator("#key")).to_be_hidden()
            kept = page.evaluate("() => [sessionStorage.length, localStorage.length, document.cookie]")
            assert kept == [1, 0, ""]
            assert page.context.cookies() == []
            assert {re.sub(r"^.*status of ", "", text)[:3] for text in visit.errors} == {"401"}  # the browser's own
            visit.errors.clear()


def test_where_evidence_is_withheld_it_shows_labels_only(browser, tmp_path):
    with (
        serving(REFERENCE_BUNDLE, tmp_path / "log", evidence="label") as server,
        visiting(browser, f"{server.url}/") as visit,
    ):
        assert "CARSO says" in visit.settled()
        expect(visit.page.locator("#robust .label")).to_have_text(re.compile(r"\d"))
        expect(visit.page.locator("#vote")).to_be_hidden()
        expect(visit.page.locator("#pictures")).to_be_hidden()


@pytest.mark.parametrize("config", [SMALL, COLOUR], ids=["small", "colour"])
def test_a_bundle_of_other_images_without_samples_is_drawn_on_too(browser, tmp_path, config):
    with (
        serving(shared_bundle(config), tmp_path / "log", canary_s=0) as server,
        visiting(browser, f"{server.url}/") as visit,
    ):
        page = visit.page
        expect(page.locator("#samples")).to_be_hidden()
        if config is SMALL:
            visit.anew(lambda: page.uncheck("#centre"))  # which begins an election, as drawing does
        else:
            expect(page.locator("#centring")).to_be_hidden()
            page.locator("#colour").fill("#ff8800")
        expect(page.locator("#provenance")).to_contain_text("ships no attacked images")
        visit.anew(lambda: draw_by_mouse(page))
        _, height, width = config.classifier.input_shape
        for name, size in (("height", height), ("width", width)):
            expect(page.locator("#read")).to_have_js_property(name, size)
        assert page.locator("#bars .row").count() == config.classifier.classes


def test_it_says_how_far_the_first_passs_label_is_proven_and_when_nothing_is(browser, tmp_path):
    sharp = np.random.default_rng(0).integers(0, 2, (40, 8, 8), dtype=np.uint8) * 255
    with serving(shared_bundle(SMALL), tmp_path / "log", canary_s=0) as server, server.client() as client:
        found = as_npy("/classify/fast", client, sharp[:, None] / np.float32(255), certify="max").json()["predictions"]
        proven = next(at for at, each in enumerate(found) if each["certified"])
        unproven = next(at for at, each in enumerate(found) if each["certified"] is None)
        with visiting(browser, f"{server.url}/") as visit:
            expect(visit.page.locator("#proof")).to_contain_text("A proof does not say that the label is right.")
            for at in (proven, unproven):
                (tmp_path / "image.png").write_bytes(encoded(sharp[at]))
                visit.anew(lambda: visit.page.locator("#file").set_input_files(tmp_path / "image.png"))
                claim, certified = visit.page.locator("#claim").inner_text(), found[at]["certified"]
                if certified is None:
                    assert claim == "Nothing is proven of this image, not even within 0.00781 of it."
                    continue
                said = re.fullmatch(
                    r"The first pass answers (.*) for every image within (.*) of this one: no value may differ by "
                    r"more\. Its score stays above all others by at least (.*)\.",
                    claim,
                )
                assert said[1] == found[at]["class_name"]
                for text, exact in zip(said.groups()[1:], (certified["eps"], certified["margin"]), strict=True):
                    assert 0.99 * exact < float(text) <= exact  # rounded, and never to more than is proven
                assert axe(visit.page) == []
            visit.page.click("#tab-figures")
            expect(visit.page.locator("#served")).to_contain_text("It does not prove that the label is right")


def test_a_bundle_that_can_prove_nothing_has_no_proofs_on_its_page(visit):
    expect(visit.page.locator("#proof")).to_be_hidden()
    assert "proof" not in visit.page.locator("#fast").inner_text()
    visit.page.click("#tab-figures")
    expect(visit.page.locator("#served")).to_contain_text("None can be given: bundle mnist-conv has no")


def test_a_service_that_went_away_is_told_of(browser, tmp_path):
    with serving(REFERENCE_BUNDLE, tmp_path / "log") as server, visiting(browser, f"{server.url}/") as visit:
        visit.settled()
        server.process.terminate()
        server.leaves()
        visit.page.click("#again")
        expect(visit.page.locator("#notice")).to_contain_text("The service does not answer")
        visit.errors.clear()  # the browser's own, of a connection that was refused
