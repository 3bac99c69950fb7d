"""The loop on a scripted engine: forks, joins, cuts, budgets and failures that a real model cannot be made to produce."""

from __future__ import annotations

import asyncio
import time

import pytest

import sgl_apr as apr
from sgl_apr.runtime.budget import Budget
from tests.support.threadweaver_traces import TAGS

DIALECT = apr.dialect("threadweaver")
FORK = "<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Outlines>"
both = pytest.mark.parametrize("tags", [TAGS, ()], ids=["tokens", "text"])


def phase_of(prompt: str) -> str:
    """Which phase a prompt of these tests asks for."""
    if prompt.endswith(("1:", "2:")):
        return f"branch {prompt[-2]}"
    return "after" if prompt.endswith("</Thread>\n") else "trunk"


def scripted(tags=TAGS, **replies) -> apr.ScriptedEngine:
    """An engine that forks once into two and answers; `replies` override a phase's reply (branch_1, after, ...)."""
    script = {
        "trunk": "Think. " + FORK,
        "branch 1": " one\n</Thread>",
        "branch 2": " two is longer\n</Thread>",
        "after": "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone.",
        **{k.replace("_", " "): v for k, v in replies.items()},
    }
    return apr.ScriptedEngine(lambda request, prompt: script[phase_of(prompt)], apr.ByteTokenizer(tags))


def reason(engine, **options) -> apr.Trajectory:
    return asyncio.run(apr.areason(engine, "Q: ", **options))


@both
def test_fork_and_join(tags):
    engine = scripted(tags)
    t = reason(engine)
    DIALECT.validate(t.text)
    assert t.text == (
        "Think. " + FORK + "\n<Thread>\n1: one\n</Thread><Thread>\n2: two is longer\n</Thread>\n"
        "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone."
    )
    assert t.answer == "Done."
    assert t.finish == "eos"
    assert [b.finish for b in t.blocks[0].branches] == ["stop", "stop"]
    assert engine.forks == [2], "one fork of the program, one commit before it"
    assert len(engine.commits) == 1
    assert engine.released == 2


@both
def test_what_is_sent_is_what_was_received(tags):
    """Ids go out as they came in; only text that the runtime writes is encoded."""
    engine = scripted(tags)
    t = reason(engine)
    assert t.token_ids == tuple(engine.tokenizer.encode(t.text))
    trunk, first, second, after = (r.input_ids for r in engine.requests)
    prefix = engine.commits[0]
    decoded = tuple(engine.tokenizer.encode("Think. " + FORK))
    lead, header = tuple(engine.tokenizer.encode("\n")), engine.tokenizer.encode
    assert prefix == trunk + decoded + lead
    assert first == prefix + tuple(header("<Thread>\n1:"))
    assert second == prefix + tuple(header("<Thread>\n2:"))
    assert after[: len(first)] == first
    assert after == t.spans[0].token_ids + t.token_ids[: len(after) - len(trunk)]


def test_agrees_with_the_parser():
    """Running and reading give the same graph, so every metric of it."""
    engine = scripted()
    ran, read = reason(engine), None
    read = DIALECT.parse(ran.text, engine.tokenizer)
    assert [(s.role, s.path, s.text, s.label, s.tokens) for s in ran.reply] == [
        (s.role, s.path, s.text, s.label, s.tokens) for s in read.spans
    ]
    assert [s.parents for s in read.spans[1:]] == [tuple(p - 1 for p in s.parents) for s in ran.spans[2:]]
    for convention in ("causal", "threadweaver", "multiverse"):
        assert ran.metrics(convention).critical_path == read.metrics(convention).critical_path


