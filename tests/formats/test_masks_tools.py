"""Masks with calls of tools, sampled at random in both grammar backends: every call parses and fits its schema."""

from __future__ import annotations

import json
from functools import cache

import jsonschema
import pytest

import sgl_apr as apr
from sgl_apr.formats.masks.lower import lower_free_text
from sgl_apr.formats.masks.tool_checks import check_answer_schema, check_tools
from sgl_apr.formats.options import BranchNumbering
from sgl_apr.formats.resumption import resumption_prefixes
from sgl_apr.formats.tool_syntax import ToolDefinition
from sgl_apr.runtime.phase_output import parse_phase_output
from tests.support.tool_sampler import SEARCH, TOOLS, MaskSampler, detected, syntax

BACKENDS = ("llguidance", "xgrammar")
PARSERS = ("qwen25", "qwen3_coder")  # a JSON syntax and a tagged one
PHASES = [
    (name, phase, resumed)
    for name in ("threadweaver", "multiverse", "spawn")
    for phase in ("trunk", "after", "branch", "rejoin")
    for resumed in (False, True)
    if phase != "rejoin" or name != "threadweaver"
]
NOW = '<tool_call>\n{"name":"now", "arguments":{}}\n</tool_call>'
both = pytest.mark.parametrize("backend", BACKENDS)
VALIDATORS = {tool.name: jsonschema.Draft202012Validator(tool.schema) for tool in TOOLS}


@cache
def sampler(backend: str, name: str = "threadweaver", tokens: tuple[str, ...] = ()) -> MaskSampler:
    return MaskSampler((*apr.dialect(name).tags, *tokens), backend)


def accepts(backend: str, phase: str, text: str, parser: str = "qwen25", **options) -> bool:
    given = {"tool_syntax": syntax(parser), "max_calls": 2, **options}
    at = sampler(backend)
    return at.accepts(apr.dialect("threadweaver").lower(phase, at.masked, backend, **given), text)


def check_samples(
    backend: str, parser: str, name: str, phase: str, resumed: bool, size: int, max_tokens: int = 3000
) -> int:
    """Sample texts that begin a call and texts that may, and return the number of calls."""
    dialect, at = apr.dialect(name), sampler(backend, name)
    number = BranchNumbering("1." if name == "multiverse" and phase in ("branch", "rejoin") else "", "1")
    options = {"tool_syntax": syntax(parser), "max_calls": 3, "resumed": resumed, "prefix": number.prefix}
    before = "" if resumed else resumption_prefixes(dialect.grammar, dialect.rule_for_phase(phase))[0]
    calls = 0
    for call in ("auto", "required"):
        grammar = dialect.lower(phase, at.masked, backend, call=call, number="1", **options)
        for k in range(size):
            begun = before + "ab" * (k % 2) + syntax(parser).trigger if call == "required" else ""
            ids, ended = at.sample(grammar, begun, max_tokens=max_tokens)
            text = at.masked.decode(ids)
            output = parse_phase_output(
                dialect, phase, number, (), (*ids, at.eos) if ended else tuple(ids),
                None if ended else "length", at.masked, tool_syntax=syntax(parser), resumed=resumed,
            )  # fmt: skip
            assert output.finish != "malformed", text
            assert "".join(p.text for p in output.pieces if p.origin == "decoded") == text
            assert output.cut_call <= (not ended)
            if not ended:
                assert output.cut_call is (call == "required")
                continue
            assert bool(output.calls) is (call == "required"), text
            for c in output.calls:
                VALIDATORS[c.name].validate(json.loads(c.arguments))
            assert detected(parser, text) == [(c.name, json.loads(c.arguments)) for c in output.calls]
            calls += len(output.calls)
    return calls


@both
@pytest.mark.parametrize("parser", PARSERS)
def test_sampled_calls_fit(backend: str, parser: str):
    """A few of each kind; every phase is sampled by the slow test."""
    cases = [("threadweaver", "branch", False), ("multiverse", "rejoin", True), ("spawn", "after", False)]
    assert sum(check_samples(backend, parser, *case, size=3, max_tokens=600) for case in cases) >= 5


@pytest.mark.slow
@both
@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(("name", "phase", "resumed"), PHASES)
def test_every_sampled_call_fits(backend: str, parser: str, name: str, phase: str, resumed: bool):
    assert check_samples(backend, parser, name, phase, resumed, size=25, max_tokens=1500) >= 8


