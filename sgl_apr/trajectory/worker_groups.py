"""Groups of workers in a trajectory: branches that decoded together, where each token saw the tokens of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.spans import Path, Span

GroupKind = Literal["group_think", "hogwild"]


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The branches of one block that decoded as a group of workers.

    They begin to decode in the same step. In step k every branch that has not ended reads its k-th decoded token and
    attends to the prompt, the headers of all branches, and the first k decoded tokens of all branches. The parents of
    a branch's spans are its own spans and the prompt. What it saw of the other branches follows from this rule.

    Attributes:
        path: The block.
        kind: "group_think": each branch has a range of positions of its own (arXiv 2505.11107). "hogwild": each
            branch sees a common history, then the current steps of the others, then its own, at consecutive positions
            (arXiv 2504.06261).
        position_range: The number of positions of each branch of Group Think. 0 for Hogwild!.
        step_end: The text that ends a step of Hogwild!, which then moves to the history. Empty if no step ends.
    """

    path: Path
    kind: GroupKind
    position_range: int = 0
    step_end: str = ""


def tokens_seen(
    spans: Sequence[Span], calls: Sequence[Call], groups: Sequence[GroupRecord], lengths: Sequence[int]
) -> list[Sequence[int]]:
    """Return for every token of every span how many tokens it was conditioned on.

    A token is conditioned on all tokens that were visible when it was chosen: those before it in its own context, and in
    a group also those that the other workers had written by then. Its own value does not count.

    Args:
        spans: The spans of a trajectory, with token ids.
        calls: Its engine calls. Their output includes an end of text, which the others of a group see too.
        groups: Its groups.
        lengths: For every span the tokens of its ancestors and its own (`context_lengths`).
    """
    seen: list[Sequence[int]] = [
        range(length - span.tokens, length) for span, length in zip(spans, lengths, strict=True)
    ]
    for group in groups:
        _add_group(seen, spans, calls, group, lengths)
    return seen


def _add_group(
    seen: list[Sequence[int]],
    spans: Sequence[Span],
    calls: Sequence[Call],
    group: GroupRecord,
    lengths: Sequence[int],
) -> None:
    depth = len(group.path) + 1
    block = [i for i, span in enumerate(spans) if len(span.path) == depth and span.path[:-1] == group.path]
    # A branch without a request had no tokens to decode, and was no worker.
    workers = {spans[i].path for i in block if spans[i].call is not None}
    own = [i for i in block if spans[i].path in workers]
    headers = [i for i in own if spans[i].origin != "decoded"]
    if not headers:
        return
    prompt = min(lengths[i] - spans[i].tokens for i in headers)
    before = prompt + sum(spans[i].tokens for i in headers)
    decoded: dict[Path, list[int]] = {}
    for i in own:
        if spans[i].origin == "decoded":
            decoded.setdefault(spans[i].path, []).append(i)
    read = [_tokens_read(spans, calls, indices) for indices in decoded.values()]
    for indices in decoded.values():
        step = 0
        for i in indices:
            steps = range(step, step + spans[i].tokens)
            seen[i] = tuple(before + sum(min(k, tokens) for tokens in read) for k in steps)
            step += spans[i].tokens


def _tokens_read(spans: Sequence[Span], calls: Sequence[Call], indices: Sequence[int]) -> int:
    """How many decoded tokens of a branch the others could see. An end of text is in its call, and in no span."""
    reported = {call: calls[call].output_tokens for i in indices if (call := spans[i].call) is not None}
    return max(sum(reported.values()), sum(spans[i].tokens for i in indices))