@pytest.mark.parametrize(
    ("reply", "finish"),
    [(apr.Reply(" on and on" * 100), "length"), (apr.Reply(" I stop here"), "eos"), (apr.Reply(""), "eos")],
)
def test_an_open_branch_is_closed_marked_and_survived(reply, finish):
    t = reason(scripted(branch_2=reply), budget=Budget(tokens=400))
    DIALECT.validate(t.text)
    first, second = t.blocks[0].branches
    assert (first.finish, second.finish) == ("stop", finish)
    m = t.metrics()
    assert (m.closers_decoded, m.closers_injected) == (1, 1)
    assert t.answer == "Done."


def test_a_model_that_never_forks_just_answers():
    t = reason(scripted(trunk="The answer is 4."))
    assert (t.answer, t.blocks, t.finish) == ("The answer is 4.", (), "eos")
    assert t.metrics().acceleration == 0


@both
@pytest.mark.parametrize("cut", range(1, len(FORK) + 6, 3))
def test_a_trunk_that_is_cut_anywhere_is_closed(tags, cut):
    """The budget ends the trunk inside its fork, at any place: the trace is whole and within the budget."""
    engine = scripted(
        tags, trunk=apr.Reply("Think." + FORK + "\n"), branch_1=" a</Thread>", branch_2=" b</Thread>"
    )
    real = engine.decode

    async def cut_short(request, on_tokens=None):
        if not engine.requests:
            request = apr.Request(
                request.rid, request.input_ids, cut, stop_ids=request.stop_ids, stop=request.stop
            )
        return await real(request, on_tokens)

    engine.decode = cut_short
    t = reason(engine, budget=Budget(tokens=600, width=2))
    DIALECT.validate(t.text)
    assert t.metrics().total <= 600


@both
@pytest.mark.parametrize("tokens", [150, 260, 333, 512])
def test_the_budget_is_never_exceeded(tags, tokens):
    long = apr.Reply("x" * 2000)
    engine = scripted(tags, branch_1=long, branch_2=long, after=apr.Reply("</Parallel>" + "y" * 2000))
    forked = engine.script
    # Where no fork fits, the mask has none.
    engine.script = lambda request, prompt: (
        long if "outline_1" not in request.grammar and "<Parallel>" not in prompt else forked(request, prompt)
    )
    t = reason(engine, budget=Budget(tokens=tokens, width=2))
    DIALECT.validate(t.text)
    assert t.metrics().total <= tokens


def test_branch_tokens_bounds_each_branch():
    t = reason(scripted(branch_1=apr.Reply("x" * 500)), budget=Budget(branch_tokens=20))
    assert t.blocks[0].branches[0].text == "x" * 20


def test_blocks_follow_one_another_up_to_max_blocks():
    engine = scripted(after="</Parallel>\nAgain. " + FORK)
    answers = iter(["</Parallel>\nAgain. " + FORK, "</Parallel>\nEnough."])
    engine.script = lambda request, prompt, old=engine.script: (
        next(answers) if phase_of(prompt) == "after" else old(request, prompt)
    )
    t = reason(engine, max_blocks=2)
    DIALECT.validate(t.text)
    assert [b.path for b in t.blocks] == [(1,), (2,)]
    assert t.answer == "Enough."
    last = engine.requests[-1].grammar
    assert last is not None
    assert "outline_1" not in last, "with max_blocks reached, the mask has no fork left"


