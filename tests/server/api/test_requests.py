"""What the server makes of requests and events, without a server: plans, caps, objects on the wire."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.runtime.event_json import event_from_json, event_to_json
from sgl_apr.server.api.limits import RequestLimits, read_caps
from sgl_apr.server.api.openai_response import OpenAIResponseBuilder, ResponseOptions
from sgl_apr.server.api.options import RequestParser
from sgl_apr.server.launch.usage import UsageError
from tests.runtime.test_loop import AT_ONCE, BOOM, scripted
from tests.support.masked_sampler import SampledEngine, masked

FREE = RequestLimits()
CAPS = RequestLimits(width=4, depth=2, tokens=900, seconds=30)


def plan(options: dict, caps: RequestLimits = FREE, context: int = 2000, prompt: int = 100, **more):
    return RequestParser(caps, apr.ByteTokenizer(), context, 300).plan(options, prompt, **more)


def test_every_kind_of_option_is_taken():
    made = plan(
        {
            "dialect": "multiverse", "budget": {"tokens": 500, "seconds": 2, "depth": 2}, "join": "text",
            "policy": "quorum:2", "mode": "parallel", "min_width": 2, "on_branch_failure": "raise", "seed": 7,
            "retry": {"attempts": 1}, "pacing": {"max_parallel": 2}, "temperature": 0, "sampling": {"top_p": 0.5},
            "cache_salt": "s", "priority": 3, "forbid_angle_brackets": True, "max_blocks": None,
        }
    )  # fmt: skip
    assert made.dialect.name == "multiverse"
    assert made.budget == apr.Budget(tokens=500, seconds=2, depth=2)
    assert (made.policy, made.mode, made.on_branch_failure, made.seed, made.forbid_angle_brackets) == (
        "quorum:2",
        "parallel",
        "raise",
        7,
        True,
    )
    assert (made.retry, made.pacing) == (apr.Retry(attempts=1), apr.Pacing(max_parallel=2))
    assert made.sampling == {"temperature": 0, "top_p": 0.5}
    assert made.request_fields == {"cache_salt": "s", "priority": 3}


WRONG = [
    ({"widht": 3}, apr.AprError, "no option 'widht'"),
    ({"branch_prompt_template": "str.upper"}, apr.AprError, "no option 'branch_prompt_template'"),
    ({"max_new_tokens": 5}, apr.AprError, "no option 'max_new_tokens'"),
    ({"custom_params": {"apr_layout": "[1]"}}, apr.AprError, "no option 'custom_params'"),
    ({"sampling": {"ebnf": "x"}}, apr.AprError, "no sampling 'ebnf'"),
    ({"sampling": []}, apr.AprError, "sampling=.*expected an object"),
    ({"budget": 5}, apr.AprError, "budget=5, expected an object"),
    ({"budget": {"tokens": 10.5}}, apr.AprError, "expected a whole number"),
    ({"budget": {"tokens": True}}, apr.AprError, "expected a whole number"),
    ({"budget": {"seconds": float("nan")}}, apr.AprError, "expected a number"),
    ({"budget": {"seconds": "1"}}, apr.AprError, "expected a number"),
    ({"budget": {"width": 1}}, apr.BudgetExceeded, "at least 2"),
    ({"budget": {"width": 99}}, apr.BudgetExceeded, "at most 50"),
    ({"policy": "lambda ended: True"}, apr.AprError, "policy="),
    ({"policy": ["first"]}, apr.AprError, "expected a string"),
    ({"mode": "fast"}, apr.AprError, "mode='fast'"),
    ({"join": "kv", "dialect": "spawn"}, apr.KvJoinUnavailable, "spawn joins by message"),
    ({"join": "message"}, apr.AprError, "joins by"),
    ({"dialect": "../../etc/passwd"}, apr.GrammarError, "expected one of apr, asyncthink"),
    ({"dialect": {}}, apr.GrammarError, "no dialect"),
    ({"retry": {"attempts": 10**9}}, apr.AprError, "at most 10"),
    ({"pacing": {"min_speedup": 0}}, apr.AprError, "min_speedup"),
    ({"lora_path": 3}, apr.AprError, "lora_path=3, expected a string"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_what_is_wrong_is_said(options, kind, message):
    with pytest.raises(kind, match=message):
        plan(options)


# Caps


@pytest.mark.parametrize("name", ["width", "depth", "tokens", "seconds"])
def test_a_cap_can_be_lowered_and_not_raised(name: str):
    cap = getattr(CAPS, name)
    lower = plan({"dialect": "multiverse", "budget": {name: cap}}, CAPS)
    assert getattr(lower.budget, name) == cap
    with pytest.raises(apr.BudgetExceeded, match=f"{name}={cap + 1} is more than .* --apr-max-{name} {cap}"):
        plan({"dialect": "multiverse", "budget": {name: cap + 1}}, CAPS)


def test_who_asks_for_nothing_gets_the_cap():
    budget = plan({}, CAPS).budget
    assert (budget.width, budget.depth, budget.tokens, budget.seconds) == (4, 1, 900, 30)
    assert plan({}, RequestLimits(width=20)).budget.width == apr.dialect("threadweaver").width


def test_a_reply_fits_the_context_if_nothing_is_said():
    assert plan({}, context=1000, prompt=300).budget.tokens == 699
    assert plan({}, context=10**6).budget == apr.Budget()
    assert plan({"budget": {"tokens": 9000}}, context=1000).budget.tokens == 9000


def test_the_tokens_of_the_request_bound_those_of_the_budget():
    assert plan({"budget": {"tokens": 500}}, most=90).budget.tokens == 90
    assert plan({"budget": {"tokens": 50}}, most=90).budget.tokens == 50
    with pytest.raises(apr.BudgetExceeded, match="tokens=901"):
        plan({}, CAPS, most=901)


def test_caps_are_read_from_the_command_line():
    argv = [
        "--model",
        "m",
        "--apr-max-width",
        "4",
        "--tp=2",
        "--apr-max-seconds=1.5",
        "--apr-max-concurrent",
        "3",
    ]
    assert read_caps(argv) == (RequestLimits(width=4, seconds=1.5, concurrent=3), ["--model", "m", "--tp=2"])
    assert read_caps(["--apr-max-heat", "4"]) == (
        RequestLimits(),
        ["--apr-max-heat", "4"],
    )  # for SGLang to refuse
    for wrong in (
        ["--apr-max-width", "1"],
        ["--apr-max-tokens", "many"],
        ["--apr-max-depth"],
        ["--apr-max-seconds", "nan"],
    ):
        with pytest.raises(UsageError, match=wrong[0]):
            read_caps(wrong)


# On the wire


def events_of(engine, **options) -> list:
    heard: list = []
    asyncio.run(apr.areason(engine, "Q: ", on_event=heard.append, **options))
    return heard


@pytest.mark.parametrize("name", dialect_names())
def test_events_come_back_from_json(name: str):
    heard = events_of(
        SampledEngine(masked(name), seed=1), dialect=name, mode="parallel", budget=apr.Budget(tokens=900)
    )
    sent = [json.loads(json.dumps(event_to_json(event))) for event in heard]
    assert [event_from_json(data) for data in sent] == heard
    assert apr.rebuild(map(event_from_json, sent)) == apr.rebuild(heard)


@pytest.mark.parametrize(
    "data", [{}, {"event": "delta"}, {"event": "x"}, {"event": "branch_ended", "path": [], "spam": 1}]
)
def test_what_is_no_event_is_refused(data):
    with pytest.raises(apr.AprError, match="not an event"):
        event_from_json(data)


def chunks_of(heard: list, *, chat: bool = True, **options_) -> list[dict]:
    async def source():
        for event in heard:
            yield event
        yield apr.rebuild(heard)

    async def collect() -> list[dict]:
        return [
            chunk
            async for chunk in OpenAIResponseBuilder("m", chat, ResponseOptions(**options_)).chunks(source())
        ]

    return asyncio.run(collect())


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("failed", ["skip", "retry"])
def test_what_is_void_can_be_taken_back(chat: bool, failed: str):
    heard = events_of(scripted(branch_1=BOOM), retry=AT_ONCE, on_branch_failure=failed)
    texts: dict = defaultdict(str)
    for chunk in chunks_of(heard, chat=chat):
        (choice,) = chunk["choices"]
        note, text = chunk["apr"], (choice["delta"].get("content", "") if chat else choice["text"])
        if note.get("event") == "text_retracted":
            kept = texts[note["path"]]
            texts[note["path"]] = "" if note["chars"] is None else kept[: len(kept) - note["chars"]]
        elif text:
            texts[note["path"]] += text
    trajectory = apr.rebuild(heard)
    assert any(isinstance(event, apr.TextRetracted) for event in heard)
    assert texts == {p: "".join(s.text for s in trajectory.reply if s.path == p) for p in texts}
    assert "".join(texts.values()).count("(failed)") == 1


def test_a_stream_of_the_trunk_has_nothing_of_its_branches():
    heard = events_of(scripted())
    chunks = chunks_of(heard, trunk=True, usage=True)
    *pieces, last, usage = chunks
    trajectory = apr.rebuild(heard)
    text = "".join(c["choices"][0]["delta"]["content"] for c in pieces)
    assert text == "".join(s.text for s in trajectory.reply if not s.path)
    assert {tuple(c["apr"]["path"]) for c in pieces} == {()}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["apr"]["event"] == "done"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == trajectory.metrics().total
