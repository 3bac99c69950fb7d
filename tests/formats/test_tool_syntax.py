"""Calls of tools in a text: every form that SGLang's detectors read, cuts, and text that only looks like a call."""

from __future__ import annotations

import builtins
import json
import re
import time

import jsonschema
import pytest

import sgl_apr as apr
from sgl_apr.formats import call_formats
from sgl_apr.formats.call_formats import INDEX, NAME, supported_parsers
from sgl_apr.formats.masks.lower import lower_free_text
from sgl_apr.formats.tool_syntax import DecodedCall, ToolDefinition, tool_syntax
from tests.support.tool_sampler import TOOLS, MaskSampler, detected, syntax

JSON_PARSERS = [
    p for p in supported_parsers() if p not in ("deepseekv32", "nanbeige", "qwen3_coder", "step3p5")
]
ARGUMENTS = r'{"query": "x\u00e4 \" y", "b": [true, -1.5, null, {}], "c": "</tool"}'
CODER = (
    "<tool_call>\n<function=search>\n<parameter=query>\nx < y\n\nz\n</parameter>\n<parameter=limit>\n7\n"
    "</parameter>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>"
)
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="query" string="true"> a b '
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="limit" string="false">7</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)


def written(parser: str, calls: int, arguments: str = ARGUMENTS, name: str = "search") -> str:
    """Some calls as a model writes them."""
    form = syntax(parser).form
    pieces = [
        form.begin.replace(NAME, name).replace(INDEX, str(k)) + arguments + form.end for k in range(calls)
    ]
    return form.section_begin + form.separator.join(pieces) + form.section_end


def test_every_form_is_that_of_its_detector():
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    for parser in supported_parsers():
        assert FunctionCallParser.ToolCallParserEnum[parser] is type(call_formats.call_detector(parser))


@pytest.mark.parametrize("parser", JSON_PARSERS)
def test_detectors_read_the_same_calls(parser: str):
    for count in (1, 2) if syntax(parser).allows_parallel else (1,):
        text = "Let me see.\n" + written(parser, count)
        parsed = syntax(parser).parse(text)
        assert [(c.name, c.arguments) for c in parsed.calls] == [("search", ARGUMENTS)] * count
        assert (parsed.start, parsed.complete) == (12, True)
        assert detected(parser, text) == [("search", json.loads(ARGUMENTS))] * count
        ends = [c.end for c in parsed.calls]
        assert [c.start for c in parsed.calls] == sorted(c.start for c in parsed.calls)
        assert all(c.start < c.end <= len(text) for c in parsed.calls)
        assert ends == sorted(ends)


@pytest.mark.parametrize(("parser", "text"), [("qwen3_coder", CODER), ("deepseekv32", DSML)])
def test_tagged_parameters_are_read_as_their_types(parser: str, text: str):
    (call,) = syntax(parser).parse("Hm. " + text).calls
    expected = (
        {"query": "x < y\n\nz", "limit": 7, "exact": True}
        if parser == "qwen3_coder"
        else {"query": "a b", "limit": 7}
    )
    assert json.loads(call.arguments) == expected
    assert detected(parser, text) == [("search", expected)]


@pytest.mark.parametrize("parser", [*JSON_PARSERS, "qwen3_coder", "deepseekv32"])
def test_a_cut_anywhere_inside_is_a_cut(parser: str):
    complete = {"qwen3_coder": CODER + "\n" + CODER, "deepseekv32": DSML}.get(parser) or written(
        parser, 1 + syntax(parser).allows_parallel
    )
    at = syntax(parser)
    for end in range(len(at.trigger), len(complete)):
        parsed = at.parse("hi " + complete[:end])
        assert parsed.start == 3
        # A first call that is complete, with nothing or a part of the separator after it, is complete.
        assert not parsed.complete or (len(parsed.calls) == 1 and not at.form.section_end), complete[:end]
    assert at.parse("hi " + complete).complete


@pytest.mark.parametrize("parser", supported_parsers())
def test_sampled_calls_of_every_form(parser: str):
    """What the mask allows is read by SGLang's detector as the same calls, which fit their schemas."""
    form = syntax(parser).form
    tokens = re.findall(
        r"<[｜|][^<>]*>|\[TOOL_CALLS\]", form.section_begin + form.begin + form.end + form.section_end
    )
    at = MaskSampler(tuple(dict.fromkeys(tokens)), "llguidance", seed=3)
    grammar = lower_free_text(at.masked, tool_syntax=syntax(parser), max_calls=3, call="required")
    validators = {tool.name: jsonschema.Draft202012Validator(tool.schema) for tool in TOOLS}
    complete = 0
    for _ in range(6):
        ids, ended = at.sample(grammar, syntax(parser).trigger, max_tokens=500)
        text = at.masked.decode(ids)
        parsed = syntax(parser).parse(text)
        assert parsed.complete is ended
        if ended:
            calls = [(c.name, json.loads(c.arguments)) for c in parsed.calls]
            for name, arguments in calls:
                validators[name].validate(arguments)
            assert calls == detected(parser, text)
            complete += 1
    assert complete >= 2


