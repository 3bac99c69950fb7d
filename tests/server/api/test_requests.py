"""Requests, limits, events and responses of the API, without a server."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections import defaultdict

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.runtime.event_json import event_from_json, event_to_json
from sgl_apr.runtime.options import make_options
from sgl_apr.server.api.admission import AdmissionQueue, ServerBusy
from sgl_apr.server.api.config import ApiConfig, merge_options, parse_api_arguments
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.openai.response import OpenAIResponseBuilder
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.options import CheckedRequest, OptionsParser, ReasonRequest
from sgl_apr.server.launch.launcher import serve
from sgl_apr.server.launch.usage import UsageError
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models import builtin_path
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
            "retry": {"attempts": 1}, "scoring": {"keep": 0.25, "threshold": None, "border": None}, "pacing": {"max_parallel": 2}, "temperature": 0, "sampling": {"top_p": 0.5},
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
    assert made.scoring == apr.BranchScoring(keep=0.25)
    assert made.sampling == {"temperature": 0, "top_p": 0.5}
    assert made.request_fields == {"cache_salt": "s", "priority": 3}


WRONG = [
    ({"widht": 3}, apr.AprError, "no option 'widht', expected some of dialect, budget"),
    ({"budgett": {}}, apr.AprError, "no option 'budgett', did you mean 'budget'"),
    ({"branch_prompt_template": "str.upper"}, apr.AprError, "no option 'branch_prompt_template'"),
    ({"max_new_tokens": 5}, apr.AprError, "no option 'max_new_tokens': a budget limits"),
    ({"custom_params": {"apr_layout": "[1]"}}, apr.AprError, "no option 'custom_params': the dialect's grammar"),
    ({"sampling": {"ebnf": "x"}}, apr.AprError, "no sampling 'ebnf': the dialect's grammar"),
    ({"sampling": []}, apr.AprError, "sampling=.*expected an object"),
    ({"budget": 5}, apr.AprError, "budget=5, expected an object"),
    ({"budget": {"tokens": 10.5}}, apr.AprError, "expected a whole number"),
    ({"budget": {"tokens": True}}, apr.AprError, "expected a whole number"),
    ({"budget": {"seconds": float("nan")}}, apr.AprError, "expected a number"),
    ({"budget": {"seconds": "1"}}, apr.AprError, "expected a number"),
    ({"budget": {"width": 1}}, apr.BudgetExceeded, "at least 2"),
    ({"budget": {"width": 99}}, apr.BudgetExceeded, "at most 50"),
    ({"policy": "lambda ended: True"}, apr.AprError, "policy="),
    ({"policy": ["first"]}, apr.AprError, r"policy=\['first'\], expected \"all\""),
    ({"mode": "fast"}, apr.AprError, "mode='fast'"),
    ({"join": "kv", "dialect": "spawn"}, apr.KvJoinUnavailable, "spawn joins by message"),
    ({"join": "message"}, apr.AprError, "joins by"),
    ({"dialect": "../../etc/passwd"}, apr.GrammarError, "expected one of apr, asyncthink"),
    ({"dialect": {}}, apr.GrammarError, "no dialect"),
    ({"retry": {"attempts": 10**9}}, apr.AprError, "at most 10"),
    ({"scoring": {"scorer": "http://10.0.0.1/score"}}, apr.AprError, "expected a function of the problem and a text, or"),
    ({"scoring": {"keep": "half"}}, apr.AprError, "keep='half', expected a number"),
    ({"scoring": {"keeps": 0.5}}, apr.AprError, "keeps"),
    ({"scoring": []}, apr.AprError, "expected an object with fields of BranchScoring"),
    ({"pacing": {"min_speedup": 0}}, apr.AprError, "min_speedup"),
    ({"lora_path": 3}, apr.AprError, "lora_path=3, expected a string"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_what_is_wrong_is_said(options, kind, message):
    with pytest.raises(kind, match=message):
        parse(options)


LONG_VALUES = [
    {"policy": "quorum:" + "9" * 5000},
    {"policy": "deadline:" + "9" * 5000},
    {"policy": "9" * 100_000},
    {"mode": "x" * 10**6},
    {"dialect": "x" * 10**6},
    {"x" * 10**6: 1},
    {"sampling": {"x" * 10**6: 1}},
    {"logit_bias": {"9" * 5000: 1}},
    {"budget": {"tokens": 10**5000}},
    {"budget": json.loads("[" * 900 + "]" * 900)},
    {"seed": {str(k): [k] for k in range(10**5)}},
    {str(k): k for k in range(300_000)},
]


@pytest.mark.parametrize("options", LONG_VALUES, ids=lambda o: next(iter(o))[:10])
def test_a_long_value_is_refused_in_one_short_line_at_once(options: dict):
    start = time.perf_counter()
    with pytest.raises(apr.AprError) as error:
        parse(options)
    assert time.perf_counter() - start < 1.0
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


# Prompts


class NeverEncodes(apr.ByteTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        raise AssertionError("encoded")


class NeverRead(list):
    def __iter__(self):
        raise AssertionError("read")


def test_the_length_of_a_prompt_is_checked_before_it_is_read():
    parser = OptionsParser(NO_LIMITS, NeverEncodes(), 2000, 300, max_token_chars=4)
    with pytest.raises(
        apr.BudgetExceeded, match="the prompt has 8001 characters, expected at most 8000: the context"
    ):
        parser.parse(ReasonRequest("x" * 8001, {}))
    with pytest.raises(
        apr.BudgetExceeded, match="the prompt has 2000 tokens, expected at most 1999: the context"
    ):
        parser.parse(ReasonRequest(NeverRead([1] * 2000), {}))
    with pytest.raises(AssertionError, match="encoded"):
        parser.parse(ReasonRequest("x" * 8000, {}))


@pytest.mark.parametrize("prompt", [None, 5, True, {}, [], [[1]], [1, "x"], [1, True], [1.0], ""])
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(apr.AprError, match=r"expected .*text, or a list of token ids"):
        OptionsParser(NO_LIMITS, apr.ByteTokenizer(), 2000, 300).parse(ReasonRequest(prompt, {}))


def test_others_run_while_a_long_prompt_is_encoded():
    """In a thread, and without the lock of the interpreter."""
    tokenizer = HfTokenizer(builtin_path())
    prompt = " 24: 3 7 8 12" * 40_000
    parser = OptionsParser(NO_LIMITS, tokenizer, 10**7, 10**6, tokenizer.max_token_chars)

    async def longest_pause() -> tuple[float, float]:
        start = time.perf_counter()
        task = asyncio.create_task(parser.parse_in_thread(ReasonRequest(prompt, {"dialect": "threadweaver"})))
        pause, last = 0.0, start
        while not task.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            pause, last = max(pause, now - last), now
        ids, _ = await task
        assert len(ids) > 10**5
        return pause, time.perf_counter() - start

    pause, total = asyncio.run(longest_pause())
    assert pause < max(0.5 * total, 0.1)


# Values that would end SGLang's scheduler, or that it refuses. The vocabulary of `parse` has 300 token ids.

BAD_SAMPLING = [
    ({"temperature": -1}, "temperature=-1, expected a number from 0 to"),
    ({"temperature": float("inf")}, "temperature=inf, expected a number"),
    ({"temperature": 1e300}, "temperature=1e\\+300, expected a number from 0 to 3e\\+38"),
    ({"temperature": 10**400}, "temperature=1000.*, expected a number"),
    ({"temperature": True}, "temperature=True, expected a number"),
    ({"top_p": 0}, "top_p=0, expected a number above 0, at most 1"),
    ({"top_p": 1e-300}, "top_p=1e-300, expected a number above 0"),
    ({"top_p": 1.01}, "top_p=1.01, expected"),
    ({"top_k": 0}, "top_k=0, expected -1 or a whole number from 1 to 2147483647"),
    ({"top_k": -2}, "top_k=-2, expected -1 or"),
    ({"top_k": 2**31}, "top_k=2147483648, expected"),
    ({"top_k": 99999999999999}, "top_k=99999999999999, expected -1 or a whole number from 1 to 2147483647"),
    ({"top_k": 1.5}, "top_k=1.5, expected a whole number"),
    ({"min_p": -0.1}, "min_p=-0.1, expected a number from 0 to 1"),
    ({"min_p": 2}, "min_p=2, expected a number from 0 to 1"),
    ({"frequency_penalty": 2.1}, "frequency_penalty=2.1, expected a number from -2 to 2"),
    ({"presence_penalty": -3}, "presence_penalty=-3, expected a number from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty=0, expected a number from 1e-06 to 2"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40, expected a number from 1e-06 to 2"),
    ({"repetition_penalty": 3}, "repetition_penalty=3, expected"),
    ({"logit_bias": {"5": "x"}}, "logit_bias\\['5'\\]='x', expected a number"),
    ({"logit_bias": {"5": None}}, "logit_bias\\['5'\\]=None, expected a number"),
    ({"logit_bias": {"5": [1]}}, "logit_bias\\['5'\\]=\\[1\\], expected a number"),
    ({"logit_bias": {"5": True}}, "logit_bias\\['5'\\]=True, expected a number"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias\\['5'\\]=nan, expected a number"),
    ({"logit_bias": {"5": 10**400}}, "logit_bias\\['5'\\]=1000.*, expected a number"),
    ({"logit_bias": {"5": 3e38}}, "logit_bias\\['5'\\]=3e\\+38, expected a number from -1e\\+20 to 1e\\+20"),
    ({"logit_bias": {"300": 1}}, "logit_bias has the key '300', expected a token id from 0 to 299"),
    ({"logit_bias": {300: 1}}, "logit_bias has the key 300, expected a token id"),
    ({"logit_bias": {True: 1}}, "logit_bias has the key True, expected a token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias has the key '-1', expected a token id"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias has the key '1_0', expected a token id"),
    ({"logit_bias": {"\u0663": 1}}, "logit_bias has the key '\u0663', expected a token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias has the key '9999.*, expected a token id"),
    ({"logit_bias": {"": 1}}, "logit_bias has the key '', expected a token id"),
    ({"logit_bias": [5]}, "logit_bias=\\[5\\], expected an object"),
]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True], ids=["option", "sampling"])
@pytest.mark.parametrize(
    ("sampling", "message"), BAD_SAMPLING, ids=[str(b[0])[:50].replace("\u0663", "3") for b in BAD_SAMPLING]
)
def test_a_bad_sampling_value_is_refused(sampling: dict, message: str, nested: bool):
    with pytest.raises(apr.AprError, match=("^sampling " if nested else "^") + message):
        parse({"sampling": sampling} if nested else sampling)


def test_sampling_values_at_the_ends_of_their_ranges_are_accepted():
    low = {
        "temperature": 0, "top_p": 1e-6, "top_k": -1, "min_p": 0, "frequency_penalty": -2, "presence_penalty": -2,
        "repetition_penalty": 1e-6, "logit_bias": {},
    }  # fmt: skip
    high = {
        "temperature": 1e38, "top_p": 1, "top_k": 2**31 - 1, "min_p": 1, "frequency_penalty": 2,
        "presence_penalty": 2, "repetition_penalty": 2, "logit_bias": {"299": -100, "0": 1e20},
    }  # fmt: skip
    for values in (low, high):
        assert parse(values).sampling == parse({"sampling": values}).sampling == values
    assert parse({"top_k": 1}).sampling == {"top_k": 1}


def test_a_logit_bias_is_sent_with_strings_and_floats():
    bias = parse({"logit_bias": {5: 10**30 // 10**12, "007": -1}}).sampling["logit_bias"]
    assert bias == {"5": 1e18, "7": -1}
    assert {type(value) for value in bias.values()} == {float}


@pytest.mark.parametrize("name", ["seed", "priority", "min_blocks"])
@pytest.mark.parametrize(
    "value",
    [2**63, -(2**63) - 1, 18446744073709551617, float(2**64), 10**400],
    ids=lambda v: str(v)[:20],
)
def test_a_whole_number_of_more_than_64_bits_is_refused(name: str, value: float):
    with pytest.raises(
        apr.AprError, match=rf"^{name}=.*, expected a whole number from -2\*\*63 to 2\*\*63 - 1"
    ):
        parse({name: value})


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**63 - 1])
def test_a_seed_of_64_bits_is_accepted(seed: int):
    assert parse({"seed": seed}).seed == seed


@pytest.mark.parametrize("number", ["18446744073709551617", "9" * 400, "9" * 5000], ids=len)
def test_a_body_with_a_seed_that_is_too_large_is_refused(number: str):
    body = f'{{"input_ids": [1], "seed": {number}}}'.encode()
    with pytest.raises(apr.AprError, match=r"seed=.*, expected a whole number|the body is not JSON"):
        OptionsParser(NO_LIMITS, apr.ByteTokenizer(), 2000, 300).parse(ReasonRequest.from_json(body))


def test_a_token_limit_that_is_too_large_is_refused():
    with pytest.raises(apr.AprError, match=r"^max_tokens=1000.*, expected a whole number"):
        parse({}, max_tokens=10**400)


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
    assert parse_api_arguments(argv) == (
        ApiConfig(RequestLimits(width=4, seconds=1.5, concurrent=3)),
        ["--model", "m", "--tp=2"],
    )
    assert parse_api_arguments(["--apr-max-heat", "4"]) == (
        ApiConfig(),
        ["--apr-max-heat", "4"],
    )  # for SGLang to refuse
    for wrong in (
        ["--apr-max-width", "1"],
        ["--apr-max-tokens", "many"],
        ["--apr-max-tokens", "9" * 5000],
        ["--apr-max-depth"],
        ["--apr-max-seconds", "nan"],
        ["--apr-max-seconds", "inf"],
        ["--apr-queue-timeout", "0"],
        ["--apr-max-queued", "-1"],
    ):
        with pytest.raises(UsageError, match=wrong[0]) as error:
            parse_api_arguments(wrong)
        assert len(str(error.value)) < 200


def test_default_options_are_parsed_from_the_command_line():
    text = '{"mode": "parallel", "budget": {"width": 3}, "temperature": 0.5, "separate_reasoning": true}'
    config, remaining = parse_api_arguments(["--apr-default", text, "--apr-all-chats"])
    assert remaining == []
    assert config.all_chats
    assert config.default_options == {
        "mode": "parallel",
        "budget": {"width": 3},
        "sampling": {"temperature": 0.5},
        "separate_reasoning": True,
    }


WRONG_DEFAULTS = [
    ("{", "not JSON"),
    ("[1]", "expected an object"),
    ('{"widht": 3}', "no option 'widht'"),
    ('{"dialect": "klingon"}', "no dialect 'klingon'"),
    ('{"policy": "some"}', "policy='some'"),
    ('{"temperature": -1}', "temperature=-1"),
    ('{"stream": "branches"}', "stream='branches'"),
    ('{"budget": {"width": 9}}', "--apr-max-width 8"),
    ('{"budget": 3}', "budget=3, expected an object"),
    ('{"temperature": 1, "sampling": 3}', "sampling=3, expected an object"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_DEFAULTS)
def test_wrong_default_options_are_refused_before_the_launch(text: str, message: str, capsys):
    flags = ["--apr-max-width", "8", "--apr-default", text]
    with pytest.raises(UsageError, match=f"--apr-default.*{message}"):
        parse_api_arguments(flags)
    assert serve(["--model", "nowhere", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_options_of_a_request_win_over_the_defaults():
    defaults = {"mode": "parallel", "budget": {"width": 3, "tokens": 90}, "seed": 1}
    own = {"budget": {"width": 2, "tokens": None}, "seed": None, "mode": "auto", "policy": "first"}
    assert merge_options(defaults, own) == {
        "mode": "auto",
        "budget": {"width": 2, "tokens": 90},
        "seed": 1,
        "policy": "first",
    }
    with pytest.raises(apr.AprError, match="budget=3, expected an object"):
        merge_options(defaults, {"budget": 3})


# The queue


def test_trajectories_wait_in_order():
    async def go() -> list[int]:
        queue, order = AdmissionQueue(RequestLimits(concurrent=2, queued=8)), []

        async def run(number: int) -> None:
            async with queue.slot():
                order.append(number)
                assert queue.running <= 2
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(run(number)) for number in range(8)]
        await asyncio.sleep(0)
        assert (queue.running, queue.queued) == (2, 6)
        tasks[3].cancel()  # a client that disconnects gives its place up
        await asyncio.sleep(0)
        assert (queue.running, queue.queued) == (2, 5)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (queue.running, queue.queued) == (0, 0)
        return order

    assert asyncio.run(go()) == [0, 1, 2, 4, 5, 6, 7]


def test_a_full_queue_and_a_long_wait_are_refused():
    changes: list[tuple[int, int]] = []

    async def go() -> tuple[ServerBusy, ServerBusy]:
        limits = RequestLimits(concurrent=1, queued=1, queue_timeout=0.02)
        queue = AdmissionQueue(limits, lambda running, queued: changes.append((running, queued)))

        async def enter() -> None:
            async with queue.slot():
                raise AssertionError("admitted")

        async with queue.slot():
            waiting = asyncio.create_task(enter())
            await asyncio.sleep(0)
            with pytest.raises(ServerBusy) as full:
                await enter()
            with pytest.raises(ServerBusy) as late:
                await waiting
        async with queue.slot():  # the slot was not lost
            pass
        return full.value, late.value

    full, late = asyncio.run(go())
    assert "--apr-max-concurrent 1" in str(full)
    assert "--apr-max-queued 1" in str(full)
    assert "--apr-queue-timeout 0.02" in str(late)
    assert (full.retry_after, late.retry_after) == (1, 1)
    assert changes == [(1, 0), (1, 1), (1, 0), (0, 0), (1, 0), (0, 0)]
    assert pickle.loads(pickle.dumps(full)).retry_after == 1


def test_what_the_kv_cache_does_not_hold_waits():
    async def go() -> tuple[ServerBusy, ServerBusy]:
        queue = AdmissionQueue(RequestLimits(concurrent=8, queued=1, queue_timeout=0.02))
        queue.kv.pool_tokens = 1000

        async def enter() -> None:
            async with queue.slot(300, 200):
                raise AssertionError("admitted")

        async with queue.slot(300, 200):
            async with queue.slot(100, 200):
                waiting = asyncio.create_task(enter())
                await asyncio.sleep(0)
                assert (queue.running, queue.queued) == (2, 1)
                with pytest.raises(ServerBusy) as full:
                    await enter()
                with pytest.raises(ServerBusy) as late:
                    await waiting
            async with queue.slot(200, 200):  # the slot of the second one is free again
                assert queue.running == 2
        return full.value, late.value

    for error in asyncio.run(go()):
        assert "2 trajectories are running, as many as fit into the KV cache of 1000 tokens" in str(error)


def test_the_time_to_retry_is_estimated_from_what_ran(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    async def go() -> list[int]:
        queue, estimates = AdmissionQueue(RequestLimits(concurrent=2)), []
        async with queue.slot(), queue.slot():
            clock[0] = 8.0
            estimates.append(queue.retry_after())  # both have run for 8 s: one of two slots is free every 4 s
            queue.queued = 3
            estimates.append(queue.retry_after())
            queue.queued = 10**6
            estimates.append(queue.retry_after())
            queue.queued = 0
        estimates.append(queue.retry_after())  # nothing runs: from those that have ended
        return estimates

    assert asyncio.run(go()) == [4, 16, 600, 4]


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
    ("data", "message"),
    [
        ([], "the event: expected an object, found a list of 0"),
        ({}, "event: expected delta or .*, found null"),
        ({"event": "delta"}, "delta: expected a field 'path', found no such field"),
        ({"event": "x"}, "event: expected delta or .*, found 'x'"),
        (
            {"event": "branch_ended", "path": [], "outcome": "ok", "spam": 1},
            "branch_ended: expected no field but outcome, path, found a field 'spam'",
        ),
        (
            {"event": "branch_ended", "path": [1, 2.0], "outcome": "ok"},
            r"path\[1\]: expected a whole number, found 2.0",
        ),
        (
            {"event": "delta", "path": [True], "text": ""},
            r"delta: path\[0\]: expected a whole number, found true",
        ),
        (
            {"event": "forked", "path": [1], "branches": [["1"]]},
            r"forked: branches\[0\]: expected a list of 2, found",
        ),
    ],
)
def test_what_is_no_event_is_refused(data, message):
    with pytest.raises(apr.TraceError, match=message):
        event_from_json(data)


def chunks_of(events: list, *, chat: bool = True, dialect: str = "threadweaver", **options) -> list[dict]:
    async def source():
        for event in events:
            yield 0, event
        yield 0, apr.rebuild(events)

    async def collect() -> list[dict]:
        response = OpenAIResponseBuilder("m", chat, ResponseOptions(**options))
        request = CheckedRequest((1,), make_options(dialect))
        return [chunk async for chunk in response.chunks([request], source())]

    return asyncio.run(collect())


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("failed", ["skip", "retry"])
def test_what_is_void_can_be_taken_back(chat: bool, failed: str):
    events = events_of(scripted(branch_1=BOOM), retry=AT_ONCE, on_branch_failure=failed)
    texts: dict = defaultdict(str)
    for chunk in chunks_of(events, chat=chat, all_sequences=True):
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


def test_the_deltas_of_a_stream_are_the_message():
    events = events_of(scripted())
    trajectory = apr.rebuild(events)
    for options in ({}, {"separate_reasoning": False}):
        *pieces, last, usage = chunks_of(events, include_usage=True, **options)
        deltas = [c["choices"][0]["delta"] for c in pieces]
        whole = OpenAIResponseBuilder("m", True, ResponseOptions(**options)).completion([trajectory])
        (choice,) = whole["choices"]
        assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
        assert ("".join(d.get("reasoning_content", "") for d in deltas) or None) == choice["message"][
            "reasoning_content"
        ]
        assert all("apr" not in c and c["usage"] is None for c in pieces)
        assert last["choices"][0]["finish_reason"] == choice["finish_reason"] == "stop"
        assert last["apr"]["event"] == "done"
        assert usage["choices"] == []
        assert usage["usage"] == whole["usage"]
        assert usage["usage"]["completion_tokens"] == trajectory.metrics().total
        reasoning = usage["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert 0 < reasoning == trajectory.metrics().total - trajectory.spans[-1].tokens
