"""`s.fork` in programs: one commit before the children, one routing key, no lost error and no lost meta information."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState

import sgl_apr as apr
from sgl_apr.runtime.frontend.token_ledger import TOKENS_VARIABLE, ProgramTokens
from tests.support.fake_sglang_server import TOKENIZER, SglangServer
from tests.support.processes import until

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]


@contextmanager
def served(fake: SglangServer) -> Iterator[apr.Endpoint]:
    with fake.in_thread() as url, apr.Endpoint(url, tokenizer=TOKENIZER) as endpoint:
        yield endpoint


def commits(fake: SglangServer) -> list[list[int]]:
    return [b["input_ids"] for b, _ in fake.bodies if not b["sampling_params"]["max_new_tokens"]]


def gens(fake: SglangServer) -> list[list[int]]:
    return [b["input_ids"] for b, _ in fake.bodies if b["sampling_params"]["max_new_tokens"]]


def routing_keys(fake: SglangServer) -> set[str]:
    return {key for _, key in fake.bodies}


@sgl.function
def forking(s, text="Q: ", size=3, rounds=1, generate=False):
    if text:
        s += text
    if generate:
        s += sgl.gen("before", max_tokens=3)
    for n in range(rounds):
        parts = s.fork(size)
        for i, part in enumerate(parts):
            part += f" {i}:" + sgl.gen(f"part{n}", max_tokens=2)
        parts.join("gather_variable")
        s += f" round {n}"
    s += sgl.gen("end", max_tokens=2)


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_the_shared_text_is_committed_once_before_the_children(size: int, generate: bool):
    """SGLang forgets it where the text was just added: it does not wait for its own worker thread."""
    fake = SglangServer()
    with served(fake) as endpoint:
        for _ in range(3):
            fake.bodies.clear()
            state = forking.run(text="Q: " * 3000, size=size, generate=generate, backend=endpoint)
            assert state["end"] == "ge"
            (shared,) = commits(fake)
            assert shared == TOKENIZER.encode("Q: " * 3000 + "gen" * generate)
            order = [len(b["input_ids"]) for b, _ in fake.bodies]
            assert order.index(len(shared)) == int(generate), "before the children"
            children = gens(fake)[int(generate) :][:size]
            assert sorted(ids[len(shared) :] for ids in children) == sorted(
                TOKENIZER.encode(f" {i}:") for i in range(size)
            )
            assert all(ids[: len(shared)] == shared for ids in children)
            assert len(routing_keys(fake)) == 1
        assert not endpoint.commit_results
        assert not endpoint.pending_commits


def test_nothing_is_committed_where_nothing_is_shared():
    fake = SglangServer()
    with served(fake) as endpoint:
        assert forking.run(text="", backend=endpoint)["part0"] == ["ge"] * 3
        assert not commits(fake)
        assert len(routing_keys(fake)) == 1


def test_forks_of_forks_and_several_forks():
    @sgl.function
    def nested(s):
        s += "Q: "
        for outer in (parts := s.fork(2)):
            outer += "outer "
            for inner in (leaves := outer.fork(2)):
                inner += sgl.gen("leaf", max_tokens=3)
            leaves.join("gather_variable")
        parts.join("gather_variable")
        with s.copy() as copied:
            copied += "copy" + sgl.gen("copied", max_tokens=1)

    fake = SglangServer()
    with served(fake) as endpoint:
        state = nested.run(backend=endpoint)
        state.sync()
        assert state["leaf"] == [["gen", "gen"]] * 2
        assert [TOKENIZER.decode(ids) for ids in commits(fake)] == ["Q: ", "Q: outer ", "Q: outer ", "Q: "]
        key = endpoint.route(state.stream_executor)
        assert routing_keys(fake) == {key}
        assert len(key) == 32
        assert isinstance(state.stream_executor.variables[TOKENS_VARIABLE], ProgramTokens)

        fake.bodies.clear()
        state = forking.run(rounds=3, backend=endpoint)
        assert state["part2"] == ["ge"] * 3
        assert [TOKENIZER.decode(ids) for ids in commits(fake)] == [
            "Q: ",
            "Q:  round 0",
            "Q:  round 0 round 1",
        ]
        assert len(routing_keys(fake)) == 1


def test_a_select_sends_ids_and_the_routing_key():
    @sgl.function
    def choosing(s):
        s += "Q: " + sgl.gen("before", max_tokens=3)
        for part in (parts := s.fork(2)):
            part += " It is" + sgl.select("which", [" yes", " no"])
            part += sgl.gen("why", max_tokens=2)
        parts.join("gather_variable")
        s += sgl.select("again", [" a", " b"])

    fake = SglangServer()
    with served(fake) as endpoint:
        state = choosing.run(backend=endpoint)
        assert set(state["which"]) <= {" yes", " no"}
        assert state["again"] in (" a", " b")
        assert all("input_ids" in body for body, _ in fake.bodies), "no text is sent"
        assert routing_keys(fake) == {endpoint.route(state.stream_executor)}
        chosen = TOKENIZER.encode("Q: gen It is" + state["which"][0])
        why = next(b["input_ids"] for b, _ in fake.bodies if b["sampling_params"]["max_new_tokens"] == 2)
        assert why == chosen, "the ids that were scored"


# Meta information


def test_children_have_the_meta_information_of_their_parent_and_a_join_gathers_theirs():
    with served(SglangServer()) as endpoint:
        seen: list[dict] = []

        @sgl.function
        def program(s):
            s += "Q: " + sgl.gen("before", max_tokens=3)
            for part in (parts := s.fork(2)):
                seen.append(part.get_meta_info("before"))
                part += sgl.gen("part", max_tokens=2)
            parts.join("gather_variable")

        state = program.run(backend=endpoint)
        assert seen == [state.get_meta_info("before")] * 2
        assert seen[0]["completion_tokens"] == 3
        assert [meta["completion_tokens"] for meta in state.get_meta_info("part")] == [2, 2]


# Failures


def read(state: ProgramState, name: str) -> None:
    with pytest.raises(apr.EngineError, match="out of memory"):
        _ = state[name]
    assert isinstance(state.error(), apr.EngineError)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_commit_fails_the_program_and_its_children(stream: bool):
    children: list[ProgramState] = []

    @sgl.function
    def program(s):
        s += "Q: "
        parts = s.fork(2)
        children.extend(parts.states)
        for part in parts:
            part += sgl.gen("part", max_tokens=2)
        parts.join("gather_variable")
        s += sgl.gen("end", max_tokens=2)

    fake = SglangServer(commit="status 500")
    with served(fake) as endpoint:
        state = program.run(backend=endpoint, stream=stream)
        read(state, "end")
        for child in children:
            read(child, "part")
        assert not gens(fake), "nothing is decoded without the shared text"


@pytest.mark.parametrize("mode", ["gather_variable", "concate_and_append"])
def test_a_failed_child_fails_the_program_that_joins_it(mode: str):
    """SGLang leaves it out of the list, which then has fewer values than there are children."""

    @sgl.function
    def program(s):
        s += "Q: "
        parts = s.fork(2)
        parts[0].__iadd__(sgl.gen("part", max_tokens=2))
        parts[1].__iadd__(apr.reason("part", budget=apr.Budget(tokens=100), retry=apr.Retry(attempts=1)))
        parts.join(mode)
        s += " end" + sgl.gen("end", max_tokens=2)

    with served(SglangServer(trunk="status 500")) as endpoint:
        for state in program.run_batch([{}] * 2, backend=endpoint):
            read(state, "part")
            read(state, "end")


def test_the_children_of_a_failed_program_have_its_error():
    @sgl.function
    def program(s):
        s += "Q: " + apr.reason("answer", budget=apr.Budget(tokens=100), retry=apr.Retry(attempts=1))
        for part in (parts := s.fork(2)):
            part += sgl.gen("part", max_tokens=2)
        parts.join("gather_variable")

    fake = SglangServer(trunk="status 500")
    with served(fake) as endpoint:
        state = program.run(backend=endpoint)
        read(state, "part")
        assert [b["sampling_params"]["max_new_tokens"] > 2 for b, _ in fake.bodies] == [True], (
            "only the reason was sent"
        )


def test_no_thread_is_left_of_failed_children():
    def workers() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if not t.name.startswith(("apr-", "ThreadPool"))}

    with served(SglangServer(commit="status 500")) as endpoint:
        before = workers()
        for _ in range(3):
            state = forking.run(backend=endpoint)
            with pytest.raises(apr.EngineError):
                _ = state["end"]
            del state
        until(lambda: workers() <= before, 10)
