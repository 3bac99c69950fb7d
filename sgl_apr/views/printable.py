"""Makes untrusted text safe for a terminal: no escape sequences, no control characters, no reversed writing."""

from __future__ import annotations

import re

# Control characters beyond those that JSON escapes, characters that change the writing direction, and halves of surrogate
# pairs, which UTF-8 cannot encode.
_RAW_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without characters that a terminal obeys. Line breaks stay; other white space becomes blanks.

    Examples:
        >>> printable("a\\x1b]52;c;cHduZWQ=\\x07b\\tc\\u202ed")
        'a]52;c;cHduZWQ=b cd'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else " " * c.isspace() for c in text)


def printable_json(text: str) -> str:
    """JSON that means the same and has no such character.

    Examples:
        >>> printable_json('{"text": "a\\x9b2J"}')
        '{"text": "a\\\\u009b2J"}'
    """
    return _RAW_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
