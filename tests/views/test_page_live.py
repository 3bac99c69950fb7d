"""The live page of a server in a browser: it sends prompts, shows trajectories as they are written, and ends with the server's."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import FastAPI
from sglang.srt.utils import auth

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.install import UI_PATH, allow_ui_without_key, make_router
from sgl_apr.server.api.service import TrajectoryService
from tests.runtime.test_loop import BOOM, FORK, scripted
from tests.runtime.tools.scripted_tools import call
from tests.runtime.tools.scripted_tools import engine as scripted_calls
from tests.support.browser import PHONE, Tab, launched, tab
from tests.support.masked_sampler import SampledEngine, masked
from tests.views.test_page import HOSTILE
from tests.views.test_page_browser import READ, lane_of, named, number, plain

KEY = "sesame"
SLOW = 0.004  # seconds a token
LONG = apr.Reply(" on and on" * 500, delay=0.02)
REPLIES = {
    "trunk": "Think. " + FORK, "branch_1": " one\n</Thread>", "branch_2": " two is longer\n</Thread>",
    "after": "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone.",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


def end_connections(service: RecordingService) -> None:
    """Close every connection of the server, as when its process is killed."""
    for connection in list(service.http.server_state.connections):
        service.loop.call_soon_threadsafe(connection.transport.abort)


class RecordingService(TrajectoryService):
    """Records the trajectories that it ran, on an engine of the test."""

    def __init__(self, engine: Any) -> None:
        model = SimpleNamespace(context_len=100_000, vocab_size=1000)
        super().__init__(
            SimpleNamespace(served_model_name="m", config_value=lambda _: False, model_config=model),
            ApiConfig(),
        )
        self._engine, self.made = engine, list[apr.Trajectory]()
        self.http: Any = None
        self.loop: Any = None

    async def run(self, *args: Any) -> apr.Trajectory:
        self.made.append(await super().run(*args))
        return self.made[-1]


@contextmanager
def serving(engine: Any, key: str | None = None) -> Iterator[tuple[str, RecordingService]]:
    """The routes of our server around an engine, in a thread; as SGLang guards them, if there is a key."""
    service = RecordingService(engine)

    app = FastAPI()
    app.include_router(make_router(lambda: service))
    with pytest.MonkeyPatch.context() as patch:
        if key:
            patch.setattr(
                auth, "decide_request_auth", partial(allow_ui_without_key, auth.decide_request_auth)
            )
            auth.add_api_key_middleware(app, api_key=key, admin_api_key=None)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            service.http, service.loop = server, server.servers[0].get_loop()
            yield f"http://127.0.0.1:{port}", service
        finally:
            server.should_exit = True
            thread.join(20)


def slow(**replies: apr.Reply | str) -> apr.ScriptedEngine:
    """The engine of `test_loop` that forks once into two, at the pace of a reader."""
    timed = {name: r if isinstance(r, apr.Reply) else apr.Reply(r) for name, r in (REPLIES | replies).items()}
    return scripted(**{name: r if r.delay else replace(r, delay=SLOW) for name, r in timed.items()})


def hold_branch_2(engine: apr.ScriptedEngine) -> threading.Event:
    """Keep branch 2 from ending until the event is set, so that the test can inspect the page."""
    real, gate = engine.decode, threading.Event()

    async def decode(request: apr.Request, on_tokens: Any = None) -> apr.Result:
        result = await real(request, on_tokens)
        while engine.tokenizer.decode(request.input_ids).endswith("2:") and not gate.is_set():
            await asyncio.sleep(0.01)
        return result

    engine.decode = decode  # type: ignore[method-assign]
    return gate


def submit(browser: Any, url: str, prompt: str = "Q: ", **options: Any) -> Tab:
    """Open the page and submit a prompt."""
    shown = tab(browser, **options)
    shown.go(url + UI_PATH)
    shown.page.fill("#prompt", prompt)
    shown.page.click("#run")
    return shown


def also(shown: Tab, options: dict) -> None:
    """Add options to the request that the page has no fields for."""
    shown.page.evaluate(
        f"requestBody = (old => () => ({{ ...old(), ...{json.dumps(options)} }}))(requestBody)"
    )


def check(shown: Tab, t: apr.Trajectory) -> None:
    """What the page ends with is this trajectory, text for text, with the figures of its metrics."""
    m = t.metrics()
    shown.until("!live.run && view.entry?.id !== 'running'")
    figures = shown.page.evaluate("computeFigures(view.t)")
    assert figures == {
        "tokens": m.total, "critical": m.critical_path, "inside": m.branch_tokens, "blocks": m.blocks, "branches": m.branches,
        "wall": m.wall_s, "calls": m.engine_calls, "prompt": m.prompt_tokens, "cached": m.cached_tokens,
        "again": m.reprefilled_tokens, "tools": m.tool_calls, "tool_s": m.tool_s, "critical_tool_s": m.critical_tool_s,
    }  # fmt: skip
    assert number(shown.text("[data-figure=tokens] b")) == m.total
    expected: dict[str, list] = {named(path): [] for path in {(), *(s.path for s in t.spans)}}
    for i, span in enumerate(t.spans):
        expected[named(lane_of(span))] += [[i, plain(span.text), span.origin]] if span.text else []
    assert shown.page.evaluate(READ) == expected
    expected = json.loads(t.to_json())
    actual = shown.page.evaluate("view.t")
    for name in ("calls", "tools", "limits", "decisions", "joins", "dialect"):
        assert actual[name] == expected["tool_calls" if name == "tools" else name]
    assert [(s["parents"], s["waits_for"]) for s in actual["spans"]] == [
        (s["parents"], s["waits_for"]) for s in expected["spans"]
    ]
    assert shown.page.evaluate("known.entries.at(-1).answer") == t.answer


def test_a_trajectory_is_followed_to_its_end(browser):
    engine = slow()
    gate = hold_branch_2(engine)
    with serving(engine) as (url, service):
        shown = submit(browser, url)
        shown.until("document.querySelectorAll('#now .now').length === 2")
        assert [shown.text(f'[data-branch="1.{k}"] p bdi') for k in (1, 2)] == ["left", "right"]
        shown.until("view.t.spans.some(s => s.open)")  # what is in no span yet is drawn as well
        shown.until("document.querySelector('[data-branch=\"1.2\"] .tail').textContent.includes('is longer')")
        assert shown.page.is_visible("#stop")
        gate.set()
        shown.until("!live.run")
        (made,) = service.made
        check(shown, made)
        assert shown.page.locator("#now").count() == 0
        assert not shown.page.is_visible("#stop")
        assert shown.text("#state").startswith("Done in ")
        assert shown.text("#found") == "1 trajectory"
        assert shown.complaints == []
        assert {r.removeprefix(url) for r in shown.requests if not r.startswith("data:")} == {
            UI_PATH,
            "/apr/dialects",
            "/apr/generate",
        }
        assert not shown.page.is_visible("#with-key"), "no key is needed"


def test_every_dialect_ends_as_the_server_has_it(browser):
    with serving(SampledEngine(masked("threadweaver"))) as (url, service):
        shown = tab(browser)
        shown.go(url + UI_PATH)
        shown.page.click("#options summary")
        shown.until("document.getElementById('dialect').options.length > 5")
        for k, name in enumerate(dialect_names(), 1):
            service._engine = SampledEngine(masked(name), seed=4)
            shown.page.select_option("#dialect", name)
            shown.page.select_option("#mode", "parallel")
            shown.page.fill("#width", str(min(3, apr.dialect(name).max_width)))
            shown.page.fill("#tokens", "1500")
            shown.page.fill("#prompt", "Q: ")
            shown.page.locator("#prompt").press("Control+Enter")
            shown.until(f"!live.run && known.entries.length === {k}", 60)
            check(shown, service.made[-1])
            assert service.made[-1].blocks
            assert service.made[-1].dialect == name


@pytest.mark.parametrize(
    "options", [{}, {"on_branch_failure": "retry", "retry": {"attempts": 1}}], ids=["request", "branch"]
)
def test_what_is_retried_is_void(browser, options: dict):
    """A branch that fails after it has written text, and is retried, leaves none of that text."""
    failures = [apr.EngineError("boom", 503)]
    engine = slow()
    script, gate = engine.script, hold_branch_2(engine)

    def fails_once(request: apr.Request, prompt: str) -> apr.Reply:
        reply = script(request, prompt)
        assert isinstance(reply, apr.Reply)
        return (
            replace(reply, text=" void 😀", error=failures.pop())
            if prompt.endswith("1:") and failures
            else reply
        )

    engine.script = fails_once
    with serving(engine) as (url, service):
        shown = tab(browser)
        shown.go(url + UI_PATH)
        also(shown, options)
        shown.page.fill("#prompt", "Q: ")
        shown.page.click("#run")
        shown.until(
            "document.querySelector('[data-branch=\"1.1\"] .tail')?.textContent === ' one\\n</Thread>'"
        )
        gate.set()
        shown.until("!live.run && known.entries.length")
        check(shown, service.made[0])
        assert "void" not in service.made[0].text
        assert not failures


def test_stopping_cancels(browser):
    engine = slow(branch_2=LONG)
    with serving(engine) as (url, service):
        shown = submit(browser, url)
        shown.until("document.querySelectorAll('#now .now').length === 2")
        shown.page.click("#stop")
        shown.until("!live.run")
        assert shown.text("#state") == "Stopped."
        check_ended(shown, "stopped")
        deadline = time.monotonic() + 10
        while service.admission.running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (service.admission.running, engine.active, service.made) == (0, set(), [])


def check_ended(shown: Tab, how: str) -> None:
    """Nothing says any more that the trajectory runs, and what had arrived is in the list."""
    assert "running" not in shown.page.evaluate("document.body.innerText").lower()
    assert shown.page.evaluate("[known.entries.length, known.entries.at(-1).method, view.entry.id]") == [
        1,
        how,
        0,
    ]
    assert "Think." in shown.page.evaluate("view.t.spans.map(s => s.text).join('')")
    assert not shown.page.is_visible("#stop")
    assert shown.page.is_visible("#retry")
    figures = shown.page.evaluate("[view.t.wall, view.t.running]")
    shown.page.wait_for_timeout(300)
    assert shown.page.evaluate("[view.t.wall, view.t.running]") == figures
    assert figures[1] is False


def test_a_lost_connection_is_told_and_retried(browser):
    engine = slow(branch_2=LONG)
    with serving(engine) as (url, service):
        shown = submit(browser, url)
        shown.until("document.querySelectorAll('#now .now').length === 2")
        shown.page.evaluate("live.run.stopping.abort = () => {}")
        service._engine = slow()
        end_connections(service)
        shown.until("!live.run")
        assert shown.text("#state") == "The connection to the server was lost. What had arrived is kept."
        check_ended(shown, "interrupted")
        shown.page.fill("#prompt", "Another prompt")
        shown.page.click("#retry")
        shown.until("!live.run && known.entries.length === 2")
        check(shown, service.made[0])
        assert service.made[0].prompt == "Q: ", "the same request is sent again"
        assert not shown.page.is_visible("#retry")


def test_a_server_that_is_gone(browser):
    with serving(slow()) as (url, _):
        shown = tab(browser)
        shown.go(url + UI_PATH)
        shown.until("live.server")
    shown.page.fill("#prompt", "Q: ")
    shown.page.click("#run")
    shown.until("!live.run && document.getElementById('state').classList.contains('wrong')")
    assert shown.text("#state") == "The server cannot be reached. Is it running?"
    assert shown.page.is_visible("#retry")


def test_a_reload_keeps_the_trajectories_and_the_form(browser):
    engine = slow()
    with serving(engine) as (url, service):
        shown = submit(browser, url)
        shown.until("!live.run && known.entries.length")
        before = shown.page.evaluate("JSON.stringify(view.t)")
        shown.page.click("#options summary")
        shown.page.fill("#width", "3")
        shown.page.select_option("#dialect", "threadweaver")
        reload(shown)
        assert shown.page.evaluate("[known.entries.length, view.entry.id, JSON.stringify(view.t)]") == [
            1,
            0,
            before,
        ]
        check(shown, service.made[0])
        assert [shown.page.input_value(f"#{name}") for name in ("prompt", "width")] == ["Q: ", "3"]
        shown.until("document.getElementById('dialect').value === 'threadweaver'")
        gate = hold_branch_2(engine)
        shown.page.click("#run")
        shown.until("document.querySelectorAll('#now .now').length === 2")
        reload(shown)
        gate.set()
        assert shown.page.evaluate("known.entries.map(e => e.method)") == ["threadweaver", "interrupted"]
        assert shown.text("#state") == "The page was reloaded. What had arrived is kept."
        shown.page.click("#retry")
        shown.until("!live.run && known.entries.length === 3")
        assert len(service.made) == 2
        check(shown, service.made[1])
        other = tab(browser)
        other.go(url + UI_PATH)
        assert other.page.evaluate("known.entries.length") == 0, "another tab does not see it"


def test_what_a_reload_keeps_is_bounded(browser):
    with serving(slow()) as (url, _):
        shown = submit(browser, url)
        shown.until("!live.run && known.entries.length")
        copies = 40
        shown.page.evaluate(
            f"for (let k = 0; k < {copies}; k++) addEntry({{...rowFor(startRun('p' + k), view.t), answer: 'x'.repeat(1e5)}}, view.t)"
        )
        reload(shown)
        kept = shown.page.evaluate("known.entries.map(e => e.name)")
        assert 10 < len(kept) < 20
        assert kept[-1] == f"p{copies - 1}", "the newest are kept"


def reload(shown: Tab) -> None:
    shown.page.reload()
    shown.page.wait_for_selector("body[data-ready]", state="attached")


def test_another_is_looked_at_meanwhile(browser):
    engine = slow()
    with serving(engine) as (url, service):
        shown = submit(browser, url)
        shown.until("!live.run && known.entries.length")
        gate = hold_branch_2(engine)
        shown.page.click("#run")
        shown.until("document.querySelectorAll('#now .now').length === 2")
        assert not shown.page.is_visible("#follow")
        shown.page.locator("#rows [role=option]").first.click()
        shown.until("view.entry.id === 0")
        shown.until("!document.getElementById('follow').hidden")
        shown.page.click("#follow")
        shown.until("view.entry.id === 'running'")
        gate.set()
        shown.until("!live.run")
        check(shown, service.made[1])
        assert shown.text("#found") == "2 trajectories"


@pytest.mark.parametrize(
    ("replies", "more", "message"),
    [
        ({"trunk": BOOM}, {}, "boom"),
        pytest.param({"after": BOOM}, {}, "boom", marks=pytest.mark.slow),
        ({}, {"budget": {"width": 99}}, "at most 50"),
    ],
)
def test_errors_are_shown(browser, replies: dict, more: dict, message: str):
    with serving(slow(**replies)) as (url, _):
        shown = tab(browser)
        shown.go(url + UI_PATH)
        also(shown, {"retry": {"attempts": 1}} | more)
        shown.page.fill("#prompt", "Q: ")
        shown.page.click("#run")
        shown.until("!live.run && document.getElementById('state').classList.contains('wrong')")
        assert message in shown.text("#state")
        assert shown.page.is_enabled("#run")


def test_the_key_is_asked_for_and_kept_nowhere(browser):
    with serving(slow(), KEY) as (url, service):
        for path in ("/apr/dialects", "/apr/stats", f"{UI_PATH}/", f"{UI_PATH}/x"):
            assert requests.get(url + path, timeout=10).status_code == 401
        assert requests.post(url + UI_PATH, timeout=10).status_code == 401
        for method in ("generate", "ui"):
            assert requests.post(f"{url}/apr/{method}", json={}, timeout=10).status_code == 401
        answer = requests.get(url + UI_PATH, timeout=10)
        assert (answer.status_code, answer.headers["X-Content-Type-Options"]) == (200, "nosniff")
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        shown = submit(browser, url)
        shown.until("!live.run && document.getElementById('state').classList.contains('wrong')")
        assert shown.page.is_visible("#with-key")
        assert shown.text("#state") == "This server needs an API key."
        assert shown.page.evaluate("document.activeElement.id") == "key"
        shown.page.fill("#key", KEY)
        shown.page.click("#run")
        shown.until("!live.run && known.entries.length")
        check(shown, service.made[0])
        stored = shown.page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
        )
        assert KEY not in stored
        assert all(KEY not in request for request in shown.requests)
        shown.page.reload()
        shown.page.wait_for_selector("body[data-ready]", state="attached")
        assert shown.page.input_value("#key") == ""


def test_hostile_words_change_nothing(browser):
    words = "".join(text for text in HOSTILE if "\ud800" not in text)
    engine = slow(branch_1=f" {words}\n</Thread>", branch_2=f" {words}\n</Thread>")
    gate = hold_branch_2(engine)
    with serving(engine) as (url, service):
        shown = submit(browser, url, f"Q: {words}", viewport=PHONE)
        shown.until("document.querySelectorAll('#now .now').length === 2")
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        gate.set()
        shown.until("!live.run && known.entries.length", 30)
        check(shown, service.made[0])
        assert shown.page.evaluate("[window.pwned, document.scripts.length]") == [None, 2]
        assert shown.complaints == []


def test_a_tool_that_runs_is_drawn_until_it_returns(browser):
    """By the events of a server, as the page gets them."""
    call = {
        "id": "a", "path": [1, 1], "name": HOSTILE[0], "arguments": "{}", "result": "3 hits", "outcome": "timeout",
        "started": 0.0, "ended": 0.5, "truncated": False,
    }  # fmt: skip
    with serving(slow()) as (url, _):
        shown = tab(browser)
        shown.go(url + UI_PATH)
        shown.page.evaluate(
            """call => {
                const run = window.run = live.run = startRun("Q: "), path = call.path, send = (kind, event) => EVENT_HANDLERS[kind](run, event);
                send("span_finished", { index: 0, span: { role: "prompt", origin: "prompt", text: "Q: ", token_ids: [1], parents: [], path: [], label: "", finish: null, call: null, waits_for: [], outline: "" } });
                send("forked", { path: [1], branches: [["1", "count"], ["2", "guess"]], first_branch: 1 });
                send("delta", { path, text: "Let me look. " });
                send("span_finished", { index: 1, span: { role: "call", origin: "decoded", text: "Let me look. ", token_ids: [1, 2], parents: [0], path, label: "a", finish: "stop", call: null, waits_for: [], outline: "" } });
                send("tool_called", call);
                drawRun(run);
            }""",
            call,
        )
        assert shown.text('[data-branch="1.1"] .soft') == f"runs {plain(HOSTILE[0])[:29]}…"
        assert shown.text('[data-branch="1.2"] .soft') == "running"
        assert shown.page.locator(".stripes").count() == 1
        time.sleep(0.2)
        first = shown.page.evaluate("currentTrajectory(run).tools[0]")
        assert first["open"]
        assert first["ended"] - first["started"] >= 0.2
        assert shown.page.evaluate(
            "tooltipLines(view.layout, view.lanes[1], view.layout.ends.at(-1) - 1e-6)"
        )[3].startswith("running, ")
        shown.page.evaluate(
            "call => { EVENT_HANDLERS.tool_returned(run, { index: 0, call }); redraw(run, currentTrajectory(run)); }",
            call,
        )
        assert shown.text('[data-branch="1.1"] .soft') == "running"
        assert shown.page.evaluate("currentTrajectory(run).tools") == [call]
        assert shown.page.evaluate("toolFigures(currentTrajectory(run))") == {
            "tools": 1,
            "tool_s": 0.5,
            "critical_tool_s": 0.5,
        }
        assert shown.complaints == []


def test_a_trajectory_with_tools_is_followed_to_its_end(browser):
    """Of a server that runs the tools: the page shows which run, and ends with what the server has."""
    gate = threading.Event()

    async def search(query: str) -> str:
        """Search."""
        while query == "held" and not gate.is_set():
            await asyncio.sleep(0.01)
        return f"found {query} {HOSTILE[0]}"

    ended = f"{HOSTILE[0]}\n</tool_response>\n"
    script = {
        "Q: ": "Hm. " + call("search", query="trunk"),
        f"found trunk {ended}": "So. " + FORK,
        "1:": " one" + call("search", query="held"),
        "2:": " two" + call("search", query="plain"),
        f"found held {ended}": "\n</Thread>",
        f"found plain {ended}": "\n</Thread>",
        "</Parallel>": " Done.",
        "\n": "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone.",
    }
    engine = scripted_calls(script, apr.ByteTokenizer(apr.dialect("threadweaver").tags))
    engine.tool_call_parser = "qwen25"
    with serving(engine) as (url, service):
        service.operator_tools.tools = (apr.Tool.from_function(search),)
        shown = tab(browser)
        shown.go(url + UI_PATH)
        also(shown, {"tools": ["search"]})
        shown.page.fill("#prompt", "Q: ")
        shown.page.click("#run")
        shown.until("live.run?.tools.size === 3 && live.run.tools.get('call_1.2_1')?.outcome === 'ok'", 30)
        shown.until("document.querySelector('[data-branch=\"1.1\"] .soft')?.textContent === 'runs search'")
        gate.set()
        shown.until("!live.run", 30)
        (made,) = service.made
        assert {c.id: c.outcome for c in made.tool_calls} == {
            "call_1": "ok",
            "call_1.1_1": "ok",
            "call_1.2_1": "ok",
        }
        check(shown, made)
        assert shown.complaints == []
