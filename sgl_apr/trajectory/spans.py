"""The pieces that a trajectory is made of: runs of tokens with one origin and one meaning; it knows no grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sgl_apr.errors import AprError

Origin = Literal["prompt", "decoded", "injected"]
Finish = Literal["stop", "eos", "length", "aborted", "timeout", "failed", "malformed"]
Role = Literal[
    "prompt", "text", "fork", "lead", "header", "body", "closer", "wait", "result", "tail", "close"
]
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens with one origin and one meaning.

    `parents` are indices of the spans it directly follows, so ancestors are what it was conditioned on;
    `after` are those that it waited for without seeing them, as a join by message does. `path` says where it stands: `()` is the trunk, `(1, 2)` branch 2 of the first
    block, and so on inside. `label` is what the grammar names in it: the outline (header), the
    conclusion (close), the message that a branch returned (closer, result);
    `outline` is that of the branch whose result it is. `token_ids` is None where a text was read without a tokenizer. A token that
    straddles two spans belongs to the one in which it begins.
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
        """Number of tokens; raises `AprError` if they are unknown."""
        if self.token_ids is None:
            raise AprError("this trajectory was read from text: parse it with tokenizer= to count its tokens")
        return len(self.token_ids)


def ancestors(spans: Sequence[Span], index: int) -> list[int]:
    """What span `index` was conditioned on, and itself, in the order of the text."""
    seen, stack = {index}, [index]
    while stack:
        fresh = [p for p in spans[stack.pop()].parents if p not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return sorted(seen)


def span_from_json(data: Mapping[str, Any], index: int) -> Span:
    """One span from its JSON, else `ValueError`; parents have to come first, which also keeps the graph acyclic."""
    names = {f.name for f in fields(Span)}
    if set(data) != names:
        raise ValueError(f"span fields {sorted(set(data) ^ names)}")
    if data["role"] not in get_args(Role) or data["origin"] not in get_args(Origin):
        raise ValueError(f"span role {data['role']!r}, origin {data['origin']!r}")
    if data["finish"] not in (None, *get_args(Finish)):
        raise ValueError(f"span finish {data['finish']!r}")
    before = [*data["parents"], *data["waits_for"]]
    if not all(isinstance(p, int) and 0 <= p < index for p in before):
        raise ValueError(f"span {index} follows {before}, expected spans before it")
    ids = data["token_ids"]
    return Span(
        **{
            **data,
            "token_ids": None if ids is None else tuple(int(i) for i in ids),
            "parents": tuple(int(p) for p in data["parents"]),
            "path": tuple(int(p) for p in data["path"]),
            "waits_for": tuple(int(p) for p in data["waits_for"]),
        }
    )
