"""What one request can decode of its phase."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from sgl_apr.errors import GrammarError
from sgl_apr.formats.tool_syntax import ToolSyntax

ForkMode = Literal["auto", "required", "forbidden"]
GrammarBackend = Literal["llguidance", "xgrammar"]
CallMode = Literal["auto", "required"]


@dataclass(frozen=True, slots=True)
class TextLimits:
    """What a parameter that is plain text has to be.

    Attributes:
        min_chars: Its minimal length in characters.
        max_chars: Its maximal length, None if there is none.
        pattern: A regular expression for all of it.
        trimmed: Whether it has to be without white space at its ends, which the parser removes.
    """

    min_chars: int = 0
    max_chars: int | None = None
    pattern: str | None = None
    trimmed: bool = False


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """What one request can decode of its phase.

    Attributes:
        min_width: The lowest number of branches of a fork.
        width: The highest number of branches of a fork.
        fork: Whether the phase can fork ("auto"), has to ("required"), or must not ("forbidden").
        prefix: The prefix of the numbers of a fork (`3.` in branch 3).
        first_number: The number of the first branch. Numbers have no gaps.
        number: The number of the branch that decodes, or of the next one that is forked off.
        waiting: The numbers of the branches that the trunk can wait for. It has to wait for them before it ends.
        lead_chars: The maximal length of each text before a fork, or before a call that is required, in characters.
        outline_chars: The maximal length of each outline, in characters. It also keeps an outline on one line.
        forbid_angle_brackets: Exclude `<` from text, which keeps a small model from writing tags of its own. Text
            with a maximal length never contains `<`.
        depth: How deep blocks can nest in a complete document.
        tool_syntax: The tools that can be called. Free text then cannot contain the text with which calls begin.
        max_calls: How many calls of tools a text can end with. A call can follow free text of the sequence itself: not
            text in a fork, a closer or a close.
        call: Whether the phase can end with a call ("auto") or has to ("required").
        resumed: Whether the phase continues after the result of a call, so that it begins with its free text.
        answer_schema: A JSON schema, as text. Free text with which the phase ends is then JSON that fits it.
    """

    min_width: int = 2
    width: int = 8
    fork: ForkMode = "auto"
    prefix: str = ""
    first_number: int = 1
    number: str = ""
    waiting: tuple[str, ...] = ()
    lead_chars: int | None = None
    outline_chars: int | None = None
    forbid_angle_brackets: bool = False
    depth: int = 1
    tool_syntax: ToolSyntax | None = None
    max_calls: int = 0
    call: CallMode = "auto"
    resumed: bool = False
    answer_schema: str | None = None

    @property
    def parsed_answer_schema(self) -> dict[str, Any]:
        """The schema of the answer.

        Raises:
            GrammarError: It is not the text of a JSON object.
        """
        try:
            schema = json.loads(self.answer_schema or "{}")
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the answer's schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise GrammarError("the answer's schema is not a JSON object")
        return schema
