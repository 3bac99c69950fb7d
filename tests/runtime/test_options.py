"""Options and prompts are checked at the call, before anything is sent, with one checker for Python and HTTP."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import get_chat_template

import sgl_apr as apr
from sgl_apr.engine.server_url import normalize_url
from sgl_apr.runtime.option_checks import JSON_OPTION_NAMES, PYTHON_OPTION_NAMES, REFUSED_OPTIONS
from sgl_apr.runtime.options import make_options
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import OptionsParser, ReasonRequest
from tests.support.paths import ROOT


def engine(reply: str = "Done.") -> apr.ScriptedEngine:
    return apr.ScriptedEngine(lambda request, prompt: reply)


def at_the_call(call: str, **options: Any) -> None:
    """Call one of the entry points. No server is there, so whatever is sent fails with another error."""
    nobody = "http://127.0.0.1:9"
    match call:
        case "reason":
            apr.reason("answer", **options)
        case "reason with a dialect":
            apr.reason("answer", "threadweaver", **options)
        case "areason":
            asyncio.run(apr.areason(engine(), "Q: ", **options))
        case "stream":
            apr.stream(engine(), "Q: ", **options)
        case "run":
            apr.run(nobody, "Q: ", **options)
        case "run_many":
            apr.run_many(nobody, {"p": "Q: "}, "/nonexistent/out.jsonl", **options)
        case "solve":
            apr.solve("answer", "Why?", method="threadweaver", task=lambda e: None, **options)
        case "http":
            parser = OptionsParser(RequestLimits(), apr.ByteTokenizer(), 2000, 300)
            parser.parse(ReasonRequest([1], options))


CALLS = ["reason", "reason with a dialect", "areason", "stream", "run", "run_many", "solve", "http"]
WRONG = [
    ({"budgett": 3}, "no option 'budgett', did you mean 'budget'?"),
    ({"temprature": 1.0}, "no option 'temprature', did you mean 'temperature'?"),
    ({"something": 1}, "no option 'something', expected some of "),
    ({"max_new_tokens": 5}, "no option 'max_new_tokens': a budget limits the tokens"),
    ({"n": 2}, "no option 'n': a trajectory is one reply"),
    ({"stop_regex": "x"}, "no option 'stop_regex': the dialect decides where a reply stops"),
    ({"ebnf": "x"}, "no option 'ebnf': the dialect's grammar constrains decoding"),
    ({"sampling": {"regex": "x"}}, "no sampling 'regex': the dialect's grammar constrains decoding"),
    ({"sampling": {"temprature": 1}}, "no sampling 'temprature', did you mean 'temperature'?"),
    ({"sampling": 3}, "sampling=3, expected an object"),
    ({"mode": "par"}, "mode='par', expected \"auto\", \"sequential\" or \"parallel\""),
    ({"join": "KV"}, "join='KV', expected \"text\", \"kv\" or \"message\""),
    ({"on_branch_failure": "ignore"}, "on_branch_failure='ignore', expected \"skip\", \"retry\" or \"raise\""),
    ({"policy": "some"}, "policy='some', expected \"all\""),
    ({"policy": "quorum:" + "9" * 5000}, "expected \"all\""),
    ({"policy": "deadline:" + "9" * 5000}, "expected \"all\""),
    ({"temperature": -1}, "temperature=-1, expected a number from 0 to"),
    ({"temperature": "hot"}, "temperature='hot', expected a number"),
    ({"top_p": True}, "top_p=True, expected a number"),
    ({"logit_bias": {-1: 2}}, "logit_bias has the key -1, expected a token id"),
    ({"min_blocks": 1.5}, "min_blocks=1.5, expected a whole number"),
    ({"min_blocks": -1}, "0 <= min <= max"),
    ({"min_blocks": 3, "max_blocks": 2}, "0 <= min <= max"),
    ({"mode": "sequential", "min_blocks": 1}, "forbids"),
    ({"min_width": 0}, "min_width=0, expected at least 1"),
    ({"constrain": "no"}, "constrain='no', expected true or false"),
    ({"seed": "7"}, "seed='7', expected a whole number"),
    ({"priority": "high"}, "priority='high', expected a whole number"),
    ({"budget": {"widht": 2}}, "no budget 'widht', did you mean 'width'?"),
    ({"budget": {"width": "4"}}, "budget width='4', expected a whole number"),
    ({"retry": {"attempts": 0}}, "attempts >= 1"),
    ({"retry": {"wait": "long"}}, "retry wait='long', expected a number"),
    ({"pacing": {"max_parallel": 0}}, "max_parallel >= 1"),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_a_wrong_option_is_refused_at_the_call(call: str, options: dict, message: str):
    with pytest.raises(apr.AprError) as raised:
        at_the_call(call, **options)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 600


WRONG_IN_PYTHON = [
    ({"budget": 3}, "budget=3, expected an object with fields of Budget, or a Budget"),
    ({"request_fields": {"rid": "x"}}, "no request_fields 'rid'"),
    ({"policy": lambda: True}, "policy is a function of (), expected a function of the branches that have ended"),
    ({"pacing": lambda demand: 2}, "pacing is a function of (demand), expected a function of a Demand and a Load"),
    ({"branch_prompt_template": "str"}, "branch_prompt_template='str', expected a function of the message"),
    ({"on_event": "print"}, "on_event='print', expected a function of an event"),
    ({"on_event": lambda: None}, "on_event is a function of (), expected a function of an event"),
]  # fmt: skip


@pytest.mark.parametrize("call", ["reason", "areason", "run", "solve"])
@pytest.mark.parametrize(
    ("options", "message"), WRONG_IN_PYTHON, ids=[str(w[1])[:40] for w in WRONG_IN_PYTHON]
)
def test_a_wrong_object_or_function_is_refused_at_the_call(call: str, options: dict, message: str):
    with pytest.raises(apr.AprError) as raised:
        at_the_call(call, **options)
    assert message in str(raised.value)


def test_a_coroutine_function_is_no_policy_and_no_listener():
    async def policy(ended: object) -> bool:
        return True

    for name in ("policy", "on_event", "branch_prompt_template"):
        with pytest.raises(apr.AprError, match=f"{name}=.* is a coroutine function, expected a function of"):
            apr.reason("answer", **{name: policy})


def test_python_and_http_know_the_same_options():
    """What HTTP has not is a function, or is spread over its own names there."""
    assert set(apr.ReasonArguments.__annotations__) == {*JSON_OPTION_NAMES, *PYTHON_OPTION_NAMES}
    assert not set(REFUSED_OPTIONS) & set(apr.ReasonArguments.__annotations__)


def test_all_forms_of_an_object_are_taken():
    made = make_options(
        "threadweaver", budget={"width": 2}, pacing={"max_parallel": 2}, retry={"attempts": 1}, top_p=0.5,
        sampling={"temperature": 0}, logit_bias={65: 1}, request_fields={"cache_salt": "s"}, priority=3, join=None,
    )  # fmt: skip
    assert (made.budget, made.pacing, made.retry) == (
        apr.Budget(width=2),
        apr.Pacing(max_parallel=2),
        apr.Retry(1),
    )
    assert made.sampling == {"temperature": 0.0, "top_p": 0.5, "logit_bias": {"65": 1.0}}
    assert made.request_fields == {"cache_salt": "s", "priority": 3}
    assert make_options("threadweaver", pacing=None).pacing is None
    assert make_options("threadweaver", budget=None, mode=None, retry=None) == make_options("threadweaver")
    text = make_options("threadweaver", budget="tokens=50,width=3")
    assert text == make_options("threadweaver", budget=apr.Budget(tokens=50, width=3))
    with pytest.raises(apr.BudgetExceeded, match="budget 'widht=3', expected name=number with one of tokens"):
        make_options("threadweaver", budget="widht=3")
    t = asyncio.run(apr.areason(engine("x" * 50), "Q: ", budget={"tokens": 5}))
    assert t.metrics().total <= 5


VALUES = ["4", None, True, math.nan, math.inf, 2.5, [1], 10**5000]
FIELDS = [f"{k.__name__}.{f}" for k in (apr.Budget, apr.Pacing, apr.Retry) for f in k.__dataclass_fields__]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_wrong_type_is_named(field: str):
    kind, _, name = field.partition(".")
    made = getattr(apr, kind)
    default = getattr(made(), name)
    for value in VALUES:
        if (value is None and default is None) or (value == 2.5 and isinstance(default, float)):
            continue
        if value == 2.5 and name == "seconds":
            continue
        with pytest.raises(apr.BudgetExceeded if made is apr.Budget else apr.AprError) as raised:
            made(**{name: value})
        assert f"{kind.lower()} {name}=" in str(raised.value)
        assert "expected a" in str(raised.value)


def paced(pacing: Any) -> apr.Trajectory:
    """The trajectory of an engine that forks into two branches."""
    fork = "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
    tags = apr.ByteTokenizer(apr.dialect("threadweaver").tags)
    scripted = apr.ScriptedEngine(
        lambda request, prompt: (
            "x" if prompt.endswith((":", "</Thread>\n")) and "<Thread>" in prompt else fork
        ),
        tags,
    )
    try:
        return asyncio.run(apr.areason(scripted, "Q: ", "threadweaver", pacing=pacing))
    finally:
        assert not scripted.active
        assert scripted.released == sum(scripted.forks) == 2


@pytest.mark.parametrize(
    "answer",
    [3, 2.5, (True,), (2, 3), "2", None, (2.5, "why"), (True, "why"), (0, "why"), (-1, "why"), [2, "why"]],
)
def test_a_pacing_function_that_returns_something_else(answer: Any):
    with pytest.raises(
        apr.AprError, match=r"the pacing function returned .*, expected how many .* from 1, and why"
    ):
        paced(lambda demand, load: answer)


def test_a_pacing_function_that_raises():
    with pytest.raises(
        apr.AprError, match=r"the pacing function raised ZeroDivisionError.*, expected how"
    ) as raised:
        paced(lambda demand, load: 1 // 0)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)

    def refuse(demand: apr.Demand, load: apr.Load) -> tuple[int, str]:
        raise apr.BudgetExceeded("no more today")

    with pytest.raises(apr.BudgetExceeded, match="no more today"):
        paced(refuse)


def test_a_pacing_function_may_return_more_than_there_are():
    (decision,) = paced(lambda demand, load: (demand.branches + 7, "all")).decisions
    assert (decision.branches, decision.parallelism, decision.reason) == (2, 2, "all")


def test_a_template_that_returns_something_else():
    with pytest.raises(apr.AprError, match="branch_prompt_template returned 3, expected text"):
        asyncio.run(apr.areason(engine(), "Q: ", "spawn", branch_prompt_template=lambda message: 3))


# Prompts

BAD_PROMPTS = [
    ("", "has no tokens"),
    ([], "the prompt is empty"),
    (None, "the prompt is None, expected text, a list of token ids, or chat messages"),
    (5, "the prompt is 5, expected"),
    (b"text", "expected text, a list"),
    ({"role": "user", "content": "x"}, "expected text, a list of token ids, or chat messages"),
    ([10**9], "the token id 1000000000, which is outside of the vocabulary: 0 to 256"),
    ([-1], "the token id -1"),
    ([1.5], "expected text, a list"),
    ([True], "expected text, a list"),
    (["a", "b"], "expected text, a list"),
    ([{"content": "x"}], "message 1 has the role None, expected text"),
    ([{"role": "user", "content": 3}], "message 1 has the content 3, expected text"),
    ([{"role": "user", "content": "x"}, "y"], "message 2 is 'y', expected an object"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "a trajectory has no images, video or audio"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=[str(p[0])[:30] for p in BAD_PROMPTS])
def test_a_prompt_that_cannot_be_is_refused_before_anything_is_sent(prompt: Any, message: str):
    scripted = engine()
    with pytest.raises(apr.AprError) as raised:
        asyncio.run(apr.areason(scripted, prompt))
    assert message in str(raised.value)
    assert not scripted.requests


class ChatTokenizer(apr.ByteTokenizer):
    """A tokenizer with a chat template, as those of transformers have."""

    def apply_chat_template(self, messages: list, *, add_generation_prompt: bool, tokenize: bool) -> str:
        assert (add_generation_prompt, tokenize) == (True, False)
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def test_chat_messages_are_rendered_by_the_template():
    scripted = apr.ScriptedEngine(lambda request, prompt: "So.", ChatTokenizer())
    expected = "<system>Be brief.<user>Why?<assistant>"
    assert asyncio.run(apr.areason(scripted, CHAT)).spans[0].text == expected

    async def streamed() -> apr.Trajectory:
        return apr.rebuild([event async for event in apr.stream(scripted, CHAT)])

    assert asyncio.run(streamed()).spans[0].text == expected
    with pytest.raises(
        apr.UnsupportedEngine, match="ScriptedEngine has no chat template, expected a prompt that is text"
    ):
        asyncio.run(apr.areason(engine(), CHAT))


def test_numbers_of_numpy_are_token_ids():
    numpy = pytest.importorskip("numpy")
    t = asyncio.run(apr.areason(engine(), numpy.array([81, 58])))
    assert t.spans[0].token_ids == (81, 58)


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:30000", None, 3, object()])
def test_something_else_than_an_engine(wrong: Any):
    message = "apr.run takes a URL" if isinstance(wrong, str) else "expected an apr.HttpEngine"
    with pytest.raises(apr.AprError, match=message):
        asyncio.run(apr.areason(wrong, "Q: "))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:30000", "http://localhost:30000"), ("http://a/", "http://a"), ("https://a:1/b/", "https://a:1/b"),
        ("127.0.0.1:30000", "http://127.0.0.1:30000"), ("[::1]:30000", "http://[::1]:30000"),
    ],
)  # fmt: skip
def test_a_url_may_lack_its_scheme(url: str, expected: str):
    assert normalize_url(url) == expected


@pytest.mark.parametrize(
    "url", ["", " ", "ftp://a", "http://", "localhost:port", "http://a b", None, 30000, "http://a:0"]
)
def test_no_url(url: Any):
    with pytest.raises(apr.AprError, match=r"expected one such as http://127\.0\.0\.1:30000"):
        apr.run(url, "Q: ")


# Programs


@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(30)
def test_another_backend_says_what_to_use(stream: bool):
    class Backend(BaseBackend):
        def get_chat_template(self) -> Any:
            return get_chat_template("default")

    @sgl.function
    def program(s: Any) -> None:
        s += "Q: " + apr.reason("answer")

    @sgl.function
    def solving(s: Any) -> None:
        s += apr.solve("answer", "Why?", method="sequential", task=lambda e: None)

    for run, name in ((program, "reason"), (solving, "solve")):
        state = run.run(backend=Backend(), stream=stream)
        message = rf"apr\.{name}\('answer'\), which needs the backend apr\.Endpoint: found Backend, expected backend="
        if stream:
            with pytest.raises(apr.UnsupportedEngine, match=message):
                list(state.text_iter())
        with pytest.raises(apr.UnsupportedEngine, match=message):
            _ = state["answer"]
        with pytest.raises(apr.UnsupportedEngine, match=message):
            state.get_meta_info("answer")
        assert isinstance(state.error(), apr.UnsupportedEngine)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_variable_needs_a_name(name: Any):
    with pytest.raises(apr.AprError, match="the name of the variable"):
        apr.reason(name)


# Type checkers

TYPED = """
import sgl_apr as apr

