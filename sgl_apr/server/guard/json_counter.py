"""Counts what a JSON document has, and refuses one that has too much."""

from __future__ import annotations

from typing import Any

from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.refusal import over_limit

# Their strings are images, video and audio. They are no text of a prompt.
MEDIA_FIELDS = frozenset({
    "image_url", "video_url", "audio_url", "input_audio", "image_data", "video_data", "audio_data", "images", "source",
    "file_data", "url",
})  # fmt: skip

NESTED_TYPES = frozenset({str, dict, list})  # what is counted in a list


class JsonCounter:
    """Counts the values of a JSON document, except numbers, and the characters of its strings.

    Attributes:
        chars: Characters of all strings, except those of media.
        longest: Characters of the longest of them.
        entries: Entries of all lists.
    """

    def __init__(self, limits: GuardLimits) -> None:
        self.chars = self.longest = 0
        self.entries = 0
        self._limits, self._values = limits, 0

    def count_key(self, name: str) -> None:
        self._add(1)

    def count_values(self, value: Any, depth: int, media: bool = False) -> None:
        if isinstance(value, str):
            self._add(1)
            if not media:
                self.chars += len(value)
                self.longest = max(self.longest, len(value))
        elif isinstance(value, dict):
            self._enter(depth)
            self._add(1 + len(value))
            for name, entry in value.items():
                if type(entry) in NESTED_TYPES:
                    self.count_values(entry, depth + 1, media or name in MEDIA_FIELDS)
        elif isinstance(value, list):
            self._enter(depth)
            self._add(1)
            self.entries += len(value)
            if self.entries > self._limits.json_entries:
                raise over_limit(
                    "the number of list entries in the body",
                    self.entries,
                    "--apr-max-json-entries",
                    self._limits.json_entries,
                )
            if not NESTED_TYPES.isdisjoint(map(type, value)):  # most long lists are token ids
                for entry in value:
                    if type(entry) in NESTED_TYPES:
                        self.count_values(entry, depth + 1, media)

    def _enter(self, depth: int) -> None:
        if depth > self._limits.json_depth:
            raise over_limit("the nesting depth of the body", depth, "--apr-max-json-depth", self._limits.json_depth)  # fmt: skip

    def _add(self, count: int) -> None:
        self._values += count
        if self._values > self._limits.json_values:
            raise over_limit(
                "the number of keys, strings, objects and lists in the body",
                f"more than {self._limits.json_values}", "--apr-max-json-values", self._limits.json_values,
            )  # fmt: skip


def count_brackets(body: bytes) -> int:
    """Return how many objects and lists a body has at most. A body is parsed only if that number is not too large."""
    return body.count(b"[") + body.count(b"{")
