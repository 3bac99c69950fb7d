"""Programs end without a lock, and nothing waits for work that nobody does any more. Each interleaving is forced."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState, StreamExecutor

import sgl_apr as apr
from sgl_apr.runtime.frontend import event_loop
from sgl_apr.runtime.frontend.event_loop import EventLoopThread, wait_for
from tests.support.fake_sglang_server import TOKENIZER, SglangServer
from tests.support.processes import until

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]

BUDGET = apr.Budget(tokens=400)


@pytest.fixture
def endpoint() -> Iterator[apr.Endpoint]:
    with SglangServer().in_thread() as url, apr.Endpoint(url, tokenizer=TOKENIZER) as endpoint:
        yield endpoint


@pytest.fixture
def collector_is_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@sgl.function
def with_two_forks(s, fails: bool):
    s += "Q: "
    for part in (parts := s.fork(2)):
        part += sgl.gen("part", max_tokens=2)
    if not fails:
        parts.join()
        return
    s["cycle"] = [parts, s]  # the forks end when the collector finds them
    s["cycle"].append(s["cycle"])


def collect_holding(lock: Any) -> bool:
    """Whether the collector ends in a thread that holds `lock`. It is released after 5 s."""
    ended = threading.Event()

    def collect() -> None:
        with contextlib.suppress(RuntimeError), lock:  # released already
            gc.collect()
            ended.set()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    in_time = ended.wait(5)
    if not in_time:
        lock.release()
    thread.join(5)
    return in_time


@pytest.mark.usefixtures("collector_is_off")
def test_the_collector_may_end_a_program_in_a_thread_that_starts_or_ends_another(endpoint: apr.Endpoint):
    """`threading` then holds a lock that `Thread.is_alive` takes where a thread has ended."""
    if not hasattr(threading, "_shutdown_locks_lock"):
        pytest.skip("this Python has no such lock")
    state = with_two_forks.run(fails=True, backend=endpoint)
    children = [child.stream_executor for child in state["cycle"][0].states]
    for child in children:
        child.sync()
        child.end()
    workers = [child.worker for child in children]
    until(
        lambda: all(worker._tstate_lock is None or not worker._tstate_lock.locked() for worker in workers), 5
    )
    assert any(worker._tstate_lock for worker in workers), "nobody has noticed yet that they have ended"
    del state, child, children
    assert collect_holding(threading._shutdown_locks_lock)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is StreamExecutor and o.worker in workers]


@pytest.mark.usefixtures("collector_is_off")
def test_the_collector_may_end_a_program_in_a_thread_that_uses_its_queue(endpoint: apr.Endpoint):
    """As its worker does, which is about to wait for the next expression."""
    state = with_two_forks.run(fails=True, backend=endpoint)
    children = [child.stream_executor for child in state["cycle"][0].states]
    for child in children:
        child.sync()
    workers, tasks = [child.worker for child in children], children[0].queue
    del state, child, children
    lock = tasks.mutex if isinstance(tasks, queue.Queue) else tasks.all_tasks_done
    assert collect_holding(lock)
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


def test_work_that_reaches_a_loop_as_it_ends_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    """A thread that was about to submit it would wait forever, and keep the process from ending."""
    loop, about_to_submit, may_submit = EventLoopThread("test"), threading.Event(), threading.Event()
    submitted = threading.Event()
    submit = asyncio.run_coroutine_threadsafe
    submitter: threading.Thread

    def submit_late(work: Any, target: asyncio.AbstractEventLoop) -> Future[Any]:
        if threading.current_thread() is submitter:
            about_to_submit.set()
            assert may_submit.wait(10)
        future = submit(work, target)
        submitted.set()
        return future

    class EndsAfterALastTask:
        """The executor of the loop, which is shut down after the last task of the loop, before the loop is closed."""

        def __init__(self, executor: Any) -> None:
            self.executor = executor

        def shutdown(self, wait: bool) -> None:
            self.executor.shutdown(wait=wait)
            may_submit.set()
            until(lambda: results or submitted.is_set(), 10)

    async def work() -> None:
        pass

    results: list[object] = []

    def run() -> None:
        try:
            results.append(wait_for(loop.submit(running := work())))
        except apr.EngineError as error:
            results.append(error)
        finally:
            running.close()

    monkeypatch.setattr(event_loop.asyncio, "run_coroutine_threadsafe", submit_late)
    monkeypatch.setattr(loop, "_executor", EndsAfterALastTask(loop._executor))
    submitter = threading.Thread(target=run, daemon=True)
    submitter.start()
    assert about_to_submit.wait(5)
    loop.close()
    submitter.join(5)
    assert [type(result) for result in results] == [apr.EngineError]


def test_work_for_a_loop_that_has_just_closed_is_a_typed_error():
    loop = EventLoopThread("test")
    loop.close()
    loop._closing = False  # as the thread has read it that submits

    async def work() -> None:
        pass

    with pytest.raises(apr.EngineError, match=r"the apr\.Endpoint is closed"):
        loop.submit(work())


def test_what_is_added_to_a_program_that_has_ended_is_an_error_where_it_is_read(endpoint: apr.Endpoint):
    @sgl.function
    def program(s):
        s += "Q: " + sgl.gen("answer", max_tokens=3)

    state: ProgramState = program.run(backend=endpoint)
    assert state["answer"] == "gen"
    state.stream_executor.worker.join(5)
    state += sgl.gen("late", max_tokens=3)
    for read in (lambda: state["late"], lambda: state.get_meta_info("late")):
        with pytest.raises(apr.AprError, match=r"'late' was added to a program that has ended"):
            read()
    assert state.text() == "Q: gen", "and nothing waits for it"
    streamed: ProgramState = program.run(backend=endpoint, stream=True)
    assert "".join(streamed.text_iter()).startswith(
        "Q: Think."
    )  # the fake server streams what a trunk writes
    streamed.stream_executor.worker.join(5)
    streamed += sgl.gen("late", max_tokens=3)

    async def read_late() -> None:
        async for _ in streamed.text_async_iter("late"):
            pass

    for read in (lambda: list(streamed.text_iter("late")), lambda: asyncio.run(read_late())):
        with pytest.raises(apr.AprError, match=r"'late' was added to a program that has ended"):
            read()


def test_a_branch_that_cannot_be_prepared_fails(endpoint: apr.Endpoint, monkeypatch: pytest.MonkeyPatch):
    """Its error reaches the loop, which waits for the branch."""

    @sgl.function
    def program(s):
        s += "Q: " + apr.reason("answer", budget=BUDGET, on_branch_failure="raise")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the tokenizer")

    monkeypatch.setattr("sgl_apr.runtime.frontend.endpoint.program_tokens", fail)
    state = program.run(backend=endpoint)
    with pytest.raises(ZeroDivisionError, match="in the tokenizer"):
        _ = state["answer"]


@pytest.mark.filterwarnings("default:Error in stream_executor")
def test_a_warning_that_is_an_error_does_not_hide_why_a_program_failed(monkeypatch: pytest.MonkeyPatch):
    """On a backend of SGLang, whose programs warn where they fail."""
    from sglang.lang.backend.base_backend import BaseBackend

    from sgl_apr.runtime.frontend.sglang_patch import patch_frontend

    def warn(*_: object, **__: object) -> None:
        raise UserWarning("an error")

    class Failing(BaseBackend):
        def generate(self, s: object, sampling_params: object) -> None:
            raise ZeroDivisionError("in the backend")

    @sgl.function
    def program(s):
        s += sgl.gen("answer", max_tokens=3)

    patch_frontend()
    monkeypatch.setattr("sgl_apr.runtime.frontend.sglang_patch.warnings.warn", warn)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    state = program.run(backend=Failing())
    until(lambda: state.stream_executor.is_finished, 5)
    assert isinstance(state.error(), ZeroDivisionError)
