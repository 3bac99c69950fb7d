"""Runs pages in headless Chromium, and records their network requests and console messages."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Tab:
    """A page in its own browser context.

    Attributes:
        page: Playwright's page.
        requests: The URLs that the page requested.
        complaints: Console messages, errors and dialogs of the page.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def go(self, url: str) -> Any:
        self.page.goto(url)
        self.page.wait_for_selector("body[data-ready]", state="attached")
        return self.page

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def until(self, expression: str, seconds: float = 10.0) -> None:
        """Wait until an expression is true. Playwright's own method is forbidden by the page's security policy."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)


def launched() -> Iterator[Any]:
    """Yield a browser for a fixture, or skip if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def tab(browser: Any, viewport: dict[str, int] = WIDE, **options: Any) -> Tab:
    made = Tab(browser.new_context(viewport=viewport, **options).new_page())
    made.page.on("request", lambda request: made.requests.append(request.url))
    made.page.on("console", lambda line: made.complaints.append(f"{line.type}: {line.text}"))
    made.page.on("pageerror", lambda error: made.complaints.append(f"error: {error}"))
    made.page.on("dialog", lambda dialog: made.complaints.append(f"dialog: {dialog.message}"))
    return made


def url(path: Path, entry: int | None = None) -> str:
    return path.as_uri() + ("" if entry is None else f"#t{entry}")