@both
def test_where_a_call_can_stand(backend: str):
    conclusion = "<Conclusion>c</Conclusion>\n</Parallel>"
    assert accepts(backend, "trunk", NOW)
    assert accepts(backend, "trunk", "Let me see. " + NOW)
    assert accepts(backend, "trunk", NOW + "\n" + NOW)
    assert not accepts(backend, "trunk", "\n".join([NOW] * 3))
    assert not accepts(backend, "trunk", NOW + "\n" + NOW, max_calls=1)
    assert not accepts(backend, "trunk", NOW + " and")
    assert not accepts(backend, "trunk", NOW, max_calls=0)
    assert accepts(backend, "trunk", "an answer", max_calls=0)
    assert accepts(backend, "after", conclusion + NOW)
    assert not accepts(backend, "after", NOW)
    assert not accepts(backend, "after", "<Conclusion>" + NOW)
    assert accepts(backend, "branch", " a" + NOW)
    assert not accepts(backend, "branch", NOW + "</Thread>")
    assert not accepts(backend, "trunk", "<Parallel>\n<Outlines>\n<Outline>1: " + NOW)


@both
def test_a_phase_resumes_in_its_free_text(backend: str):
    assert accepts(backend, "after", "an answer", resumed=True)
    assert accepts(backend, "after", "more " + NOW, resumed=True)
    assert not accepts(backend, "after", "</Parallel>an answer", resumed=True)
    assert accepts(backend, "branch", " done</Thread>", resumed=True)
    assert accepts(backend, "branch", NOW, resumed=True)


@both
@pytest.mark.parametrize("name", apr.dialect_names())
def test_every_phase_of_every_dialect_resumes(backend: str, name: str):
    dialect, at = apr.dialect(name), sampler(backend, name)
    for phase in ("trunk", "after", "branch", "rejoin"):
        if dialect.rule_for_phase(phase) not in dialect.grammar.rules:
            continue
        waiting = ("1",) if dialect.asynchronous and phase in ("trunk", "after") else ()
        number = BranchNumbering("", "2", waiting)
        grammar = dialect.lower(
            phase, at.masked, backend, resumed=True, tool_syntax=syntax("qwen25"), max_calls=1,
            number="2", waiting=waiting,
        )  # fmt: skip
        assert at.accepts(grammar, "text" + NOW)
        closing = dialect.complete_phase(phase, "text", number, resumed=True)
        segments = dialect.match_phase(phase, "text" + closing, number, resumed=True)
        assert segments[0].role in ("text", "body")
        assert segments[0].start == 0
        assert segments[-1].end == len("text" + closing)


@both
def test_a_call_can_be_required(backend: str):
    assert accepts(backend, "branch", " a" + NOW, call="required")
    assert not accepts(backend, "branch", " a</Thread>", call="required")
    assert not accepts(backend, "trunk", "an answer", call="required")


@both
def test_text_and_arguments_hold_no_tags(backend: str):
    def call(query: str) -> str:
        return f'<tool_call>\n{{"name":"search", "arguments":{{"query": "{query}"}}}}\n</tool_call>'

    for query in ("a < b", "x<y", "<", "<b>", "List<int>", "Ünïcode ☃", r"\"quoted\"", r"a\nb", ""):
        assert accepts(backend, "branch", call(query)), query
    for query in ("</Thread>", "<tool_call", "<|im_end|>", "</thread", 'a"b', "a\nb", r"\q"):
        assert not accepts(backend, "branch", call(query)), query
    for text in ("<tool_call>", "<tool_call", "</tool_call>", "<|im_start|>"):
        assert not accepts(backend, "trunk", "a " + text), text
    assert accepts(backend, "trunk", "a tool_call <tool")


@both
def test_a_name_that_begins_another(backend: str):
    for name in ("search", "search_more"):
        arguments = '{"query": "x", "kind": "web"}'
        assert accepts(
            backend, "trunk", f'<tool_call>\n{{"name":"{name}", "arguments":{arguments}}}\n</tool_call>'
        )
    assert not accepts(backend, "trunk", '<tool_call>\n{"name":"search_", "arguments":{}}\n</tool_call>')


