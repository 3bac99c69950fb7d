"""Puts the text of a reply, whose branches write in parallel, in the order of the complete text while it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from sgl_apr.runtime.events import BranchEnded, Delta, Event, Forked, Joined, SpanFinished, TextRetracted
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.trajectory.spans import Path


@dataclass(eq=False)
class _Sequence:
    """The text of a sequence so far: pieces of text, and the blocks that it forked.

    Attributes:
        parts: The text and the blocks, in the order of the text.
        has_ended: Nothing follows.
        read: How many of the parts were read.
    """

    parts: list[str | _Block] = field(default_factory=list)
    has_ended: bool = False
    read: int = 0

    def read_new(self, *, waits_for_branches: bool) -> str:
        """Return the text that comes next, up to a branch that is still being written."""
        new: list[str] = []
        while self.read < len(self.parts):
            part = self.parts[self.read]
            if isinstance(part, str):
                new.append(part)
            else:
                new.append(part.read_new(waits_for_branches=waits_for_branches))
                if not part.has_ended:
                    break
            self.read += 1
        return "".join(new)

    def retract(self, chars: int) -> int:
        """Remove the last characters. Returns how many of them were read."""
        void = 0
        while chars > 0 and self.parts and isinstance(last := self.parts[-1], str):
            removed, was_read = min(chars, len(last)), self.read == len(self.parts)
            chars -= removed
            void += removed if was_read else 0
            if removed < len(last):
                self.parts[-1] = last[: len(last) - removed]
            else:
                self.parts.pop()
                self.read = min(self.read, len(self.parts))
        return void

    def characters_read(self) -> int:
        """Return how many characters were read of this sequence and its branches."""
        parts = self.parts[: self.read + 1]
        blocks = sum(part.characters_read() for part in parts if not isinstance(part, str))
        return blocks + sum(len(part) for part in self.parts[: self.read] if isinstance(part, str))


@dataclass(eq=False)
class _Block:
    """The branches of a fork, in the order of the text."""

    branches: list[_Sequence] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return all(branch.has_ended for branch in self.branches)

    def read_new(self, *, waits_for_branches: bool) -> str:
        new: list[str] = []
        for branch in self.branches:
            if branch.has_ended or not waits_for_branches:
                new.append(branch.read_new(waits_for_branches=waits_for_branches))
            if not branch.has_ended:
                break
        return "".join(new)

    def characters_read(self) -> int:
        return sum(branch.characters_read() for branch in self.branches)


class ReplyOrder:
    """Receives the events of one trajectory, and returns its text in the order of `Trajectory.text`.

    The first branch of a fork that has not ended is returned as it is written. The text of the branches after it waits.
    Branches with a context of their own are not part of the text, except their results.

    Args:
        options: Of the trajectory.
        waits_for_branches: Whether the text of every branch waits until the branch has ended. It cannot be void then.
    """

    def __init__(self, options: ReasonOptions, *, waits_for_branches: bool = False) -> None:
        self._waits = waits_for_branches
        self._by_message = options.dialect.branch_context == "message"
        self._asynchronous = options.dialect.asynchronous
        self._sequences: dict[Path, _Sequence] = {(): _Sequence()}
        self._blocks: dict[Path, _Block] = {}
        self._unplaced: set[Path] = set()  # blocks that have no place in the text of their sequence yet

    def add(self, event: Event) -> tuple[int, str]:
        """Add an event.

        Returns:
            How many of the last characters that were returned are void, and the text that follows then.
        """
        void = 0
        match event:
            case Forked(path, branches, first) if not self._by_message:
                block = self._blocks.setdefault(path, _Block())
                for number in range(first, first + len(branches)):
                    self._sequences[*path, number] = branch = _Sequence()
                    block.branches.append(branch)
                self._unplaced.add(path)
            case Delta(path, text) if sequence := self._sequences.get(path):
                self._place(path[:-1])
                sequence.parts.append(text)
            case TextRetracted(path, chars) if sequence := self._sequences.get(path):
                void = self._retract(path, sequence, chars)
            case BranchEnded(path) if sequence := self._sequences.get(path):
                self._place(path[:-1])
                sequence.has_ended = True
            case Joined(path, branches) if self._asynchronous and not self._by_message:
                joined = [self._sequences[*path, number] for number in branches]
                self._sequences[path[:-1]].parts.append(_Block(joined))
            case SpanFinished(_, span) if span.role == "result" and (
                sequence := self._sequences.get(span.path[:-2])
            ):
                sequence.parts.append(span.text)
        return void, self._sequences[()].read_new(waits_for_branches=self._waits)

    def _place(self, block: Path) -> None:
        """Put a block into the text of its sequence: after what that wrote before the branches write."""
        if block in self._unplaced and not self._asynchronous:
            self._unplaced.discard(block)
            self._sequences[block[:-1]].parts.append(self._blocks[block])

    def _retract(self, path: Path, sequence: _Sequence, chars: int | None) -> int:
        if chars is not None:
            return sequence.retract(chars)
        void = sequence.characters_read()
        inner = len(path)
        for block in [known for known in self._blocks if known[:inner] == path]:
            del self._blocks[block]
            self._unplaced.discard(block)
        for known in [known for known in self._sequences if known[:inner] == path and known != path]:
            del self._sequences[known]
        sequence.parts, sequence.read = [], 0
        return void
