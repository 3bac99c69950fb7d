"""Finds the calls of tools with which a text ends. It takes time in proportion to the length of the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from sgl_apr.formats.call_formats import INDEX, NAME, CallFormat
from sgl_apr.formats.tagged_values import TaggedReader

ParsedCall = tuple[str, str, int, int]  # name, arguments, start, end

_PIECES = re.compile(rf'"|\s+|[{{}}\[\]:,]|{NAME}|{INDEX}|[^\s"{{}}\[\]:,{NAME}{INDEX}]+')
_VALUES = {NAME: re.compile(r"[\w.\-]+"), INDEX: re.compile(r"[0-9]+")}
WINDOW = 2048  # characters of JSON that are decoded at first
_SPACE = re.compile(r"\s*")
_UNFINISHED = re.compile(r'-|[.eE][+-]?|[\\u"].{0,5}')


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class Match(NamedTuple):
    """What of a text follows a format.

    Attributes:
        end: Where it ends, or where it departs from the format.
        ok: Whether it follows the format to its end.
        cut: Whether it follows the format up to the end of the text, which comes too early.
        value: What stands in the place of `NAME`.
    """

    end: int
    ok: bool = True
    cut: bool = False
    value: str = ""


class Template:
    """A fixed text with places for values. Other white space than its own can stand between its pieces.

    Args:
        text: The text, with `NAME` and `INDEX` in the places of values.
    """

    def __init__(self, text: str) -> None:
        self.pieces = [p for p in _PIECES.findall(text) if not p.isspace()]

    def match(self, text: str, position: int) -> Match:
        """Compare a text with the template from a position on."""
        value = ""
        for piece in self.pieces:
            position = skip_space(text, position)
            if piece in _VALUES:
                found = _VALUES[piece].match(text, position)
                if found is None or found.end() == len(text):
                    return Match(
                        len(text) if found else position, False, position == len(text) or bool(found)
                    )
                value, position = found[0] if piece == NAME else value, found.end()
            elif text.startswith(piece, position):
                position += len(piece)
            else:
                rest = text[position : position + len(piece)]
                cut = position + len(rest) == len(text) and piece.startswith(rest)
                return Match(position, False, cut)
        return Match(position, value=value)


def skip_space(text: str, position: int) -> int:
    """Return where the white space at a position ends."""
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches no space as well


class CallParser:
    """Parses the calls of one format.

    A model that writes without a mask may put other white space between the pieces of a call than the mask does.

    Args:
        form: The format.
        schemas: The JSON schema of each tool's arguments.
    """

    def __init__(self, form: CallFormat, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self.form, self.schemas = form, schemas
        self._section_begin, self._section_end = Template(form.section_begin), Template(form.section_end)
        self._begin, self._end = Template(form.begin), Template(form.end)
        self._separator = Template(form.separator)
        self._readers: dict[str, TaggedReader] = {}  # by the names of tools that exist or were called

    def parse(self, text: str) -> tuple[int, list[ParsedCall], bool]:
        """Return where the calls at the end of a text begin, the calls, and whether the last one is complete."""
        trigger = self.form.trigger
        position = text.find(trigger)
        while position >= 0:
            calls: list[ParsedCall] = []
            section = self._section(text, position, calls)
            if section.ok and skip_space(text, section.end) == len(text):
                return position, calls, True
            if section.cut:
                return position, calls, False
            position = text.find(trigger, max(section.end, position + len(trigger)))
        return len(text), [], True

    def _section(self, text: str, start: int, calls: list[ParsedCall]) -> Match:
        """Match everything between the beginning and the end of the calls of a message."""
        match = self._section_begin.match(text, start)
        while match.ok:
            call_start = skip_space(text, match.end)
            match = self._call(text, call_start, calls)
            if not match.ok:
                break
            end = match.end
            closing = self._section_end.match(text, end)
            if self.form.section_end and (closing.ok or closing.cut):
                return closing
            following = self._separator.match(text, end) if self.form.parallel else Match(end, False)
            begins = self._begin.match(text, following.end) if following.ok else following
            if not begins.ok and not begins.cut:
                return Match(end, not self.form.section_end)
            if skip_space(text, end) == len(text):  # perhaps a part of the separator
                return Match(len(text), not self.form.section_end, bool(self.form.section_end))
            match = following
        return match

    def _call(self, text: str, start: int, calls: list[ParsedCall]) -> Match:
        """Match one call and append it to the calls."""
        begin = self._begin.match(text, start)
        if not begin.ok:
            return begin
        arguments, end = self._arguments(text, begin.end, begin.value)
        if not end.ok:
            return end
        ending = self._end.match(text, end.end)
        if ending.ok:
            calls.append((begin.value, arguments, start, ending.end))
        return ending

    def _arguments(self, text: str, start: int, name: str) -> tuple[str, Match]:
        """Match the arguments of a tool, and return them as JSON text."""
        if self.form.parameters is None:
            return self._json_object(text, skip_space(text, start))
        if name not in self._readers:
            self._readers[name] = TaggedReader(self.form.parameters, self.schemas.get(name, {}))
        arguments, end, is_cut = self._readers[name].read(text, start)
        return arguments, Match(end, bool(arguments) and not is_cut, is_cut)

    @staticmethod
    def _json_object(text: str, start: int) -> tuple[str, Match]:
        """Match a JSON object, and return its text."""
        if not text.startswith("{", start):
            return "", Match(start, False, start == len(text))
        size = WINDOW
        while True:
            # An error of the decoder takes time in proportion to the text before it, so the text grows step by step.
            window, is_rest = text[start : start + size], start + size >= len(text)
            try:
                _, end = _DECODER.raw_decode(window)
            except json.JSONDecodeError as error:
                is_cut = _is_cut(error, window)
                if not is_cut or is_rest:
                    return "", Match(start + error.pos, False, is_cut)
                size *= 4
            except (ValueError, RecursionError):
                return "", Match(start + 1, False)
            else:
                return window[:end], Match(start + end)


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether JSON is only wrong because it ends: in a string, a literal, a number or an escape (`tru`, `1.`, `"\\u00`)."""
    rest = text[error.pos :]
    if error.msg.startswith("Unterminated string") or not rest or rest.isspace():
        return True
    literal = any(word.startswith(rest) for word in ("true", "false", "null"))
    return literal or (len(rest) < 7 and _UNFINISHED.fullmatch(rest) is not None)
