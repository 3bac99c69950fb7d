"""Spans: the runs of tokens that a trajectory consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sgl_apr.errors import AprError

Origin = Literal["prompt", "decoded", "injected"]
Finish = Literal["stop", "eos", "length", "aborted", "timeout", "failed", "malformed"]
Role = Literal[
    "prompt",
    "text",
    "fork",
    "lead",
    "header",
    "body",
    "closer",
    "wait",
    "result",
    "tail",
    "close",
    "call",
    "observation",
]
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens with one origin and one role.

    A token that straddles two spans belongs to the one in which it begins.

    Attributes:
        role: Its role in the grammar. A "call" of tools and the "observation" of their results stand between texts.
        origin: Whether it is part of the prompt, was decoded by the model, or was injected by the runtime.
        text: Its text.
        token_ids: Its token ids; None if the text was parsed without a tokenizer.
        parents: Indices of the spans that it directly follows. Its ancestors are what it was conditioned on; a worker of
            a group (`Trajectory.groups`) was also conditioned on what the others had written by then.
        path: Where it stands: `()` is the trunk, `(1, 2)` is branch 2 of the first block, and so on.
        label: The text that the grammar names in it: the outline (header), the conclusion (close), or the message
            that a branch returned (closer, result), or the ids of the calls, separated by spaces (call, observation).
        finish: How its sequence ended, if it ended with this span.
        call: The index of the engine call that decoded it.
        waits_for: Indices of spans that it waited for without seeing them, as a join by message does.
        outline: The outline of the branch whose result it is.
    """

    role: Role
    origin: Origin
    text: str
    token_ids: tuple[int, ...] | None
    parents: tuple[int, ...]
    path: Path = ()
    label: str = ""
    finish: Finish | None = None
    call: int | None = None
    waits_for: tuple[int, ...] = ()
    outline: str = ""

    @property
    def tokens(self) -> int:
        """The number of its tokens; raises `AprError` if they are unknown."""
        if self.token_ids is None:
            raise AprError(
                "this trajectory was parsed from text without token ids: parse it with tokenizer= to count its tokens"
            )
        return len(self.token_ids)

    def with_references(self, parents: tuple[int, ...], waits_for: tuple[int, ...]) -> Span:
        """Return the span with other indices of the spans that it follows and waited for."""
        # `dataclasses.replace` takes twice as long, and a trajectory that ends calls this for most of its spans.
        return Span(
            self.role, self.origin, self.text, self.token_ids, parents, self.path, self.label, self.finish, self.call,
            waits_for, self.outline,
        )  # fmt: skip


def ancestors(spans: Sequence[Span], index: int) -> list[int]:
    """Return the indices of what a span was conditioned on, and its own, in the order of the text."""
    seen, stack = {index}, [index]
    while stack:
        new = [p for p in spans[stack.pop()].parents if p not in seen]
        seen.update(new)
        stack.extend(new)
    return sorted(seen)
