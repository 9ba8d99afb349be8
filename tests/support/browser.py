"""Drive a headless Chromium from tests and from `python -m tests.support.browser PAGE PNG`.

    python -m tests.support.browser captions/report.html docs/report.png [--dark] [--script JAVASCRIPT]

Needs chromium and chromedriver on the PATH: Debian's packages chromium and chromium-driver, or others of these names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Only the page: no profile, no updates, no requests by the browser itself.
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def describe_missing() -> str:
    """Return what to install if the browser is missing, "" if it is available."""
    if not _find_browser() or not shutil.which("chromedriver"):
        return "needs chromium and chromedriver: apt-get install chromium chromium-driver"
    return ""


def _find_browser() -> str | None:
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


@contextmanager
def start_chromium(width_px: int = 1500, height_px: int = 1000) -> Iterator[Any]:
    """Yield a selenium driver that logs the page's console output and network requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = _find_browser() or ""
        for option in (*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width_px},{height_px}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # Naming the driver keeps selenium from searching for one and downloading it.
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def open_page(driver: Any, page: Path | str, *, dark: bool = False) -> None:
    show(driver, Path(page).resolve().as_uri(), dark=dark)


def show(driver: Any, url: str, *, dark: bool = False) -> None:
    """Load a page in the light or the dark scheme, also if it is the one that is shown."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get("about:blank")
    driver.get(url)


def set_width(driver: Any, width_px: int, height_px: int = 900) -> None:
    """Lay pages out for a screen of this width; below 500 px for a phone."""
    size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": width_px < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def find_overflow(driver: Any) -> list[str]:
    """Return the elements that make the page scroll sideways."""
    script = """
        const [room, root] = [document.documentElement.clientWidth, document.documentElement];
        if (root.scrollWidth <= room) return [];
        return [...document.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > room + 0.5)
            .map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`).slice(0, 20);
    """
    found: list[str] = driver.execute_script(script)
    return found


def take_requests(driver: Any) -> list[str]:
    """Return the URLs requested since the last call, except those that the page's own policy blocked."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    blocked = {e["params"]["requestId"] for e in events if e["params"].get("blockedReason") == "csp"}
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in sent if request["requestId"] not in blocked]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.browser", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--script", default="", help="script to run before the screenshot")
    parser.add_argument("--height-px", type=int, default=1000)
    args = parser.parse_args()
    with start_chromium(height_px=args.height_px) as driver:
        open_page(driver, args.page, dark=args.dark)
        driver.execute_script(args.script)
        driver.execute_cdp_cmd("Runtime.evaluate", {"expression": "document.fonts.ready", "awaitPromise": True})
        args.png.write_bytes(driver.get_screenshot_as_png())


if __name__ == "__main__":
    main()
