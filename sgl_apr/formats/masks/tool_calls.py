"""Adds calls of tools and JSON answers to the alternatives of a phase."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sgl_apr.errors import GrammarError
from sgl_apr.formats.call_formats import INDEX, NAME, CallFormat
from sgl_apr.formats.grammar import TEXT
from sgl_apr.formats.lark_ast import StringLiteral, SymbolRef
from sgl_apr.formats.masks.json_schema import SchemaPreparer
from sgl_apr.formats.masks.tagged_arguments import tagged_arguments
from sgl_apr.formats.masks.writer import CALLS, OWN, FlatSequence, GrammarWriter, OptionalText, RuleRef
from sgl_apr.formats.tool_syntax import ToolDefinition, ToolSyntax

MAX_CALLS = 64
ANSWER = "answer"


def extend_alternatives(flats: list[FlatSequence], writer: GrammarWriter) -> list[FlatSequence]:
    """Return the alternatives of a phase together with those that end with calls, and with JSON as its answer.

    Args:
        flats: The alternatives of the phase.
        writer: Of the mask. The rules of calls and of the answer are added to it.

    Raises:
        GrammarError: A schema or a form of calls cannot be written for the grammar backend.
    """
    options = writer.options
    syntax, count = options.tool_syntax, options.max_calls
    calls: list[FlatSequence] = []
    if syntax is not None and count > 0:
        start = (OWN, OptionalText(), StringLiteral(syntax.trigger), RuleRef(CALLS))
        calls = [flat[:i] + start for flat in flats for i, item in enumerate(flat) if item == OWN]
    if options.call == "required" and not calls:
        raise GrammarError(f"{writer.grammar.name}: a call is required, but the phase cannot call a tool")
    if calls and syntax is not None:
        _write_calls(writer, syntax, count if syntax.allows_parallel else 1)
    if options.call == "required":
        flats = []
    elif options.answer_schema is not None:
        flats = [_with_answer(flat) for flat in flats]
        if any(RuleRef(ANSWER) in flat for flat in flats):
            preparer = _preparer(writer)
            writer.json_value(ANSWER, preparer.prepare(options.parsed_answer_schema, "the answer's schema"))
    return list(dict.fromkeys([*flats, *calls]))


def _with_answer(flat: FlatSequence) -> FlatSequence:
    """A sequence whose free text at the end is the answer."""
    return (*flat[:-2], RuleRef(ANSWER)) if flat[-2:] == (OWN, SymbolRef(TEXT)) else flat


def _preparer(writer: GrammarWriter) -> SchemaPreparer:
    names = sorted(writer.excluded_names, key=len, reverse=True)
    excluded = re.compile("</?(?:" + "|".join(map(re.escape, names)) + ")", re.IGNORECASE)
    return SchemaPreparer(excluded, writer.string_pattern, writer.BACKEND)


def _write_calls(writer: GrammarWriter, syntax: ToolSyntax, count: int) -> None:
    """Write the rule `CALLS`: all of the calls, without the text with which they begin."""
    form, preparer, lines = syntax.form, _preparer(writer), writer.lines
    count = min(count, MAX_CALLS)
    for index, tool in enumerate(syntax.tools):
        where = f"tool {tool.name!r}"
        if form.parameters is None:
            arguments = writer.json_value(f"arguments_{index}", preparer.prepare(tool.schema, where))
        else:
            arguments = tagged_arguments(writer, preparer, form.parameters, tool, index)
        lines[f"call_{index}"] = " ".join([arguments, *writer.fixed(form.end)])

    def call(prefix: str, number: int) -> str:
        """The alternatives of a call: one for each tool."""
        return " | ".join(
            " ".join([*writer.fixed(begin), f"call_{index}"])
            for index, begin in enumerate(_beginnings(form, syntax.tools, prefix, number))
        )

    lines["first_call"] = call(form.section_begin, 0)
    numbered = INDEX in form.begin
    for number in range(1, count):
        name = f"next_call_{number}" if numbered else "next_call"
        lines[name] = call(form.separator, number)
        more = f" more_calls_{number + 1}?" if number + 1 < count else ""
        lines[f"more_calls_{number}"] = name + more
    further = ["more_calls_1?"] if count > 1 else []
    lines[CALLS] = " ".join(["first_call", *further, *writer.fixed(form.section_end)])


def _beginnings(form: CallFormat, tools: Iterable[ToolDefinition], prefix: str, number: int) -> Iterable[str]:
    """What stands before the arguments of a call of each tool, without the trigger at the very beginning."""
    for tool in tools:
        text = (prefix + form.begin).replace(NAME, tool.name).replace(INDEX, str(number))
        yield text.removeprefix(form.trigger) if number == 0 else text
