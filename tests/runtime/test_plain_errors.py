"""Engines that raise what their connection raised: every method of them, in the loop and in methods."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.http_errors import translate_errors
from sgl_apr.methods.session import MethodSession, method_session
from tests.support.threadweaver_traces import TAGS

FORK = "<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Outlines>"
REPLIES = {
    "trunk": "Think. " + FORK,
    "branch 1": " one\n</Thread>",
    "branch 2": " two is longer\n</Thread>",
    "after": "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone.",
}
ERRORS = [
    ConnectionError("gone"),
    ConnectionResetError(),
    OSError(24, "Too many open files"),
    TimeoutError("slow"),
]
MESSAGES = [{"role": "user", "content": "Q?"}]
ONCE = apr.Retry(attempts=1)


def phase_of(prompt: str) -> str:
    if prompt.endswith(("1:", "2:")):
        return f"branch {prompt[-2]}"
    return "after" if prompt.endswith("</Thread>\n") else "trunk"


class PlainErrors(apr.ScriptedEngine):
    """Raises `error` from one of its methods; from `decode` after the first token of one phase."""

    def __init__(self, method: str, error: OSError, phase: str = "trunk") -> None:
        super().__init__(self.answer, apr.ByteTokenizer(TAGS))
        self.error, self.failing_phase = error, phase
        self.calls = 0
        if method != "decode":
            setattr(self, method, self.fail)
        self.fails_decode = method == "decode"

    def answer(self, request: apr.Request, prompt: str) -> apr.Reply:
        if self.fails_decode and phase_of(prompt) == self.failing_phase:
            self.calls += 1
            return apr.Reply("x", error=self.error)
        return apr.Reply(REPLIES[phase_of(prompt)])

    async def fail(self, *arguments: Any) -> Any:
        self.calls += 1
        raise self.error

    async def encode_chat(self, messages: Any, tools: Any = None) -> list[int]:
        return self.tokenizer.encode("Q: ")


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run work, and check that it leaves no task."""

    async def checked() -> Any:
        try:
            return await work()
        finally:
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(checked())


def reason(engine: apr.ScriptedEngine, prompt: Any = "Q: ", **options: Any) -> apr.Trajectory:
    return run(lambda: apr.areason(engine, prompt, retry=ONCE, **options))  # type: ignore[no-any-return]


def expected_kind(error: OSError) -> type[apr.EngineError]:
    return apr.EngineTimeout if isinstance(error, TimeoutError) else apr.EngineError


def check_nothing_left(engine: apr.ScriptedEngine) -> None:
    assert not engine.active
    assert engine.released == sum(engine.forks)
    assert engine.calls  # type: ignore[attr-defined]  # it did fail


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    ("method", "phase"),
    [("decode", "trunk"), ("decode", "after"), ("commit", ""), ("fork", ""), ("encode_chat", "")],
)
def test_a_failure_of_the_trunk_is_an_engine_error(method: str, phase: str, error: OSError):
    engine = PlainErrors(method, error, phase)
    with pytest.raises(expected_kind(error), match="the engine failed: ") as raised:
        reason(engine, MESSAGES if method == "encode_chat" else "Q: ")
    assert raised.value.__cause__ is error
    assert bool(engine.aborted) == (method != "encode_chat")
    if method not in ("commit", "fork"):
        check_nothing_left(engine)
    assert not engine.active


@pytest.mark.parametrize("method", ["load", "release", "abort"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_failure_of_what_only_helps_changes_nothing(method: str, error: OSError):
    engine = PlainErrors(method, error)
    if method == "abort":  # which nothing but another failure calls
        engine.answer = engine.script = lambda request, prompt: apr.Reply(  # type: ignore[method-assign]
            "x", error=apr.EngineError("refused", 400)
        )
        with pytest.raises(apr.EngineError, match="refused"):
            reason(engine)
    else:
        assert reason(engine).answer == "Done."
    assert engine.calls
    assert not engine.active


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("on_branch_failure", ["skip", "retry", "raise"])
def test_a_failure_of_a_branch_follows_the_option(on_branch_failure: str, error: OSError):
    engine = PlainErrors("decode", error, "branch 1")
    if on_branch_failure == "raise":
        with pytest.raises(apr.BranchFailed, match=r"branch 1\.1: the engine failed: ") as raised:
            reason(engine, on_branch_failure=on_branch_failure)
        assert isinstance(raised.value.__cause__, expected_kind(error))
    else:
        trajectory = reason(engine, on_branch_failure=on_branch_failure)
        assert [b.outcome for b in trajectory.blocks[0].branches] == ["failed", "ok"]
        assert trajectory.answer == "Done."
        apr.dialect("threadweaver").validate(trajectory.text)
    assert engine.calls == (2 if on_branch_failure == "retry" else 1)
    check_nothing_left(engine)


def test_an_error_of_the_operating_system_in_the_http_client():
    failures: list[Exception] = []
    with (
        pytest.raises(apr.EngineError, match="Too many open files"),
        translate_errors("http://127.0.0.1:9", 1.0, 1.0, failures.append),
    ):
        raise OSError(24, "Too many open files")
    assert len(failures) == 1


# Methods

METHOD_FAILURES = [
    ("decode", "skip"),
    ("decode", "raise"),
    ("commit", "skip"),
    ("fork", "skip"),
    ("load", "skip"),
]


@pytest.mark.parametrize(("method", "on_branch_failure"), METHOD_FAILURES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_method(method: str, on_branch_failure: str, error: OSError):
    engine = PlainErrors(method, error, "branch 1")

    async def work() -> tuple[list[Any], apr.Trajectory]:
        options = {"retry": ONCE, "on_branch_failure": on_branch_failure}
        async with method_session(engine, "Q: ", "test", **options) as session:
            return await ask(session)

    async def ask(session: MethodSession) -> tuple[list[Any], apr.Trajectory]:
        completions = await session.fork(session.root, ["1:", "2:"])
        return completions, session.finish()

    if method == "load" or (method, on_branch_failure) == ("decode", "skip"):
        completions, trajectory = run(work)
        failed = [method == "decode", False]
        assert [b.outcome == "failed" for b in trajectory.blocks[0].branches] == failed
        assert [not c.text for c in completions] == failed
    else:
        with pytest.raises(expected_kind(error), match="the engine failed: "):
            run(work)
        assert engine.aborted
    assert not engine.active
    assert engine.calls
    if method in ("decode", "load"):
        assert engine.released == sum(engine.forks) == 2


@pytest.mark.parametrize("method", ["release", "abort", "encode_chat"])
def test_a_method_whose_engine_fails_to_clean_up_or_to_render(method: str):
    engine = PlainErrors(method, ConnectionResetError("gone"))

    async def work() -> str:
        prompt = MESSAGES if method == "encode_chat" else "Q: "
        async with method_session(engine, prompt, "test", retry=ONCE) as session:
            if method == "abort":
                raise ZeroDivisionError
            return (await session.fork(session.root, ["1:", "2:"]))[1].text

    if method == "release":
        assert run(work) == REPLIES["branch 2"]
    else:
        with pytest.raises(ZeroDivisionError if method == "abort" else apr.EngineError):
            run(work)
    assert engine.calls
    assert not engine.active
