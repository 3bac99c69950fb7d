"""Blocks and branches, as a view of the spans of a trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sgl_apr.trajectory.spans import Finish, Path, Span

Outcome = Literal["ok", "eos", "length", "aborted", "timeout", "failed", "malformed"]


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of a block.

    Attributes:
        path: Its path: (block, number), preceded by the path of the sequence that forked.
        outline: Its outline; empty if it has none.
        text: Its text, without header and closer. Calls of tools and their results are part of it.
        result: The message that it returned; empty where branches join otherwise.
        finish: How it ended; None where a text was parsed.
        spans: The indices of its spans, those of its own branches included.
    """

    path: Path
    outline: str
    text: str
    result: str
    finish: Finish | None
    spans: tuple[int, ...]

    @property
    def number(self) -> int:
        """Its number in the block, from 1."""
        return self.path[-1]

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, with "ok" for a branch that closed itself; None where a text was parsed."""
        return branch_outcome(self.finish)


def branch_outcome(finish: Finish | None) -> Outcome | None:
    """Return how a branch ended, from the finish of its last span."""
    return "ok" if finish == "stop" else finish


@dataclass(frozen=True, slots=True)
class Block:
    """One fork with its branches.

    Attributes:
        path: Its path: the path of the sequence that forked, and the number of the block in it.
        branches: Its branches.
        conclusion: The conclusion after the join; empty if there is none.
    """

    path: Path
    branches: tuple[Branch, ...]
    conclusion: str


def iter_blocks(spans: Sequence[Span]) -> Iterator[Block]:
    """Yield every block, outer blocks before inner ones, in the order of the text."""
    forks: dict[Path, dict[Path, list[int]]] = {}
    for i, span in enumerate(spans):
        for depth in range(2, len(span.path) + 1, 2):
            branch = span.path[:depth]
            forks.setdefault(branch[:-1], {}).setdefault(branch, []).append(i)
    conclusions = _conclusions(spans)
    for path, branches in forks.items():
        yield Block(
            path=path,
            branches=tuple(_branch(spans, p, tuple(branches[p])) for p in sorted(branches)),
            conclusion=conclusions.get(path, ""),
        )


def _branch(spans: Sequence[Span], path: Path, ids: tuple[int, ...]) -> Branch:
    branch_spans = [spans[i] for i in ids]
    return Branch(
        path=path,
        outline=next(
            (s.outline or s.label for s in branch_spans if s.role in ("header", "result") and s.path == path),
            "",
        ),
        text="".join(
            s.text for s in branch_spans if s.path != path or s.role not in ("header", "closer", "result")
        ),
        result="".join(s.label for s in branch_spans if s.path == path and s.role == "result"),
        finish=next((s.finish for s in reversed(branch_spans) if s.path == path and s.finish), None),
        spans=ids,
    )


def _conclusions(spans: Sequence[Span]) -> dict[Path, str]:
    """The labels of the spans that close blocks, by block. The n-th tail of a sequence ends its block n."""
    ended: dict[Path, int] = {}
    conclusions: dict[Path, str] = {}
    for span in spans:
        if span.role == "tail":
            ended[span.path] = ended.get(span.path, 0) + 1
        elif span.role == "close":
            conclusions.setdefault((*span.path, ended.get(span.path, 0)), span.label)
    return conclusions
