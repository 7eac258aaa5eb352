"""How soon a browser shows the page, and the first answer on it.

    python -m benchmarks.page [URL]

The service runs already (`carso serve`), on a machine that does nothing else. Times are from the beginning of the
navigation, in milliseconds, of so many fresh visits. The browser is Debian's chromium.
"""

from __future__ import annotations

import shutil
import statistics
import sys

from playwright.sync_api import expect, sync_playwright

VISITS = 15
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
NOW = "() => performance.now()"


def main() -> None:
    """Print the medians and the worst."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/"
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium: apt-get install chromium")
    painted, answered = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*ARGUMENTS])
        for _ in range(VISITS):
            context = browser.new_context(reduced_motion="reduce")
            page = context.new_page()
            page.goto(url)
            expect(page.locator("#verdict")).not_to_be_empty()
            answered.append(page.evaluate(NOW))
            painted.append(page.evaluate(PAINTED))
            context.close()
        browser.close()
    for name, times in (("first contentful paint", painted), ("first answer", answered)):
        print(f"{name}: median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms of {VISITS} visits")


if __name__ == "__main__":
    main()