def test_modes_shape_the_mask():
    def trunk_grammar(**options) -> str:
        engine = scripted(trunk="The answer." if options.get("mode") != "parallel" else FORK)
        reason(engine, **options)
        return engine.requests[0].grammar or ""

    assert "outline_1" in trunk_grammar()
    assert "outline_1" not in trunk_grammar(mode="sequential")
    start = trunk_grammar(mode="parallel").splitlines()[0]
    assert start.count("|") == 0, "a fork is the only way"
    assert "outline_3" not in trunk_grammar(budget=Budget(width=2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": Budget(depth=2)}, apr.BudgetExceeded, "nests at most 1 deep"),
        ({"budget": Budget(width=51)}, apr.BudgetExceeded, "at most 50 branches"),
        ({"budget": Budget(width=2), "min_width": 3}, apr.BudgetExceeded, "min_width=3, expected 1 to"),
        ({"join": "kv"}, apr.KvJoinUnavailable, "joins by text"),
        ({"join": "glue"}, apr.AprError, 'join=.glue., expected "text", "kv" or "message"'),
        ({"join": "message"}, apr.AprError, "joins by text"),
        ({"mode": "both"}, apr.AprError, 'expected "auto"'),
        ({"mode": "sequential", "min_blocks": 1}, apr.AprError, "forbids"),
        ({"min_blocks": 2, "max_blocks": 1}, apr.AprError, "0 <= min <= max"),
        ({"budget": Budget(tokens=20), "min_blocks": 1}, apr.BudgetExceeded, "a fork needs at least"),
        ({"dialect": "nope"}, apr.GrammarError, "no dialect 'nope'"),
    ],
)
def test_what_cannot_be_is_refused_when_asked_for(options, error, message):
    with pytest.raises(error, match=message):
        reason(scripted(), **options)


@pytest.mark.parametrize(
    "fields", [{"tokens": 0}, {"width": 1}, {"depth": 0}, {"branch_tokens": 0}, {"seconds": 0}]
)
def test_impossible_budgets(fields):
    with pytest.raises(apr.BudgetExceeded, match="expected"):
        Budget(**fields)


BOOM = apr.Reply(" oh", error=apr.EngineError("boom", 500))
AT_ONCE = apr.Retry(wait=0)


def test_a_failed_branch_is_skipped_and_the_model_reads_so():
    engine = scripted(branch_1=BOOM)
    t = reason(engine, retry=AT_ONCE)
    DIALECT.validate(t.text)
    failed, whole = t.blocks[0].branches
    assert (failed.outcome, failed.text) == ("failed", " (failed)"), "what it had heard is void"
    assert (whole.outcome, whole.text) == ("ok", " two is longer\n")
    assert "1: (failed)</Thread>" in engine.tokenizer.decode(engine.requests[-1].input_ids)
    assert t.answer == "Done."
    asked = [engine.tokenizer.decode(r.input_ids)[-2:] for r in engine.requests]
    assert asked.count("1:") == 3, "as often as a request is repeated"
    assert [c.retries for c in t.calls if c.path == (1, 1)] == [2]


def test_a_fault_changes_no_byte_of_the_others():
    whole = reason(scripted(), seed=1)
    failed = reason(scripted(branch_1=BOOM), seed=1, retry=AT_ONCE)
    kept = [s for s in whole.spans if s.path == (1, 2)]
    same = [s for s in failed.spans if s.path == (1, 2)]
    assert [(s.text, s.token_ids) for s in kept] == [(s.text, s.token_ids) for s in same]


def test_a_failed_branch_can_begin_anew():
    replies = iter([apr.Reply(" oh", error=apr.EngineTimeout("silence")), " better\n</Thread>"])
    engine = scripted()
    engine.script = lambda request, prompt, old=engine.script: (
        next(replies) if phase_of(prompt) == "branch 1" else old(request, prompt)
    )
    t = reason(engine, on_branch_failure="retry")
    assert [b.outcome for b in t.blocks[0].branches] == ["ok", "ok"]
    assert t.blocks[0].branches[0].text == " better\n"


def test_begun_anew_it_is_skipped_at_last():
    t = reason(scripted(branch_1=BOOM), on_branch_failure="retry", retry=AT_ONCE)
    assert [b.outcome for b in t.blocks[0].branches] == ["failed", "ok"]


NO_HEADER = r"""//@ max_width 4, width 4
trace : TEXT? (block TEXT?)*
block : fork path+ tail
fork : "<F>" NL outline+ "</F>"
outline : "<o>" NUMBER ":" TEXT "</o>" NL
path : body
body : TEXT "</p>"
tail : "</B>"
trunk : TEXT? fork | TEXT
after : trunk
TEXT : /(.|\n)+/
NUMBER : /[1-9][0-9]*/
NL : "\n"
"""


