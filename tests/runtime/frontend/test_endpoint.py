"""`apr.reason` and SGLang's own expressions in real programs, on a real server."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, StreamExecutor

import sgl_apr as apr
from sgl_apr.runtime.frontend.token_ledger import TOKENS_VARIABLE, ProgramTokens
from tests.support.processes import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(200)]

DIALECT = apr.dialect("threadweaver")
SMALL = apr.Budget(tokens=300, width=3, branch_tokens=40, outline_chars=12)
QUESTION = "The parts of the problem are"


def thinking(**options) -> sgl.lang.ir.SglGen:
    options = {"mode": "parallel", "max_blocks": 1, "budget": SMALL, "temperature": 1.0, **options}
    return apr.reason("answer", **options)


@sgl.function
def solve(s, question=QUESTION, **options):
    s += sgl.user(question)
    s += sgl.assistant(thinking(**options))


@sgl.function
def solve_and_go_on(s, question=QUESTION, **options):
    s += question
    s += thinking(**options)
    s += " So: " + sgl.gen("more", max_tokens=8, temperature=0)


@dataclass
class Wire:
    """What went over the wire: ids sent and received, and the executors that decoded branches."""

    sent: list[tuple[int, ...]] = field(default_factory=list)
    received: list[tuple[int, ...]] = field(default_factory=list)
    committed: list[tuple[int, ...]] = field(default_factory=list)
    posted: list[tuple[int, ...]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    forks: list[int] = field(default_factory=list)

    def clear(self) -> None:
        for messages in vars(self).values():
            messages.clear()


@pytest.fixture(scope="module")
def endpoint(server) -> Iterator[apr.Endpoint]:
    with apr.Endpoint(server.url) as endpoint:
        yield endpoint


@pytest.fixture
def wire(endpoint, monkeypatch) -> Wire:
    """Listens in; everything still runs."""
    wire, http = Wire(), endpoint.http
    decode, commit, post = http.decode, http.commit, http.post
    branch, fork = endpoint._branch, StreamExecutor.fork

    async def on_decode(request, on_tokens=None):
        wire.sent.append(request.input_ids)
        result = await decode(request, on_tokens)
        wire.received.append(result.token_ids)
        return result

    async def on_commit(request):
        wire.committed.append(request.input_ids)
        return await commit(request)

    async def on_post(body):
        wire.posted.append(tuple(body["input_ids"]))
        return await post(body)

    def on_branch(s, call):
        wire.branches.append(s.sid)
        return branch(s, call)

    def on_fork(self, size=1, *rest):
        wire.forks.append(size)
        return fork(self, size, *rest)

    monkeypatch.setattr(http, "decode", on_decode)
    monkeypatch.setattr(http, "commit", on_commit)
    monkeypatch.setattr(http, "post", on_post)
    monkeypatch.setattr(endpoint, "_branch", on_branch)
    monkeypatch.setattr(StreamExecutor, "fork", on_fork)
    return wire


def trajectory_of(state: ProgramState) -> apr.Trajectory:
    return state.get_meta_info("answer")["trajectory"]


# apr.reason


def test_a_reply_that_forks_and_joins(endpoint):
    state = solve.run(backend=endpoint)
    trajectory = trajectory_of(state)
    DIALECT.validate(trajectory.text)
    assert len(trajectory.blocks) == 1
    assert state["answer"] == trajectory.answer
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert state.text() == prompt + trajectory.text + "<|im_end|>\n"
    assert state.messages()[-1] == {"role": "assistant", "content": trajectory.text.lstrip()}
    meta = state.get_meta_info("answer")
    assert meta["completion_tokens"] == trajectory.metrics().total
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory
    assert meta["finish_reason"] == {"type": trajectory.finish}


def test_each_branch_is_a_native_fork_over_a_prefix_committed_once(endpoint, wire):
    state = solve.run(backend=endpoint)
    trajectory = trajectory_of(state)
    (block,) = trajectory.blocks
    width = len(block.branches)
    assert wire.forks == [width]
    assert len(set(wire.branches)) == width
    assert state.stream_executor.sid not in wire.branches
    (shared,) = wire.committed
    sent = wire.sent[1 : 1 + width]
    assert all(ids[: len(shared)] == shared and len(ids) > len(shared) for ids in sent)


def test_every_branch_finds_the_shared_prefix_cached(endpoint):
    states = solve.run_batch([{"question": f"{QUESTION} {i} " * 20} for i in range(8)], backend=endpoint)
    calls = [c for s in states for c in trajectory_of(s).calls if c.phase == "branch"]
    assert len(calls) >= 16
    for call in calls:
        shared = call.prompt_tokens - call.new_tokens
        assert shared > 100
        assert call.cached_tokens >= shared - 1


def test_what_was_decoded_is_never_tokenized_again(endpoint, wire, tmp_path):
    # Text of these letters only: a sampled "t" + "he" is one token when it is encoded.
    source = DIALECT.source.replace("/(.|\\n)+/", "/[the ]+/")
    (tmp_path / "letters.lark").write_text(source)
    letters = apr.Dialect.from_file(tmp_path / "letters.lark")
    assert letters.source != DIALECT.source
    tokenizer = endpoint.tokenizer
    for _ in range(40):
        wire.clear()
        state = solve_and_go_on.run(backend=endpoint, dialect=letters)
        state.sync()
        trajectory = trajectory_of(state)
        decoded = [s for s in trajectory.spans if s.origin == "decoded"]
        if any(tuple(tokenizer.encode(s.text)) != s.token_ids for s in decoded):
            break
    else:
        pytest.fail("a round trip through text is always the same")
    # Every id received is in the trajectory, in its place; an end-of-text id is dropped.
    ids_of_call: dict[int, tuple[int, ...]] = {}
    for span in decoded:
        ids_of_call[span.call] = ids_of_call.get(span.call, ()) + span.token_ids
    received = [ids[:-1] if ids[-1] in tokenizer.eos_ids else ids for ids in wire.received]
    assert sorted(ids_of_call.values()) == sorted(received)
    # After the join the prompt is sent as it was received, also by the next gen.
    prompt = wire.sent[0]
    complete = prompt + trajectory.token_ids
    assert wire.sent[-1] == complete[: trajectory.calls[-1].prompt_tokens]
    (posted,) = wire.posted
    assert posted == (*complete, *tokenizer.encode(" So: "))
    assert state.stream_executor.variables[TOKENS_VARIABLE].ids[: len(posted)] == posted


def test_gen_may_follow_and_reason_may_come_twice(endpoint):
    @sgl.function
    def twice(s):
        s += QUESTION + thinking()
        s += (
            "\nThen "
            + sgl.gen("middle", max_tokens=4)
            + apr.reason("second", mode="sequential", budget=SMALL)
        )

    state = twice.run(backend=endpoint)
    first, second = trajectory_of(state), state.get_meta_info("second")["trajectory"]
    assert not second.blocks
    assert second.answer == state["second"]
    assert state.text() == f"{QUESTION}{first.text}\nThen {state['middle']}{second.text}"


def test_a_model_that_may_not_fork_just_answers(endpoint):
    state = solve.run(mode="sequential", backend=endpoint)
    trajectory = trajectory_of(state)
    assert not trajectory.blocks
    assert not any(tag in state["answer"] for tag in DIALECT.tags)
    assert trajectory.metrics().acceleration == 0


def test_the_defaults_of_the_program_are_the_defaults_of_reason(endpoint, monkeypatch):
    sampling_params = []
    decode = endpoint.http.decode

    async def on_decode(request, on_tokens=None):
        sampling_params.append(request.sampling)
        return await decode(request, on_tokens)

    monkeypatch.setattr(endpoint.http, "decode", on_decode)
    solve.run(backend=endpoint, temperature=0.25, top_p=0.5).sync()
    assert {s["top_p"] for s in sampling_params} == {0.5}
    assert {s["temperature"] for s in sampling_params} == {1.0}  # the expression's own


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_all_of_them_are_valid(endpoint, capsys, count: int):
    """At temperature 1.5 the model decides at random. It prefers tags, so most trajectories fork."""
    arguments = [{"question": f"{QUESTION} {i}", "mode": "auto", "temperature": 1.5} for i in range(count)]
    states = solve.run_batch(arguments, backend=endpoint, progress_bar=True)
    trajectories = [trajectory_of(s) for s in states]
    for trajectory in trajectories:
        DIALECT.validate(trajectory.text)
        assert DIALECT.render(DIALECT.parse(trajectory.text)) == trajectory.text
    metrics = [t.metrics() for t in trajectories]
    forked = sum(bool(t.blocks) for t in trajectories)
    branches = [b for t in trajectories for block in t.blocks for b in block.branches]
    closed = sum(b.finish == "stop" for b in branches)
    with capsys.disabled():
        print(f"\n{count} replies, {forked} forked, {len(branches)} branches, {closed} closed themselves")
    assert forked >= count / 2
    assert closed >= 0.5 * len(branches)
    assert sum(m.closers_decoded for m in metrics) >= closed
    assert sum(m.closers_injected for m in metrics) >= len(branches) - closed


def test_an_edited_grammar_file_changes_what_is_decoded_and_what_is_parsed(endpoint, tmp_path):
    source = DIALECT.source.replace("Outline", "Plan").replace("Thread", "Worker")
    assert source != DIALECT.source
    (tmp_path / "mine.lark").write_text(source)
    mine = apr.Dialect.from_file(tmp_path / "mine.lark")
    # Its tags are no tokens of this tokenizer: they are spelled out.
    states = solve.run_batch([{"dialect": mine, "temperature": 1.5}] * 10, backend=endpoint)
    for state in states:
        text = trajectory_of(state).text
        mine.validate(text)
        assert "<Worker>" in text
        assert not DIALECT.is_valid(text)


# Streaming


def test_the_streamed_text_is_the_text(endpoint):
    state = solve.run(backend=endpoint, stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == state.text()
    assert len(pieces) > 10
    DIALECT.validate(trajectory_of(state).text)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_the_streamed_answer_is_the_answer(endpoint, mode):
    state = solve.run(backend=endpoint, mode=mode, stream=True)
    pieces = list(state.text_iter("answer"))
    assert "".join(pieces) == state["answer"]
    if mode == "sequential":
        assert len(pieces) > 5


@pytest.mark.parametrize(
    "stream", [pytest.param(False, marks=pytest.mark.slow), True], ids=["complete", "stream"]
)
def test_a_program_hears_its_events_and_keeps_its_policy_and_its_time(endpoint, stream):
    outcomes: list[str] = []
    for _ in range(5):  # until one is cut: they may all end in the same step
        events: list[object] = []
        state = solve.run(
            on_event=events.append, policy="first", min_width=3, backend=endpoint, stream=stream,
            budget=apr.Budget(tokens=600, width=3, outline_chars=12, seconds=30.0, calls=12),
        )  # fmt: skip
        trajectory = state.get_meta_info("answer")["trajectory"]
        assert apr.rebuild(events) == trajectory
        DIALECT.validate(trajectory.text)
        assert len(trajectory.blocks[0].branches) == 3
        assert trajectory.decisions[0].branches == 3
        assert trajectory.metrics().engine_calls <= 12
        state.stream_executor.end()
        outcomes += [b.outcome for b in trajectory.blocks[0].branches]
        if "aborted" in outcomes:
            return
    raise AssertionError(outcomes)


def test_streaming_in_an_event_loop(endpoint):
    async def once() -> tuple[str, str]:
        state = solve_and_go_on.run(backend=endpoint, stream=True)
        return "".join([piece async for piece in state.text_async_iter()]), state.text()

    streamed, text = asyncio.run(once())
    assert streamed == text


# What SGLang's front end can do by itself


@sgl.function
def plain(s):
    s += sgl.system("Be brief.")
    s += sgl.user("The first number is")
    with s.assistant():
        s += sgl.gen("free", max_tokens=12, temperature=0)


@sgl.function
def constrained(s):
    s += "The number: " + sgl.gen("number", max_tokens=6, regex="[0-9]{3}", temperature=0)


@sgl.function
def stopped(s):
    s += "If x is more" + sgl.gen("stopped", max_tokens=40, stop=[" ", "e"], temperature=0)


@sgl.function
def chosen(s):
    s += "The answer is" + sgl.select("which", [" the number", " x", " branches that run"])


@sgl.function
def forked(s):
    s += "Then"
    parts = s.fork(3)
    for i, part in enumerate(parts):
        part += f" {i}:" + sgl.gen("part", max_tokens=5, temperature=0)
    parts.join("gather_variable")
    s += " and ".join(s["part"])


@sgl.function
def typed(s):
    s += "So " + sgl.gen_int("int", max_tokens=4) + sgl.gen_string("string", max_tokens=12)


@pytest.mark.parametrize(
    "program", [plain, constrained, stopped, chosen, forked], ids=lambda p: p.func.__name__
)
@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
def test_programs_do_what_they_do_on_sglangs_backend(server, endpoint, program, stream):
    if program is forked and stream:
        stream = False  # SGLang's own backend does not stream inside forks
    ours = program.run(backend=endpoint, stream=stream)
    theirs = program.run(backend=RuntimeEndpoint(server.url, chat_template_name="chatml"), stream=stream)
    assert ours.text() == theirs.text()


def test_typed_gens(endpoint):
    state = typed.run(backend=endpoint)
    int(state["int"])
    assert state["string"].startswith('"')
    assert state.text() == "So " + state["int"] + state["string"]


def test_several_samples(endpoint):
    @sgl.function
    def samples(s):
        s += "The" + sgl.gen("several", max_tokens=24, n=3, temperature=1.5)

    several = samples.run(backend=endpoint)["several"]
    assert len(several) == 3
    assert len(set(several)) > 1


def test_a_join_by_concatenation_ends(endpoint):
    @sgl.function
    def concatenated(s):
        s += "Then"
        parts = s.fork(2)
        for part in parts:
            part += " so" + sgl.gen("part", max_tokens=4, temperature=0)
        parts.join("concate_and_append")
        s += " end" + sgl.gen("end", max_tokens=2)

    state = concatenated.run(backend=endpoint)
    assert state.text().endswith(" end" + state["end"])
    assert state.text().startswith("Then so")


@pytest.mark.filterwarnings("error")
def test_reason_needs_the_endpoint(server):
    state = solve.run(backend=RuntimeEndpoint(server.url))
    with pytest.raises(
        apr.UnsupportedEngine,
        match=r"apr\.reason\('answer'\), which needs the backend apr\.Endpoint: found RuntimeEndpoint",
    ):
        _ = state["answer"]
    assert isinstance(state.error(), apr.UnsupportedEngine)


@pytest.mark.parametrize("before", ["", "Q: "], ids=["nothing before", "text before"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_forks_of_a_program_share_its_routing_key(endpoint, before: str, size: int):
    keys: list[str] = []

    @sgl.function
    def forking(s):
        if before:
            s += before
        parts = s.fork(size)
        for part in parts:
            part += "so" + sgl.gen("part", max_tokens=2, temperature=0)
        keys.extend(endpoint.route(part.stream_executor) for part in parts if part["part"] is not None)
        parts.join("gather_variable")
        s += "in all" + sgl.gen("end", max_tokens=2, temperature=0)

    state = forking.run(backend=endpoint)
    assert isinstance(state["end"], str)
    assert isinstance(state["part"], list)
    assert keys == [endpoint.route(state.stream_executor)] * size
    assert len(keys[0]) == 32, "a key, and not the text of several"
    assert isinstance(state.stream_executor.variables[TOKENS_VARIABLE], ProgramTokens)


# Leaving


def test_nothing_is_left_of_an_endpoint(server):
    before = set(threading.enumerate())
    with apr.Endpoint(server.url) as endpoint:
        state = solve.run(backend=endpoint)
        assert state["answer"] is not None
        state.stream_executor.end()
    endpoint.close()  # a second time does no harm
    left = [t for t in set(threading.enumerate()) - before if t.name.startswith("apr-")]
    for thread in left:
        thread.join(5)
    assert not [t for t in left if t.is_alive()]
    with urllib.request.urlopen(server.url + "/v1/loads") as response:
        assert b'"num_running_reqs":0' in response.read().replace(b" ", b"")


def test_the_branches_of_a_program_leave_no_thread(endpoint):
    def threads() -> set[threading.Thread]:
        # The pool that waits for native forks keeps its threads.
        return {t for t in threading.enumerate() if not t.name.startswith("apr-fork")}

    before = threads()
    for _ in range(5):
        state = solve.run(backend=endpoint)
        assert trajectory_of(state).blocks
        state.stream_executor.end()
    until(lambda: threads() <= before, 10)
