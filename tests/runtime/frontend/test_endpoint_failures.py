"""Programs whose server fails, or that are cancelled: reading them raises a typed error, and no reader hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sglang as sgl

import sgl_apr as apr
from sgl_apr.training.models import random_llama
from tests.support.fake_sglang_server import TOKENIZER, SglangServer
from tests.support.processes import in_session, until

# SGLang's front end warns with a traceback whenever a program fails. Here the error is raised, and nothing else.
pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]


@sgl.function
def program(s):
    s += "Q: " + apr.reason(
        "answer", budget=apr.Budget(tokens=400), on_branch_failure="raise", retry=apr.Retry(wait=0.01)
    )
    s += " So: " + sgl.gen("later", max_tokens=4)


@contextmanager
def served(fake: SglangServer, timeout: float = 30.0) -> Iterator[apr.Endpoint]:
    with fake.in_thread() as url, apr.Endpoint(url, tokenizer=TOKENIZER, timeout=timeout) as endpoint:
        yield endpoint


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.mark.parametrize("failure", ["status 500", "dies", "reports an error"])
@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
def test_a_failed_branch_raises_wherever_the_program_is_read(failure, stream):
    fake = SglangServer(branch_1=failure, branch_2="is slow")
    with served(fake) as endpoint, within(10):
        state = program.run(backend=endpoint, stream=stream)
        for read in (
            lambda: state["answer"],
            lambda: state["later"],
            lambda: state.get_meta_info("answer"),
            lambda: state["answer"],  # again
        ):
            with pytest.raises(apr.BranchFailed, match=r"branch 1\.1: "):
                read()
        assert isinstance(state.error(), apr.BranchFailed)
        state.sync()
        assert state.text().startswith("Q: ")
        # The other branch may have failed before this one was sent.
        assert fake.rids.get("branch 2") in {None, *fake.aborted}
        until(lambda: not fake.live, 5)


@sgl.function
def late(s):
    time.sleep(0.5)
    s += "Q: " + apr.reason("answer", budget=apr.Budget(tokens=400))


def test_a_streamed_program_is_read_once_it_has_begun():
    """It begins in a thread of its own: SGLang's front end says KeyError until then."""
    with served(SglangServer()) as endpoint, within(10):
        state = late.run(backend=endpoint, stream=True)
        assert state.get_meta_info("answer")["trajectory"].answer == state["answer"]
        with pytest.raises(KeyError):
            late.run(backend=endpoint, stream=True)["another"]


@sgl.function
def lenient(s):
    s += "Q: " + apr.reason("answer", budget=apr.Budget(tokens=400), retry=apr.Retry(wait=0.01))
    s += " So."


@pytest.mark.parametrize("failure", ["status 500", "dies", "reports an error"])
@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
def test_a_failed_branch_is_skipped_and_the_program_goes_on(failure, stream):
    with served(SglangServer(branch_1=failure)) as endpoint, within(10):
        state = lenient.run(backend=endpoint, stream=stream)
        trajectory = state.get_meta_info("answer")["trajectory"]
        assert [b.outcome for b in trajectory.blocks[0].branches] == ["failed", "ok"]
        assert state["answer"] == "Done."
        text = "".join(state.text_iter()) if stream else state.text()
        assert text == "Q: " + trajectory.text + " So.", "the text of the failed branch is retracted"


@pytest.mark.parametrize("variable", [None, "answer"])
def test_streaming_from_a_program_that_fails_raises_at_its_end(variable):
    with served(SglangServer(branch_1="dies")) as endpoint, within(10):
        state = program.run(backend=endpoint, stream=True)
        pieces = []
        with pytest.raises(apr.BranchFailed):
            pieces.extend(state.text_iter(variable))
        assert "".join(pieces).startswith("Q: Think." if variable is None else "")

    async def listen(endpoint: apr.Endpoint) -> None:
        async for _ in program.run(backend=endpoint, stream=True).text_async_iter():
            pass

    with served(SglangServer(after="dies")) as endpoint, within(10), pytest.raises(apr.EngineError):
        asyncio.run(listen(endpoint))