def test_a_branch_without_a_header_is_retried():
    failures = iter([apr.EngineError("boom", 400)] * 2)

    def reply(request: apr.Request, prompt: str) -> apr.Reply:
        if "</B>" in prompt:
            return apr.Reply("end")
        if "</F>" in prompt:
            return apr.Reply("body</p>", error=next(failures, None))
        return apr.Reply("<F>\n<o>1: a</o>\n<o>2: b</o>\n</F>")

    engine = apr.ScriptedEngine(reply, apr.ByteTokenizer())
    t = reason(engine, dialect=apr.Dialect.from_source("no_header", NO_HEADER), on_branch_failure="retry")
    assert [b.outcome for b in t.blocks[0].branches] == ["ok", "ok"]
    assert t.answer == "end"


def test_what_passes_is_repeated_and_what_does_not_is_not():
    for status, asked in [(503, 2), (None, 2), (400, 1)]:
        replies = iter([apr.Reply(" oh", error=apr.EngineError("boom", status)), " one\n</Thread>"])
        engine = scripted()
        engine.script = lambda request, prompt, old=engine.script, replies=replies: (
            next(replies) if phase_of(prompt) == "branch 1" else old(request, prompt)
        )
        t = reason(engine, retry=AT_ONCE)
        assert t.blocks[0].branches[0].outcome == ("ok" if asked == 2 else "failed")
        assert sum(c.retries for c in t.calls) == asked - 1


def test_the_trunk_fails_with_an_error():
    engine = scripted(after=BOOM)
    with pytest.raises(apr.EngineError, match="boom"):
        reason(engine, retry=AT_ONCE)
    assert len(engine.aborted) == 1


def test_a_failing_branch_may_take_the_others_with_it():
    slow = apr.Reply(" forever" * 50, delay=0.05)
    engine = scripted(branch_1=BOOM, branch_2=slow)
    began = time.monotonic()
    with pytest.raises(apr.BranchFailed, match=r"branch 1\.1: boom") as error:
        reason(engine, on_branch_failure="raise", retry=AT_ONCE)
    assert error.value.path == (1, 1)
    assert error.value.status == 500
    assert time.monotonic() - began < 5
    assert not engine.active, "the other branch was cancelled"
    assert len(engine.aborted) == 1
    assert engine.released == 2


def test_cancelling_aborts():
    engine = scripted(branch_2=apr.Reply(" forever" * 50, delay=0.05))

    async def go():
        task = asyncio.create_task(apr.areason(engine, "Q: "))
        while len(engine.active) < 1 or engine.forks != [2]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert not engine.active
    assert len(engine.aborted) == 1


def test_the_time_budget_ends_it():
    engine = scripted(trunk=apr.Reply("x" * 1000, delay=0.05))
    t = reason(engine, budget=Budget(seconds=0.3))
    assert 0 < len(t.text) < 1000
    assert (t.finish, t.limits) == ("timeout", (apr.LimitHit("seconds", ()),))
    assert t.wall_s < 2
    assert not engine.active


def test_branches_that_run_out_of_time_leave_some_for_the_conclusion():
    engine = scripted(branch_2=apr.Reply(" forever" * 500, delay=0.02))
    t = reason(engine, budget=Budget(seconds=2.0))
    DIALECT.validate(t.text)
    assert [b.outcome for b in t.blocks[0].branches] == ["ok", "timeout"]
    assert t.blocks[0].branches[1].text.startswith(" forever")
    assert (t.answer, t.finish) == ("Done.", "eos")
    assert t.limits == (apr.LimitHit("seconds", (1, 2)),)
    assert 1.4 < t.wall_s < 2


@pytest.mark.parametrize("bad", ["a</Thread> b", FORK.replace("2:", "3:"), "<Parallel>oops</Parallel>"])
def test_without_the_grammar_a_model_may_leave_the_dialect(bad):
    engine = scripted(trunk=bad)
    t = reason(engine, constrain=False)
    assert t.finish == "malformed"
    assert t.text.startswith(bad[:9])
    assert not DIALECT.is_valid(t.text)
    assert engine.requests[0].grammar is None


