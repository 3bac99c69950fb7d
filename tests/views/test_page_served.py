"""The page of a real server, in a browser; what else it does is in test_page_live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sgl_apr.server.api.install import UI_PATH
from sgl_apr.server.launch.launcher import Server
from tests.support.browser import launched, tab
from tests.views.test_page_browser import number

PROMPT = "view.t.spans.filter(isPrompt).map(s => s.text).join('')"


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
    assert shown.page.input_value("#format") == "chat", "the model has a chat template"
    assert (
        shown.page.evaluate(PROMPT)
        == "<|im_start|>user\nWhy do cats purr?<|im_end|>\n<|im_start|>assistant\n"
    )
    shown.page.select_option("#format", "plain")
    shown.page.click("#run")
    shown.until("!live.run && known.entries.length === 2", 120)
    assert shown.page.evaluate(PROMPT) == "Why do cats purr?"
    assert shown.complaints == []


@pytest.mark.server
def test_a_model_without_a_chat_template_gets_plain_text(browser, solver: Server):
    shown = tab(browser)
    shown.go(solver.url + UI_PATH)
    shown.page.fill("#prompt", " 39: 6 12 18 23")
    shown.page.click("#run")
    shown.until("!live.run && known.entries.length", 120)
    assert shown.page.input_value("#format") == "plain"
    assert shown.page.evaluate(PROMPT) == " 39: 6 12 18 23"
    assert shown.complaints == []
