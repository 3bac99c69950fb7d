"""What stands around the results of calls: the form of the model's chat template, or a plain one."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from sgl_apr.engine.base import Engine
from sgl_apr.engine.chat_template import encode_messages
from sgl_apr.errors import AprError, EngineError, UnsupportedEngine
from sgl_apr.formats.tool_syntax import ToolDefinition, ToolSyntax
from sgl_apr.runtime.retry import as_engine_error
from sgl_apr.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A conversation with texts that no template has, between which the form is cut out.
USER, ARGUMENT, RESULT = "AprUser7", "AprArgument7", "AprResult7"
PROBE = ToolDefinition.from_schema(
    "probe", "Probe.", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
)
MAX_SYNTAX_CHARS = 2000  # between the argument of a call and its result


@dataclass(frozen=True, slots=True)
class ObservationForm:
    """The texts around the results of the calls that a phase ended with.

    Attributes:
        before: Stands between the last call and its result, with the end of the assistant's turn.
        between: Stands between two results.
        after: Stands after the last result, with what opens the assistant's next turn.
        quoted: The template writes results as JSON strings, so that they are escaped.
    """

    before: str
    between: str
    after: str
    quoted: bool = False

    def pieces(self, count: int) -> list[str]:
        """The texts before each of so many results, and after the last one."""
        return [self.before, *[self.between] * (count - 1), self.after]

    def tokens(self, tokenizer: Tokenizer, count: int) -> int:
        """Tokens of the form of so many results."""
        return sum(len(ids) for ids in encode_form(tokenizer, self, count))

    def escaped(self, text: str) -> str:
        """A result as the form holds it."""
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.quoted else text


# For models without a chat template, or whose template does not know tools.
PLAIN_FORM = ObservationForm(
    "\n<tool_response>\n", "\n</tool_response>\n<tool_response>\n", "\n</tool_response>\n"
)

_forms: WeakKeyDictionary[Engine, dict[str, ObservationForm]] = WeakKeyDictionary()


@lru_cache(maxsize=256)
def encode_form(tokenizer: Tokenizer, form: ObservationForm, count: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of each of the form's texts."""
    return tuple(tuple(tokenizer.encode(piece)) for piece in form.pieces(count))


async def observation_form(engine: Engine, syntax: ToolSyntax) -> ObservationForm:
    """Return how the model's chat template writes results of calls. It is rendered once for each engine.

    Args:
        engine: Renders chat messages.
        syntax: The syntax of calls.
    """
    engine = getattr(
        engine, "chat_engine", engine
    )  # an engine of a program lives no longer than one expression
    try:
        known = _forms.setdefault(engine, {})
    except TypeError:  # an engine of somebody else's, which has no weak references or no hash
        known = {}
    if syntax.parser not in known:
        try:
            known[syntax.parser] = await _render_form(engine, syntax.parser)
        except EngineError as error:  # it may answer the next time
            log.warning("the form of results of tools is not known, and a plain one is used: %s", error)
            return PLAIN_FORM
    return known[syntax.parser]


async def _render_form(engine: Engine, parser: str) -> ObservationForm:
    """The form that a chat template writes, from conversations with one and with two calls."""
    syntax = ToolSyntax(parser, (PROBE,))
    single = await _render_pieces(engine, syntax, 1)
    if single is None:
        log.info("the chat template does not write results of tools, and a plain form is used")
        return PLAIN_FORM
    before, after = single
    double = await _render_pieces(engine, syntax, 2) if syntax.allows_parallel else None
    between = double[1] if double else after + before
    quoted = before.endswith('"') and after.startswith('"')
    return ObservationForm(before, between, after, quoted)


async def _render_pieces(engine: Engine, syntax: ToolSyntax, calls: int) -> list[str] | None:
    """The texts before, between and after the results of so many calls; None if the template does not write them."""
    tools = [PROBE.as_openai()]
    for as_text in (True, False):  # OpenAI has the arguments as text, and some templates want an object
        messages = _conversation(calls, as_text=as_text)
        try:
            ids = await encode_messages(engine, messages, tools)
        except UnsupportedEngine:  # there is no template
            return None
        except EngineError:
            raise
        except OSError as error:  # also TimeoutError
            raise as_engine_error(error) from error
        except AprError as error:  # it does not know tools
            log.info("the chat template refuses calls of tools: %s", error)
            continue
        if pieces := _cut_pieces(engine.tokenizer.decode(ids), engine.tokenizer, syntax, calls):
            return pieces
    return None


def _conversation(calls: int, *, as_text: bool) -> list[dict[str, Any]]:
    """A user's message, calls, and a result of each."""
    ids = [f"call{k:05d}" for k in range(calls)]  # nine letters and digits, as Mistral's templates demand

    def call(k: int, call_id: str) -> dict[str, Any]:
        arguments: Any = {"text": f"{ARGUMENT}{k}"}
        function = {"name": PROBE.name, "arguments": json.dumps(arguments) if as_text else arguments}
        return {"id": call_id, "type": "function", "function": function}

    return [
        {"role": "user", "content": USER},
        {"role": "assistant", "content": "", "tool_calls": [call(k, i) for k, i in enumerate(ids)]},
        *(
            {"role": "tool", "tool_call_id": i, "name": PROBE.name, "content": f"{RESULT}{k}"}
            for k, i in enumerate(ids)
        ),
    ]


def _cut_pieces(text: str, tokenizer: Tokenizer, syntax: ToolSyntax, calls: int) -> list[str] | None:
    """Cut out of a rendered conversation what stands between the last call and the first result, and so on."""
    user = text.rfind(USER)
    argument = text.find(f"{ARGUMENT}{calls - 1}", user)
    results = [text.find(f"{RESULT}{k}", argument) for k in range(calls)]
    if min(user, argument, *results) < 0 or results != sorted(results):
        return None
    end = _end_of_calls(text, syntax, user + len(USER), argument, results[0], calls)
    if end is None:
        end = _end_of_turn(text, tokenizer, argument, results[0])
    if end is None:
        return None
    ends = [end, *(at + len(f"{RESULT}{k}") for k, at in enumerate(results))]
    return [text[a:b] for a, b in zip(ends, [*results, len(text)], strict=True)]


def _end_of_calls(
    text: str, syntax: ToolSyntax, start: int, argument: int, result: int, calls: int
) -> int | None:
    """Where the calls end that stand between `start` and `result`, the last of them with its argument at `argument`.

    A template may write more than the model has to, such as the ids of calls. Then what closes calls is looked for.
    """
    for end in range(argument, min(result, argument + MAX_SYNTAX_CHARS) + 1):
        parsed = syntax.parse(text[start:end])
        if parsed.complete and len(parsed.calls) == calls:
            return end
    closing = (syntax.form.end + syntax.form.section_end).split()[-1:]
    if not closing or closing[0].endswith("}"):  # it also ends the arguments
        return None
    at = text.find(closing[0], argument, result)
    return at + len(closing[0]) if at >= 0 else None


def _end_of_turn(text: str, tokenizer: Tokenizer, argument: int, result: int) -> int | None:
    """Where the first end-of-text token stands between the argument of the last call and its result."""
    marks = filter(None, (tokenizer.decode([i]) for i in tokenizer.eos_ids))
    return min((at for mark in marks if (at := text.find(mark, argument, result)) >= 0), default=None)