@both
@pytest.mark.parametrize("tokens", [("<tool_call>", "</tool_call>"), ()], ids=["tokens", "spelled"])
def test_a_json_answer(backend: str, tokens: tuple[str, ...]):
    at = sampler(backend, "threadweaver", tokens)
    fork = "<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Outlines>"
    schema = json.dumps(SEARCH)
    options = {"answer_schema": schema, "tool_syntax": syntax("qwen25"), "max_calls": 1}
    grammar = apr.dialect("threadweaver").lower("trunk", at.masked, backend, **options)
    assert at.accepts(grammar, '{"query": "a < b", "exact": true}')
    assert at.accepts(grammar, "Let me see. " + fork)
    assert at.accepts(grammar, "Let me see. " + NOW)
    assert not at.accepts(grammar, "plain text")
    assert not at.accepts(grammar, '{"query": 1}')
    grammar = apr.dialect("threadweaver").lower(
        "after", at.masked, backend, answer_schema='{"type":"object"}'
    )
    assert at.accepts(grammar, '</Parallel>{"any": ["thing", 1.5, {"x": null}]}')
    assert not at.accepts(grammar, '</Parallel>{"any": "</Thread>"}')
    assert not at.accepts(grammar, "</Parallel>text")


@both
def test_text_without_a_dialect(backend: str):
    at = sampler(backend)
    grammar = lower_free_text(at.masked, backend, tool_syntax=syntax("qwen25"), max_calls=1)
    assert at.accepts(grammar, "text")
    assert at.accepts(grammar, "text" + NOW)
    assert not at.accepts(grammar, "<tool_call>")
    grammar = lower_free_text(at.masked, backend, tool_syntax=syntax("qwen25"), max_calls=1, call="required")
    assert at.accepts(grammar, NOW)
    assert not at.accepts(grammar, "text")
    grammar = lower_free_text(at.masked, backend, answer_schema='{"type":"array","items":{"type":"integer"}}')
    assert at.accepts(grammar, "[1, 2]")
    assert not at.accepts(grammar, "text")


@both
@pytest.mark.parametrize(
    ("limits", "accepted"),
    [
        ({"maxLength": 3}, ["", "a", "abc", " a "]),
        ({"minLength": 4, "maxLength": 4}, ["abca", "null"]),
        ({"minLength": 2}, ["abc", "abca", "null", " a "]),
        ({"pattern": "^[a-c]+$"}, ["a", "abc", "abca"]),
        ({"enum": ["a", "abca", "null"]}, ["a", "abca"]),
        ({}, ["", "a", "abc", "abca", "null", " a ", "<", "a<b"]),
    ],
)
def test_limits_of_plain_text(backend: str, limits: dict[str, object], accepted: list[str]):
    """A tagged parameter is plain text."""
    schema = {"type": "object", "properties": {"s": {"type": "string", **limits}}, "required": ["s"]}
    tools, at = (ToolDefinition.from_schema("f", "", schema),), sampler(backend)
    texts = ["", "a", "abc", "abca", "null", " a ", "</function>", *["<", "a<b"] * (not limits)]
    call = "<tool_call>\n<function=f>\n<parameter=s>\n{}\n</parameter>\n</function>\n</tool_call>"
    grammar = lower_free_text(at.masked, backend, tool_syntax=syntax("qwen3_coder", tools), max_calls=1)
    assert [text for text in texts if at.accepts(grammar, call.format(text))] == accepted
    for text in accepted:
        (parsed,) = syntax("qwen3_coder", tools).parse(call.format(text)).calls
        assert json.loads(parsed.arguments) == {"s": text}


