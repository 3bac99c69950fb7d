"""Docstrings as this package writes them, for mkdocstrings: lines like `tokens: ...` as lists, `>>>` as code; nothing else."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"^((?:[a-z_]\w*)(?:, [a-z_]\w*)*): (?=\S)")
FIELDS_WITHIN = re.compile(r"(?<=\. )((?:[a-z_]\w*)(?:, [a-z_]\w*)*): (?=\S)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring as Markdown.

    >>> markdown("tokens: of it\\n    all.")
    '- **tokens**: of it\\n    all.'
    """
    made, fenced = list[str](), False
    for line in text.splitlines():
        example = line.startswith((">>>", "..."))
        if example and not fenced:
            made += ["", "```pycon"]
            fenced = True
        elif fenced and not line.strip():
            made.append("```")
            fenced = False
        if fenced:
            made.append(re.sub(r"\s*# doctest: \+SKIP", "", line))
            continue
        if found := FIELD.match(line):
            names = found[1].replace(", ", "**, **")
            if made and made[-1] and not made[-1].startswith(("- ", "    ")):
                made.append("")
            line = f"- **{names}**: {line[found.end() :]}"
        made.append(line)
    return "\n".join([*made, "```"] if fenced else made)
