"""Blocks and branches, as a view of spans; what they say is read elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sgl_apr.trajectory.spans import Finish, Path, Span

Outcome = Literal["ok", "eos", "length", "aborted", "timeout", "failed", "malformed"]


@dataclass(frozen=True, slots=True)
class Branch:
    """A view: one branch of a block.

    `text` is what it wrote, without header and closer; `result` is the message that came back from it,
    empty where branches join otherwise.
    """

    path: Path
    outline: str
    text: str
    result: str
    finish: Finish | None
    spans: tuple[int, ...]

    @property
    def number(self) -> int:
        """1-based, as written in its header."""
        return self.path[-1]

    @property
    def outcome(self) -> Outcome | None:
        """`finish`, with "ok" for a branch that ended itself; None where a text was read."""
        return branch_outcome(self.finish)


def branch_outcome(finish: Finish | None) -> Outcome | None:
    """How a branch has ended, from the finish of its last span."""
    return "ok" if finish == "stop" else finish


@dataclass(frozen=True, slots=True)
class Block:
    """A view: one fork with its branches and what the join concluded (empty if nothing)."""

    path: Path
    branches: tuple[Branch, ...]
    conclusion: str


def iter_blocks(spans: Sequence[Span]) -> Iterator[Block]:
    """Every block, outer before inner, in the order of the text."""
    forks: dict[Path, dict[Path, list[int]]] = {}
    for i, span in enumerate(spans):
        for depth in range(2, len(span.path) + 1, 2):
            branch = span.path[:depth]
            forks.setdefault(branch[:-1], {}).setdefault(branch, []).append(i)
    for path, branches in forks.items():
        yield Block(
            path=path,
            branches=tuple(_branch(spans, p, tuple(branches[p])) for p in sorted(branches)),
            conclusion=_conclusion(spans, path),
        )


def _branch(spans: Sequence[Span], path: Path, ids: tuple[int, ...]) -> Branch:
    own = [spans[i] for i in ids]
    return Branch(
        path=path,
        outline=next(
            (s.outline or s.label for s in own if s.role in ("header", "result") and s.path == path), ""
        ),
        text="".join(s.text for s in own if s.path != path or s.role not in ("header", "closer", "result")),
        result="".join(s.label for s in own if s.path == path and s.role == "result"),
        finish=next((s.finish for s in reversed(own) if s.path == path and s.finish), None),
        spans=ids,
    )


def _conclusion(spans: Sequence[Span], block: Path) -> str:
    """The label of what closes the block: the n-th tail of its sequence ends block n."""
    ended = 0
    for span in spans:
        if span.path == block[:-1]:
            ended += span.role == "tail"
            if span.role == "close" and ended == block[-1]:
                return span.label
    return ""
