"""Spans as an OpenTelemetry SDK gets them, and that nothing comes of its absence or its failures."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode, Tracer

from sgl_apr.errors import BranchFailed
from sgl_apr.runtime import telemetry
from sgl_apr.runtime.telemetry import export
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.tool_calls import ToolCall

CALLS = (
    Call("trunk", (), 10, 0, 10, 50, 0.0, 1.0),
    Call("commit", (), 61, 60, 1, 0, 1.0, 1.1),
    Call("branch", (1, 2, 1, 1), 70, None, 5, 8, 1.5, 2.75, retries=2),
    Call("branch", (1, 1), 65, 61, 4, 20, 1.25, 2.0),
    Call("rejoin", (1, 2), 90, 80, 2, 3, 2.75, 3.0),
    Call("branch", (1, 2), 65, 61, 4, 30, 1.125, 1.5),
    Call("after", (), 120, 84, 1, 30, 3.0, 4.0),
)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Tracer:
    """Of a provider of the test's own: the global one can be set once a process."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(telemetry, "_tracer", lambda: tracer)
    return tracer


def seconds(span: ReadableSpan, root: ReadableSpan) -> tuple[float, float]:
    """When a span began and ended, counted from the beginning of the root."""
    return (span.start_time - root.start_time) / 1e9, (span.end_time - root.start_time) / 1e9


@pytest.mark.usefixtures("tracer")
def test_the_tree(exporter: InMemorySpanExporter):
    before = time.time_ns()
    export("threadweaver", CALLS, 4.25, attributes={"apr.mode": "auto", "gen_ai.request.seed": 3})
    after = time.time_ns()
    spans = exporter.get_finished_spans()
    root = spans[-1]
    assert (root.name, root.parent, root.status.status_code) == ("apr.trajectory", None, StatusCode.UNSET)
    assert root.attributes == {"apr.dialect": "threadweaver", "apr.mode": "auto", "gen_ai.request.seed": 3}
    assert before <= root.end_time <= after
    assert seconds(root, root) == (0, 4.25)
    names = {s.context.span_id: s.name for s in spans}
    assert sorted((names[s.parent.span_id], s.name, *seconds(s, root)) for s in spans[:-1] if s.parent) == [
        ("apr.branch 1.1", "apr.branch", 1.25, 2.0),
        ("apr.branch 1.2", "apr.branch", 1.125, 1.5),
        ("apr.branch 1.2", "apr.branch 1.2.1.1", 1.5, 2.75),
        ("apr.branch 1.2", "apr.rejoin", 2.75, 3.0),
        ("apr.branch 1.2.1.1", "apr.branch", 1.5, 2.75),
        ("apr.trajectory", "apr.after", 3.0, 4.0),
        ("apr.trajectory", "apr.branch 1.1", 1.25, 2.0),
        ("apr.trajectory", "apr.branch 1.2", 1.125, 3.0),
        ("apr.trajectory", "apr.commit", 1.0, 1.1),
        ("apr.trajectory", "apr.trunk", 0.0, 1.0),
    ]


@pytest.mark.usefixtures("tracer")
def test_what_a_call_says(exporter: InMemorySpanExporter):
    export("threadweaver", CALLS, 4.0)
    calls = [s.attributes for s in exporter.get_finished_spans() if "apr.retries" in s.attributes]
    assert len(calls) == len(CALLS)
    commit, retried = calls[1:3]
    assert commit == {
        "apr.path": "",
        "gen_ai.usage.input_tokens": 61,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.output_tokens": 0,
        "apr.new_tokens": 1,
        "apr.retries": 0,
    }
    assert retried == {
        "apr.path": "1.2.1.1",
        "gen_ai.usage.input_tokens": 70,
        "gen_ai.usage.output_tokens": 8,
        "apr.new_tokens": 5,
        "apr.retries": 2,
    }


