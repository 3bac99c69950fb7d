"""The page of a real server, in a browser; what else it does is in test_page_live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sgl_apr.server.api.install import UI_PATH
from sgl_apr.server.launch.launcher import Server
from tests.support.browser import launched, tab
from tests.views.test_page_browser import number


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.mark.server
def test_on_a_real_server(browser, server: Server):
    shown = tab(browser)
    shown.go(server.url + UI_PATH)
    shown.page.click("#options summary")
    shown.until("document.getElementById('dialect').options.length > 5", 60)
    shown.page.select_option("#dialect", "threadweaver")
    shown.page.select_option("#mode", "parallel")
    shown.page.fill("#width", "3")
    shown.page.fill("#tokens", "300")
    shown.page.fill("#prompt", "Why do cats purr?")
    shown.page.click("#run")
    shown.until("!live.run && known.entries.length", 120)
    figures = shown.page.evaluate("computeFigures(view.t)")
    assert figures["blocks"] > 0
    assert figures["critical"] < figures["tokens"] <= 300
    assert number(shown.text("[data-figure=tokens] b")) == figures["tokens"]
    assert figures["cached"] > 0
    assert shown.complaints == []