@both
def test_limits_of_text_whose_ends_are_trimmed(backend: str):
    """DeepSeek's parser removes white space, which must not make a text too short."""
    schema = {"type": "object", "properties": {"s": {"type": "string", "minLength": 2}}, "required": ["s"]}
    tools, at = (ToolDefinition.from_schema("f", "", schema),), sampler(backend)
    grammar = lower_free_text(at.masked, backend, tool_syntax=syntax("deepseekv32", tools), max_calls=1)
    call = (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="s" string="true">{}'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    )
    texts = ["", "a", "ab", "a b", " a", "a\n", "  ", "ab\u3000"]
    assert [text for text in texts if at.accepts(grammar, call.format(text))] == ["ab", "a b"]


@pytest.mark.parametrize(
    ("backend", "parser", "schema", "message"),
    [
        ("llguidance", "qwen25", {"a": {"type": "array", "uniqueItems": True}}, "tool 'f'.a.*'uniqueItems'"),
        ("xgrammar", "qwen25", {"a": {"b": {"not": {}}}}, "tool 'f'.a.*'b'"),
        ("llguidance", "qwen25", {"a": {"enum": ["</Thread>"]}}, "tool 'f'.a.*holds a tag"),
        ("xgrammar", "qwen25", {"<tool_call>": {}}, "tool 'f'.*holds a tag"),
        ("xgrammar", "qwen25", {"a": {"type": "string", "pattern": "^.*$"}}, "tool 'f'.a.*keep tags out"),
        ("xgrammar", "qwen25", {"a": {"allOf": [{"minLength": 1}, {"maxLength": 2}]}}, "tool 'f'.a.*'allOf'"),
        ("xgrammar", "qwen25", {"a": {"type": "integer", "multipleOf": 3}}, "tool 'f'.a.*'multipleOf'"),
        (
            "xgrammar",
            "qwen25",
            {"a": {"type": "string", "pattern": "^[ab]+$", "maxLength": 3}},
            "tool 'f'.a.*'pattern' together with 'maxLength'",
        ),
        ("llguidance", "qwen3_coder", {"a": {"const": {"x": 1}}}, "tool 'f'.a.*as plain text"),
        ("llguidance", "qwen3_coder", {"a>": {"type": "string"}}, "tool 'f'.a>.*between tags"),
        ("llguidance", "qwen3_coder", {"a": {"type": "string", "format": "date"}}, "tool 'f'.a: 'format'"),
    ],
)
def test_schemas_that_cannot_be_enforced(backend: str, parser: str, schema: dict[str, object], message: str):
    tool = ToolDefinition.from_schema("f", "", {"type": "object", "properties": schema})
    options = {"tool_syntax": syntax(parser, (tool,)), "max_calls": 1}
    with pytest.raises(apr.GrammarError, match=message):
        apr.dialect("threadweaver").lower("branch", sampler(backend).masked, backend, **options)


@both
@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            {"oneOf": [{"type": "object"}, {"properties": {"x": {}}}]},
            "tool 'f'.a.oneOf: its alternatives can hold",
        ),
        ({"type": "string", "pattern": "^(?=a)b$"}, "tool 'f'.a: the pattern .* looks around"),
        ({"$ref": "#/$defs/none"}, "tool 'f': .*schema: "),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "tool 'f': .*schema: "),
        ({"type": "array", "contains": {}}, "tool 'f'.a: .* cannot enforce 'contains'"),
        ({"type": "object", "properties": {"x": {}}, "required": ["y"]}, "tool 'f'.a: requires 'y'"),
        ({"type": "integer", "enum": ["x"]}, "tool 'f'.a: none of its values has the type"),
        ({"type": "text"}, "tool 'f'.a: type \"text\", expected some of"),
    ],
)
def test_tools_are_checked_before_anything_is_decoded(
    backend: str, parameter: dict[str, object], message: str
):
    schema = {"type": "object", "properties": {"a": parameter}, "required": ["a"]}
    tools = syntax("qwen25", (TOOLS[0], ToolDefinition.from_schema("f", "", schema)))
    with pytest.raises(apr.GrammarError, match=message):
        check_tools(tools, sampler(backend).masked, backend)
    with pytest.raises(apr.GrammarError, match=message.replace("tool 'f'", "the answer's schema")):
        check_answer_schema(json.dumps(schema), sampler(backend).masked, backend)
    check_tools(syntax("qwen25"), sampler(backend).masked, backend)


@both
def test_alternatives_that_exclude_one_another(backend: str):
    """What pydantic writes for a union with a discriminator."""
    kinds = [
        {
            "type": "object",
            "properties": {"kind": {"const": k}, "n": {"type": "integer"}},
            "required": ["kind"],
        }
        for k in "ab"
    ]
    schema = {
        "$defs": {"A": kinds[0], "B": kinds[1]},
        "type": "object",
        "properties": {"a": {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "discriminator": {}}},
        "required": ["a"],
    }
    at = sampler(backend)
    grammar = lower_free_text(at.masked, backend, answer_schema=json.dumps(schema))
    assert at.accepts(grammar, '{"a": {"kind": "b", "n": 1}}')
    assert not at.accepts(grammar, '{"a": {"kind": "c"}}')
