"""A real browser for the tests: where Chromium and axe-core are, and a page that is watched. `python tests/browser.py`
gets what is missing, where it can, and says what it cannot get.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".browser"
AXE_VERSION = "4.14.1"
AXE = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
SCREENS = Path(os.environ.get("BLIP2NB_SCREENS") or ROOT / "docs" / "_build" / "screens")
"""Where the tests leave what they saw, to be looked at."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
LONG = 300_000
"""Milliseconds to wait for what is expected; only a test that fails waits so long."""


# -- getting it


def chromium() -> str:
    """The browser there is; "" for none."""
    return next(filter(None, map(shutil.which, NAMES)), "")


def missing() -> list[str]:
    """What the tests need and is not here."""
    return [what for what, here in ((NAMES[0], chromium()), (f"axe-core {AXE_VERSION}", axe_is_here())) if not here]


def axe_is_here() -> bool:
    about = AXE.with_name("package.json")
    return AXE.is_file() and f'"version": "{AXE_VERSION}"' in about.read_text()


def prepare() -> list[str]:
    """Get what is missing: Debian's Chromium and npm through apt, where that may be, and axe-core through npm.

    Returns:
        what is missing still.
    """
    apt = [] if chromium() else ["chromium", "fonts-liberation"]  # without fonts a page has other widths
    apt += [] if axe_is_here() or shutil.which("npm") else ["npm"]
    if apt and shutil.which("apt-get") and os.geteuid() == 0:
        print(f"Installing {' and '.join(apt)} with apt, for the tests in a browser.", flush=True)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *apt]):
            subprocess.run(["apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)
    if not axe_is_here() and (npm := shutil.which("npm")):
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--prefix", FOLDER]
        wanted = f"axe-core@{AXE_VERSION}"
        subprocess.run([npm, "install", *options, wanted], stdout=subprocess.DEVNULL, check=False)
    return missing()


# -- using it


@contextmanager
def opened() -> Iterator[Any]:
    """Chromium, started; ended with all its processes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS, timeout=LONG)
        yield browser
        browser.close()


class Watched:
    """A page, and what happened to it.

    Attributes:
        page: Playwright's.
        requests: the addresses that it asked for, whatever became of them; data that is in the page itself is none.
        complaints: the browser's errors and warnings, exceptions in scripts, and what the page's own policy forbade.
    """

    def __init__(self, browser: Any, *, offline: bool, width: int = 1280):
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme="light", reduced_motion="reduce")
        self.page = self.context.new_page()
        self.page.set_default_timeout(LONG)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._said)
        if offline:  # nothing that a page asks for is there, so that it shows what it is by itself
            self.context.route(lambda address: urlsplit(address).scheme != "file", lambda route: route.abort())

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.requests.append(request.url)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def violations(self, rule: str = "") -> list[str]:
        """What axe-core finds against WCAG 2 A and AA and good practice, or one rule; a line for each element.

        Of each table the first rows are looked at, and the others taken out: they are alike, and there are hundreds.
        """
        self.page.evaluate("document.querySelectorAll('tbody tr:nth-child(n + 12)').forEach(it => it.remove())")
        self.page.evaluate(_axe())
        found = self.page.evaluate("only => axe.run(document, {runOnly: only})", [rule] if rule else STANDARDS)
        assert found["passes"], "axe looked at the page"
        return [f"{one['id']}: {node['html'][:200]}" for one in found["violations"] for node in one["nodes"]]

    def scrolls_sideways(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")

    def tab_to(self, selector: str, key: str = "Tab") -> Any:
        """Press Tab until the element has the focus, as somebody without a mouse does."""
        target = self.page.locator(selector)
        assert target.count() == 1, selector
        for _ in range(1000):
            self.page.keyboard.press(key)
            if target.evaluate("it => it === document.activeElement"):
                return target
        raise AssertionError(f"{selector} is not reached with {key}")

    def keep(self, name: str, whole: bool = True) -> None:
        """Leave a picture of the page, or of what is in sight."""
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENS / f"{name}.png", full_page=whole, animations="disabled", timeout=LONG)


@functools.cache
def _axe() -> str:
    return AXE.read_text(encoding="utf-8")


if __name__ == "__main__":
    lacking = prepare()
    if lacking:
        print(f"No {' and no '.join(lacking)} can be had here: the tests in a browser are left out.", file=sys.stderr)