@both
def test_text_is_heard_as_it_is_written(tags):
    heard: list[tuple] = []
    engine = scripted(tags, branch_2=apr.Reply(" é\U0001f600 open", end=False))
    t = asyncio.run(
        apr.areason(
            engine,
            "Q: ",
            on_event=lambda e: heard.append((e.path, e.text)) if isinstance(e, apr.Delta) else None,
        )
    )
    for path in {s.path for s in t.reply}:
        assert "".join(x for p, x in heard if p == path) == "".join(s.text for s in t.reply if s.path == path)
    assert not any("\ufffd" in x for _, x in heard)


def test_each_request_of_a_trajectory_has_its_own_id_with_one_prefix():
    engine = scripted()
    reason(engine)
    rids = [r.rid for r in engine.requests]
    assert len(set(rids)) == len(rids)
    assert len({r.rsplit("-", 1)[0] for r in engine.requests for r in [r.rid]}) == 1
    assert len({len(r) for r in rids}) == 1, "fixed width: no id is the prefix of another"


PLAIN_ERRORS = [ConnectionResetError("gone"), BrokenPipeError(), OSError(5, "disk"), TimeoutError("slow")]


@pytest.mark.parametrize("error", PLAIN_ERRORS, ids=lambda e: type(e).__name__)
def test_what_a_connection_raises_is_an_error_of_the_engine(error: OSError):
    engine = scripted(branch_1=apr.Reply(" oh", error=error))
    t = reason(engine, retry=AT_ONCE)
    assert [b.outcome for b in t.blocks[0].branches] == ["failed", "ok"]
    is_timeout = isinstance(error, TimeoutError)
    assert sum(r.input_ids[-2:] == (ord("1"), ord(":")) for r in engine.requests) == (1 if is_timeout else 3)
    kind = apr.EngineTimeout if is_timeout else apr.EngineError
    with pytest.raises(kind, match="the engine failed: ") as raised:
        reason(scripted(trunk=apr.Reply("x", error=error)), retry=AT_ONCE)
    assert raised.value.__cause__ is error


def test_an_engine_that_fails_to_commit_release_load_and_abort():
    class Broken(apr.ScriptedEngine):
        async def commit(self, request):
            raise ConnectionResetError("gone")

        async def release(self):
            raise ConnectionResetError("gone")

        async def load(self):
            raise OSError("gone")

        async def abort(self, rid):
            raise ConnectionResetError("gone")

    works = scripted()
    engine = Broken(works.script, works.tokenizer)
    with pytest.raises(apr.EngineError, match="the engine failed: gone"):
        reason(engine, retry=AT_ONCE)

    async def commits(request):
        return apr.Result((), "length", len(request.input_ids), 0)

    engine.commit = commits
    assert reason(engine).answer == "Done."


def test_what_a_listener_raises_is_no_error_of_the_engine():
    def closed(event):
        raise BrokenPipeError("standard output is closed")

    def closed_in_a_branch(event):
        if isinstance(event, apr.Delta) and event.path:
            raise BrokenPipeError("standard output is closed")

    for on_event in (closed, closed_in_a_branch):
        engine = scripted()
        with pytest.raises(BrokenPipeError):
            reason(engine, on_event=on_event)
        assert len({r.input_ids for r in engine.requests}) == len(engine.requests), "nothing is repeated"


def test_a_required_fork_that_time_rules_out_is_noted(caplog):
    t = reason(
        scripted(trunk=apr.Reply("Think about it", delay=0.05)), budget={"seconds": 0.2}, mode="parallel"
    )
    assert not t.blocks
    assert [(hit.limit, hit.path) for hit in t.limits] == [("seconds", ())]
    assert "the reply ended with 0 of 1 required forks; limits that it reached: seconds" in caplog.text