def test_other_white_space_than_the_mask_writes():
    """A model without a mask writes `"name": "f"`, and SGLang's detector reads it."""
    text = '<tool_call>\n{"name": "search",\n "arguments" : {"query": "x"} }\n</tool_call>\n'
    parsed = syntax("qwen25").parse(text)
    assert parsed.calls == (DecodedCall("search", '{"query": "x"}', 0, len(text) - 1),)
    assert parsed.complete


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "I write <tool_call> to call a tool.",
        '<tool_call>\n{"name":"search", "arguments":[1]}\n</tool_call>',
        '<tool_call>\n{"name":"search", "arguments":{"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name":"search", "arguments":{"a" 1}}\n</tool_call>',
        '<tool_call>\n{"name":"search", "arguments":' + '{"a":' * 100_000 + "\n</tool_call>",
        '<tool_call>\n{"name":"now", "arguments":{}}\n</tool_call> and then more text',
        "",
    ],
)
def test_what_is_no_call_is_text(text: str):
    parsed = syntax("qwen25").parse(text)
    assert (parsed.calls, parsed.start, parsed.complete) == ((), len(text), True)


def test_the_last_calls_count():
    call = '<tool_call>\n{"name":"now", "arguments":{}}\n</tool_call>'
    text = call + " so " + call
    parsed = syntax("qwen25").parse(text)
    assert [c.start for c in parsed.calls] == [len(call) + 4]
    assert parsed.start == len(call) + 4


@pytest.mark.parametrize(
    ("parser", "piece"),
    [
        ("qwen25", "<tool_call>"),
        ("qwen25", '<tool_call>\n{"name":"now", "arguments":{"a": ['),
        ("qwen25", '<tool_call>\n{"name":"now", "arguments":{"a": "'),
        ("qwen25", '<tool_call>\n{"name":"now", "arguments":{}}\n</tool_call> '),
        ("qwen25", '<tool_call>\n{"name":"now", "arguments":{}}\n</tool_call>x'),
        ("qwen25", "<tool_call>" + " " * 50),
        ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=a>\n"),
        ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=a>\n</parameter>"),
        ("deepseekv31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "'),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"),
    ],
)
def test_parsing_takes_linear_time(parser: str, piece: str):
    """The text of a model is a stranger's: 4 times as much of it takes about 4 times as long, not 16."""

    def seconds(text: str) -> float:
        start = time.process_time()
        syntax(parser).parse(text)
        return time.process_time() - start

    few, many = piece * 1000, piece * 4000
    assert seconds(many) < 10 * max(min(seconds(few) for _ in range(3)), 0.001)


def test_unknown_parsers_and_missing_packages(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        apr.UnsupportedEngine, match="'gemma4' are not supported, expected one of deepseekv3, "
    ):
        tool_syntax("gemma4", TOOLS)
    original = builtins.__import__
    call_formats.call_detector.cache_clear()
    monkeypatch.setattr(call_formats, "import_module", lambda name: original("no_such_package"))
    with pytest.raises(apr.UnsupportedEngine, match=r"tools need SGLang.*pip install sglang"):
        call_formats.call_detector("qwen25")


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ((), "0 tools, expected 1 to"),
        ((ToolDefinition("a b"),), "the tool 'a b': expected a name"),
        ((ToolDefinition("a"), ToolDefinition("a")), "two tools have the name 'a'"),
        ((ToolDefinition("a", "", "{"),), "tool 'a': its parameters are not JSON"),
        ((ToolDefinition("a", "", '{"type":"array"}'),), "tool 'a': its parameters are not the JSON schema"),
        (
            (ToolDefinition("a", "", '{"title":"' + "x" * 20_000 + '"}'),),
            "tool 'a': its schema has 200.. characters",
        ),
    ],
)
def test_definitions_that_cannot_be_used(tools: tuple[ToolDefinition, ...], message: str):
    with pytest.raises(apr.AprError, match=message):
        tool_syntax("qwen25", tools)


def test_a_definition_is_that_of_openai():
    tool = ToolDefinition.from_schema("f", "Does it.", {"type": "object", "properties": {"ä": {}}})
    assert tool.parameters == '{"type":"object","properties":{"ä":{}}}'
    assert tool.as_openai() == {
        "type": "function",
        "function": {"name": "f", "description": "Does it.", "parameters": tool.schema},
    }
    assert hash(tool_syntax("qwen25", [tool])) == hash(tool_syntax("qwen25", [tool]))
    with pytest.raises(apr.AprError, match="the parameters of tool 'f' are not JSON"):
        ToolDefinition.from_schema("f", "", {"a": object()})
