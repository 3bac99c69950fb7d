"""Finds the calls of tools with which a text ends. It takes time in proportion to the length of the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from sgl_apr.formats.call_formats import INDEX, NAME, CallFormat

ParsedCall = tuple[str, str, int, int]  # name, arguments, start, end

_PIECES = re.compile(r'"[^"]*"|\s+|[{}\[\]:,]|[^\s"{}\[\]:,]+')


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def flexible_pattern(template: str) -> str:
    """Return a regular expression for a fixed text whose pieces can have other white space between them."""
    pieces = [p for p in _PIECES.findall(template) if not p.isspace()]
    escaped = r"\s*+".join(map(re.escape, pieces))
    return escaped.replace(re.escape(NAME), r"(?P<name>[\w.\-]+)").replace(re.escape(INDEX), r"\d+")


class CallParser:
    """Parses the calls of one format.

    A model that writes without a mask may put other white space between the pieces of a call than the mask does.

    Args:
        form: The format.
        schemas: The JSON schema of each tool's arguments.
    """

    def __init__(self, form: CallFormat, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self.form, self.schemas = form, schemas
        self._section_begin = re.compile(flexible_pattern(form.section_begin) + r"\s*+")
        self._section_end = re.compile(r"\s*+" + flexible_pattern(form.section_end))
        self._begin = re.compile(flexible_pattern(form.begin) + r"\s*+")
        self._end = re.compile(r"\s*+" + flexible_pattern(form.end))
        self._separator = re.compile(r"\s*+" + (flexible_pattern(form.separator) or "") + r"\s*+")
        self._space = re.compile(r"\s*+")

    def parse(self, text: str) -> tuple[int, list[ParsedCall], bool]:
        """Return where the calls at the end of a text begin, the calls, and whether the last one is complete."""
        position = text.find(self.form.trigger)
        while position >= 0:
            calls, end, complete = self._run(text, position)
            if end == len(text):
                return position, calls, complete
            position = text.find(self.form.trigger, max(end, position + 1))
        return len(text), [], True

    def _run(self, text: str, start: int) -> tuple[list[ParsedCall], int, bool]:
        """The calls from `start` on, where they end, and whether they are complete.

        An end at the end of the text without completeness is a cut; one before it is no call.
        """
        calls: list[ParsedCall] = []
        section = self._section_begin.match(text, start)
        if section is None:
            return calls, self._end_of_mismatch(text, start), False
        position = section.end()
        while True:
            call = self._call(text, position)
            if isinstance(call, int):
                return calls, call, False
            calls.append(call)
            position = call[3]
            end = self._section_end.match(text, position)
            if self.form.section_end and end is not None:
                return calls, self._space.match(text, end.end()).end(), True  # type: ignore[union-attr]
            separator = self._separator.match(text, position)
            following = separator.end() if separator else len(text)
            if following == len(text):
                return calls, following, not self.form.section_end
            if not self.form.parallel or not self._begin.match(text, following):
                if following + len(self.form.trigger) < len(text) or self.form.section_end:
                    return calls, following, False
                return calls, len(text), False
            position = following

    def _call(self, text: str, start: int) -> ParsedCall | int:
        """The call at `start`, or where it departs from the format: at the end of the text if it was cut."""
        begin = self._begin.match(text, start)
        if begin is None:
            return self._end_of_mismatch(text, start)
        try:
            if text[begin.end() : begin.end() + 1] not in ("{", ""):
                return begin.end()
            _, end = _DECODER.raw_decode(text, begin.end())
        except json.JSONDecodeError:
            # A cut is only told apart from malformed JSON by what follows.
            return begin.end() if self.form.end.strip() in text[begin.end() :] else len(text)
        except (ValueError, RecursionError):
            return begin.end()
        ending = self._end.match(text, end)
        if ending is None:
            return len(text) if self._is_prefix(text[end:], self.form.end) else end
        return begin["name"], text[begin.end() : end], start, ending.end()

    def _end_of_mismatch(self, text: str, start: int) -> int:
        """The end of the text if what is there can still become a call, else `start`."""
        rest = text[start:]
        before, _, after = (self.form.section_begin + self.form.begin).partition(NAME)
        return len(text) if self._is_prefix(rest, before) else start

    @staticmethod
    def _is_prefix(text: str, template: str) -> bool:
        """Whether a text is the beginning of a fixed text, apart from white space."""
        return "".join(template.split()).startswith("".join(text.split()))