def test_a_batch_fails_program_by_program():
    with served(SglangServer(after="status 500")) as endpoint, within(20):
        states = program.run_batch([{}] * 6, backend=endpoint, progress_bar=True)
        for state in states:
            with pytest.raises(apr.EngineError, match="out of memory"):
                state["answer"]


def test_silence_is_a_timeout():
    raises = pytest.raises(apr.EngineTimeout, match=r"within 0\.5 s")
    with served(SglangServer(trunk="stops sending"), timeout=0.5) as endpoint, within(10), raises:
        program.run(backend=endpoint)["answer"]


def test_a_plain_gen_fails_the_same_way():
    @sgl.function
    def plain(s):
        s += "Q: " + sgl.gen("answer", max_tokens=4)

    for stream in (False, True):
        raises = pytest.raises(apr.EngineError, match="out of memory")
        with served(SglangServer(trunk="status 500", gen="status 500")) as endpoint, within(10), raises:
            plain.run(backend=endpoint, stream=stream)["answer"]


@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
def test_a_cancelled_program(stream):
    fake = SglangServer(branch_1="is slow", branch_2="is slow")
    with served(fake) as endpoint:
        states = []
        runner = threading.Thread(
            target=lambda: states.append(program.run(backend=endpoint, stream=stream)), daemon=True
        )
        runner.start()
        until(lambda: len(fake.live) == 2, 10)
        with within(5):
            if stream:
                endpoint.cancel(states[0])
            else:
                endpoint.close()  # `run` has not returned yet: its state is not there to cancel
            runner.join()
            with pytest.raises(apr.EngineError, match="the program was cancelled"):
                states[0]["answer"]
        until(lambda: not fake.live, 5)
        # A request whose connection is gone is not live, and the word of its abort may still be on its way.
        until(lambda: fake.aborted >= {fake.rids["branch 1"], fake.rids["branch 2"]}, 5)


def test_nobody_there():
    before = set(threading.enumerate())
    with pytest.raises(apr.EngineError, match="no server at"):
        apr.Endpoint("http://127.0.0.1:9")
    assert not [t for t in threading.enumerate() if t.name == "apr-endpoint" and t not in before]


def test_what_a_dialect_has_not_is_an_error_where_it_is_asked_for():
    for options in ({"join": "kv"}, {"budget": apr.Budget(depth=3)}, {"mode": "both"}, {"dialect": "nope"}):
        with pytest.raises(apr.AprError):
            apr.reason("answer", **{"dialect": "threadweaver", **options})


# The real server


@sgl.function
def endless(s):
    s += "Q: " + apr.reason("answer", min_blocks=60, budget=apr.Budget(tokens=7000, width=4), temperature=1.0)


@pytest.mark.server
def test_cancelling_frees_the_server(server):
    with apr.Endpoint(server.url) as endpoint:

        def running() -> int:
            return endpoint._loop.submit(endpoint.http.load()).result(10).running

        state = endless.run(backend=endpoint, stream=True)
        until(running, 20)
        with within(10):
            endpoint.cancel(state)
            with pytest.raises(apr.EngineError, match="the program was cancelled"):
                state["answer"]
            until(lambda: not running(), 5)


@pytest.mark.server
@pytest.mark.timeout(300)
def test_a_server_that_is_killed_mid_branch(forked_server, tmp_path):
    model = random_llama(tmp_path, tags=apr.dialect("threadweaver").tags, tag_bias=5.0)
    with (
        forked_server(model, context_length=8192, max_total_tokens=8192) as server,
        apr.Endpoint(server.url) as endpoint,
    ):
        pid = server.pid
        state = endless.run(backend=endpoint, stream=True)
        until(lambda: "<Thread>" in state.stream_executor.text_, 60)
        for process in in_session(pid):
            os.kill(process, signal.SIGKILL)
        with within(10), pytest.raises(apr.EngineError):
            state["answer"]
    assert not in_session(pid)
