"""Checks the numbers in a trajectory that refer to its other parts: spans, calls, branches and blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sgl_apr.trajectory.calls import Call, JoinRecord
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.strict_json import WrongValue, describe
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.worker_groups import GroupRecord


def check_references(
    spans: Sequence[Span],
    calls: Sequence[Call],
    joins: Sequence[JoinRecord],
    tool_calls: Sequence[ToolCall] = (),
    groups: Sequence[GroupRecord] = (),
) -> None:
    """Check that parents come before their span, that calls, joined blocks and the blocks of groups exist, and that no
    count is negative.

    Of calls of tools it checks that their ids differ, that spans name calls that exist, and that none ends before it starts.

    Raises:
        WrongValue: One of them does not hold. Its place says where.
    """
    sequences: set[Path] = {()}
    blocks: set[Path] = set()
    for index, span in enumerate(spans):
        try:
            _check_span(span, index, len(calls))
        except WrongValue as error:
            raise error.inside(f"[{index}]").inside(".spans") from None
        if span.path not in sequences:
            if len(span.path) % 2 or span.path[:-2] not in sequences:
                found = "that of a block" if len(span.path) % 2 else f"a branch of {_short(span.path[:-2])}"
                wrong = WrongValue(
                    f"{_short(span.path)}, {found}", "the path of a branch whose trunk comes before it"
                )
                raise wrong.inside(".path").inside(f"[{index}]").inside(".spans")
            sequences.add(span.path)
            blocks.add(span.path[:-1])
    for index, call in enumerate(calls):
        for name in ("prompt_tokens", "cached_tokens", "output_tokens", "retries", "continuations"):
            if (getattr(call, name) or 0) < 0:
                wrong = WrongValue(str(getattr(call, name)), "0 or more")
                raise wrong.inside(f".{name}").inside(f"[{index}]").inside(".calls")
    for index, join in enumerate(joins):
        if join.path not in (blocks if len(join.path) % 2 else sequences):
            wrong = WrongValue(_short(join.path), "the path of a block or branch of the spans")
            raise wrong.inside(".path").inside(f"[{index}]").inside(".joins")
    for index, group in enumerate(groups):
        if group.path not in blocks:
            wrong = WrongValue(_short(group.path), "the path of a block of the spans")
            raise wrong.inside(".path").inside(f"[{index}]").inside(".groups")
        if group.position_range < 0:
            wrong = WrongValue(str(group.position_range), "0 or more")
            raise wrong.inside(".position_range").inside(f"[{index}]").inside(".groups")
    names = set[str]()
    for index, tool_call in enumerate(tool_calls):
        try:
            _check_tool_call(tool_call, names)
        except WrongValue as error:
            raise error.inside(f"[{index}]").inside(".tool_calls") from None
        names.add(tool_call.id)
    for index, span in enumerate(spans):
        if span.role in ("call", "observation") and not names.issuperset(span.label.split()):
            unknown = next(name for name in span.label.split() if name not in names)
            wrong = WrongValue(describe(unknown), "the id of a call of the trajectory")
            raise wrong.inside(".label").inside(f"[{index}]").inside(".spans")


def _check_tool_call(call: ToolCall, earlier: Collection[str]) -> None:
    if len(call.path) % 2 or (call.path and min(call.path) < 0):
        raise WrongValue(_short(call.path), "the path of the trunk or of a branch").inside(".path")
    if not call.id or len(call.id.split()) != 1:
        raise WrongValue(describe(call.id), "an id without blanks").inside(".id")
    if call.id in earlier:
        raise WrongValue(describe(call.id), "an id that no other call has").inside(".id")
    if call.started < 0:
        raise WrongValue(str(call.started), "0 or more").inside(".started")
    if call.ended < call.started:
        raise WrongValue(str(call.ended), f"{call.started} or more, when it started").inside(".ended")


def _check_span(span: Span, index: int, calls: int) -> None:
    for name in ("parents", "waits_for"):
        indices: tuple[int, ...] = getattr(span, name)
        if indices and (min(indices) < 0 or max(indices) >= index):
            place = next(k for k, i in enumerate(indices) if not 0 <= i < index)
            wrong = WrongValue(str(indices[place]), f"a span before span {index}")
            raise wrong.inside(f"[{place}]").inside(f".{name}")
    if span.token_ids and min(span.token_ids) < 0:
        place = next(k for k, i in enumerate(span.token_ids) if i < 0)
        raise (
            WrongValue(str(span.token_ids[place]), "a token id, 0 or more")
            .inside(f"[{place}]")
            .inside(".token_ids")
        )
    if span.path and min(span.path) < 0:
        raise WrongValue(_short(span.path), "numbers of blocks and branches, 0 or more").inside(".path")
    if span.call is not None and not 0 <= span.call < calls:
        raise WrongValue(str(span.call), f"one of the {calls} calls, from 0").inside(".call")


def _short(path: Path) -> str:
    return str(list(path)) if len(path) <= 16 else f"a path of {len(path)} numbers"