async def right(engine: apr.Engine, **options: "Unpack[apr.ReasonArguments]") -> str:
    await apr.areason(engine, [{"role": "user", "content": "x"}], budget={"width": 2}, retry={"attempts": 1})
    apr.run("localhost:30000", "x", temperature=0.5, policy=lambda ended: len(ended) > 1, pacing=None)
    async for event in apr.stream(engine, [1, 2], mode="parallel"):
        pass
    apr.reason("answer", join="kv", budget=apr.Budget(width=3))
    return (await apr.areason(engine, "x", **options)).answer

async def wrong(engine: apr.Engine) -> None:
    await apr.areason(engine, "x", budgett=3)
    apr.run("localhost:30000", "x", mode="par")
    apr.stream(engine, "x", join="KV")
    apr.reason("answer", temprature=1.0)
    apr.reason("answer", budget={"widht": 2})
    apr.run("localhost:30000", "x", temperature="hot")
"""


@pytest.mark.slow  # half a minute without mypy's cache
def test_a_type_checker_refuses_wrong_options(tmp_path: Path):
    source = tmp_path / "typed.py"
    source.write_text("from typing import Unpack\n" + TYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"), str(source)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    wrong = TYPED[: TYPED.index("async def wrong")].count("\n") + 2
    lines = [int(line.split(":")[1]) for line in done.stdout.splitlines() if "error:" in line]
    assert lines == [wrong + k for k in range(1, 7)], done.stdout
