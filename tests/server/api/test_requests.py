"""Requests, limits, events and responses of the API, without a server."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.runtime.event_json import event_from_json, event_to_json
from sgl_apr.server.api.limits import RequestLimits, parse_limit_arguments
from sgl_apr.server.api.openai_response import OpenAIResponseBuilder, ResponseOptions
from sgl_apr.server.api.options import OptionsParser, ReasonRequest
from sgl_apr.server.launch.usage import UsageError
from tests.runtime.test_loop import AT_ONCE, BOOM, scripted
from tests.support.masked_sampler import SampledEngine, masked

NO_LIMITS = RequestLimits()
LIMITS = RequestLimits(width=4, depth=2, tokens=900, seconds=30)


def parse(options: dict, limits: RequestLimits = NO_LIMITS, context: int = 2000, prompt: int = 100, **more):
    """The options of a request whose prompt has `prompt` tokens."""
    parser = OptionsParser(limits, apr.ByteTokenizer(), context, 300)
    ids, parsed = parser.parse(ReasonRequest([1] * prompt, options, **more))
    assert ids == (1,) * prompt
    return parsed


def test_every_kind_of_option_is_taken():
    made = parse(
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
        parse(options)


# Limits


@pytest.mark.parametrize("name", ["width", "depth", "tokens", "seconds"])
def test_a_request_can_lower_a_limit_but_not_raise_it(name: str):
    limit = getattr(LIMITS, name)
    lower = parse({"dialect": "multiverse", "budget": {name: limit}}, LIMITS)
    assert getattr(lower.budget, name) == limit
    with pytest.raises(
        apr.BudgetExceeded, match=f"{name}={limit + 1} is more than .* --apr-max-{name} {limit}"
    ):
        parse({"dialect": "multiverse", "budget": {name: limit + 1}}, LIMITS)


def test_a_request_without_limits_gets_the_operators():
    budget = parse({}, LIMITS).budget
    assert (budget.width, budget.depth, budget.tokens, budget.seconds) == (4, 1, 900, 30)
    assert parse({}, RequestLimits(width=20)).budget.width == apr.dialect("threadweaver").width


def test_a_reply_fits_the_context_if_nothing_is_said():
    assert parse({}, context=1000, prompt=300).budget.tokens == 699
    assert parse({}, context=10**6).budget == apr.Budget()
    assert parse({"budget": {"tokens": 9000}}, context=1000).budget.tokens == 9000


def test_the_tokens_of_the_request_bound_those_of_the_budget():
    assert parse({"budget": {"tokens": 500}}, max_tokens=90).budget.tokens == 90
    assert parse({"budget": {"tokens": 50}}, max_tokens=90).budget.tokens == 50
    with pytest.raises(apr.BudgetExceeded, match="tokens=901"):
        parse({}, LIMITS, max_tokens=901)


def test_limits_are_parsed_from_the_command_line():
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
    assert parse_limit_arguments(argv) == (
        RequestLimits(width=4, seconds=1.5, concurrent=3),
        ["--model", "m", "--tp=2"],
    )
    assert parse_limit_arguments(["--apr-max-heat", "4"]) == (
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
            parse_limit_arguments(wrong)


# Events and responses


def events_of(engine, **options) -> list:
    events: list = []
    asyncio.run(apr.areason(engine, "Q: ", on_event=events.append, **options))
    return events


@pytest.mark.parametrize("name", dialect_names())
def test_events_come_back_from_json(name: str):
    events = events_of(
        SampledEngine(masked(name), seed=1), dialect=name, mode="parallel", budget=apr.Budget(tokens=900)
    )
    sent = [json.loads(json.dumps(event_to_json(event))) for event in events]
    assert [event_from_json(data) for data in sent] == events
    assert apr.rebuild(map(event_from_json, sent)) == apr.rebuild(events)


@pytest.mark.parametrize(
    "data", [{}, {"event": "delta"}, {"event": "x"}, {"event": "branch_ended", "path": [], "spam": 1}]
)
def test_what_is_no_event_is_refused(data):
    with pytest.raises(apr.AprError, match="not an event"):
        event_from_json(data)


def chunks_of(events: list, *, chat: bool = True, **options) -> list[dict]:
    async def source():
        for event in events:
            yield event
        yield apr.rebuild(events)

    async def collect() -> list[dict]:
        return [
            chunk
            async for chunk in OpenAIResponseBuilder("m", chat, ResponseOptions(**options)).chunks(source())
        ]

    return asyncio.run(collect())


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("failed", ["skip", "retry"])
def test_what_is_void_can_be_taken_back(chat: bool, failed: str):
    events = events_of(scripted(branch_1=BOOM), retry=AT_ONCE, on_branch_failure=failed)
    texts: dict = defaultdict(str)
    for chunk in chunks_of(events, chat=chat):
        (choice,) = chunk["choices"]
        note, text = chunk["apr"], (choice["delta"].get("content", "") if chat else choice["text"])
        if note.get("event") == "text_retracted":
            kept = texts[note["path"]]
            texts[note["path"]] = "" if note["chars"] is None else kept[: len(kept) - note["chars"]]
        elif text:
            texts[note["path"]] += text
    trajectory = apr.rebuild(events)
    assert any(isinstance(event, apr.TextRetracted) for event in events)
    assert texts == {p: "".join(s.text for s in trajectory.reply if s.path == p) for p in texts}
    assert "".join(texts.values()).count("(failed)") == 1


def test_a_stream_of_the_trunk_has_nothing_of_its_branches():
    events = events_of(scripted())
    chunks = chunks_of(events, trunk_only=True, include_usage=True)
    *pieces, last, usage = chunks
    trajectory = apr.rebuild(events)
    text = "".join(c["choices"][0]["delta"]["content"] for c in pieces)
    assert text == "".join(s.text for s in trajectory.reply if not s.path)
    assert {tuple(c["apr"]["path"]) for c in pieces} == {()}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["apr"]["event"] == "done"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == trajectory.metrics().total