@pytest.mark.usefixtures("tracer")
def test_calls_of_tools(exporter: InMemorySpanExporter):
    secret = '{"password": "hunter2"}'
    tool_calls = (
        ToolCall("call_1", (), "search", secret, secret, "ok", 1.0, 1.5),
        ToolCall("call_2", (1, 2), "fetch", secret, secret, "timeout", 1.5, 3.5),
        ToolCall("call_3", (2, 1), "fetch", secret, secret, "error", 3.5, 4.0),
    )
    export("threadweaver", CALLS, 4.25, tool_calls=tool_calls)
    spans = exporter.get_finished_spans()
    names = {s.context.span_id: s.name for s in spans}
    ok, late, failed = (s for s in spans if s.name.startswith("execute_tool"))
    assert [names[s.parent.span_id] for s in (ok, late, failed)] == [
        "apr.trajectory",
        "apr.branch 1.2",
        "apr.branch 2.1",
    ]
    assert [seconds(s, spans[-1]) for s in (ok, late)] == [(1.0, 1.5), (1.5, 3.5)]
    (branch,) = (s for s in spans if s.name == "apr.branch 1.2" and s.attributes == {"apr.path": "1.2"})
    assert seconds(branch, spans[-1]) == (1.125, 3.5), "it lasts until its tool has returned"
    assert (ok.name, ok.status.status_code) == ("execute_tool search", StatusCode.UNSET)
    assert ok.attributes == {
        "apr.path": "",
        "apr.tool.outcome": "ok",
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "search",
        "gen_ai.tool.call.id": "call_1",
    }
    assert (late.status.status_code, late.status.description) == (StatusCode.ERROR, "timeout")
    assert (late.attributes["error.type"], failed.attributes["error.type"]) == ("timeout", "error")
    assert "hunter2" not in "".join(s.to_json() for s in spans)


def test_it_is_a_child_of_the_current_span(tracer: Tracer, exporter: InMemorySpanExporter):
    with tracer.start_as_current_span("request"):
        export("threadweaver", CALLS, 4.0)
    *_, root, request = exporter.get_finished_spans()
    assert root.parent == request.context
    assert {s.context.trace_id for s in exporter.get_finished_spans()} == {request.context.trace_id}


@pytest.mark.usefixtures("tracer")
def test_an_error(exporter: InMemorySpanExporter):
    try:
        raise BranchFailed("branch 1.2: gone", (1, 2))
    except BranchFailed as error:
        export("threadweaver", CALLS[:2], 2.0, error=error)
    *calls, root = exporter.get_finished_spans()
    assert (root.status.status_code, root.status.description) == (
        StatusCode.ERROR,
        "BranchFailed: branch 1.2: gone",
    )
    (event,) = root.events
    assert event.timestamp == root.end_time
    assert event.attributes["exception.type"] == "sgl_apr.errors.BranchFailed"
    assert "test_telemetry.py" in str(event.attributes["exception.stacktrace"])
    assert [s.status.status_code for s in calls] == [StatusCode.UNSET] * 2


def test_what_is_not_recorded_is_not_made(monkeypatch: pytest.MonkeyPatch):
    """One span that is dropped, and neither calls nor attributes are looked at."""
    tracer, started = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test"), []
    start = tracer.start_span
    monkeypatch.setattr(
        tracer, "start_span", lambda name, *args, **kw: (started.append(name), start(name))[1]
    )
    monkeypatch.setattr(telemetry, "_tracer", lambda: tracer)
    monkeypatch.setattr(telemetry, "_export_calls", lambda *args: started.append("calls"))
    export("threadweaver", CALLS, 4.0)
    assert started == ["apr.trajectory"]


def test_a_failure_is_logged_and_not_raised(
    tracer: Tracer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the exporter is broken")

    monkeypatch.setattr(tracer, "start_span", broken)
    export("threadweaver", CALLS, 4.0)
    assert "the exporter is broken" in caplog.text


def test_without_opentelemetry(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """It is looked for once: what is found later changes nothing."""
    telemetry._tracer.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "opentelemetry", None)
            export("threadweaver", CALLS, 4.0)
        assert telemetry._tracer() is None
        assert not caplog.records
    finally:
        telemetry._tracer.cache_clear()


def test_a_provider_may_come_later():
    """In a process of its own, with the global provider; importing the module loads nothing of it."""
    code = """
import sys
from sgl_apr.runtime.telemetry import export
print("opentelemetry" in sys.modules)
export("threadweaver", (), 1.0)
print("opentelemetry.sdk" in sys.modules)
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
export("threadweaver", (), 1.0)
print([(s.name, s.instrumentation_scope.name) for s in exporter.get_finished_spans()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "False", "[('apr.trajectory', 'sgl_apr')]"]
