"""Groups of workers in a trajectory: what each token saw, round trips, and structures that refuse them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest

import sgl_apr as apr
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.spans import Span
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.trajectory.worker_groups import GroupRecord

PROMPT = 5


def group_of(workers: list[tuple[int, int, int]], kind: str = "group_think") -> Trajectory:
    """A group of workers, each with tokens of its header, of its text, and of its text with an end of text."""
    ids = count()
    spans = [Span("prompt", "prompt", "p" * PROMPT, tuple(next(ids) for _ in range(PROMPT)), ())]
    calls = []
    for number, (header, own, read) in enumerate(workers, 1):
        for role, origin, tokens in (("header", "injected", header), ("body", "decoded", own)):
            parents = (0,) if role == "header" else (len(spans) - 1,)
            call = len(calls) if role == "body" else None
            text = "x" * tokens
            spans.append(
                Span(role, origin, text, tuple(next(ids) for _ in text), parents, (1, number), call=call)  # type: ignore[arg-type]
            )
        calls.append(Call("branch", (1, number), PROMPT + header, PROMPT, header, read, 0.0, 1.0))
    return Trajectory(tuple(spans), kind, tuple(calls), groups=(GroupRecord((1,), kind, 9),))  # type: ignore[arg-type]


def simulated(workers: list[tuple[int, int, int]]) -> list[list[int]]:
    """What each decoded token saw, by running the steps."""
    visible = PROMPT + sum(header for header, _, _ in workers)
    seen: list[list[int]] = [[] for _ in workers]
    for step in range(max(read for _, _, read in workers)):
        for own, (_, tokens, _) in zip(seen, workers, strict=True):
            if step < tokens:
                own.append(visible)
        visible += sum(step < read for _, _, read in workers)
    return seen


@pytest.mark.parametrize(
    "workers",
    [
        [(1, 3, 3), (1, 3, 3)],
        [(2, 4, 5), (1, 1, 2), (3, 6, 6)],  # the second ends early, and its end of text is seen too
        [(1, 1, 1), (4, 7, 8), (1, 2, 2), (1, 5, 6)],
    ],
)
def test_what_each_token_saw(workers: list[tuple[int, int, int]]):
    trajectory = group_of(workers)
    seen = [
        own for own, span in zip(trajectory.tokens_seen, trajectory.spans, strict=True) if span.role == "body"
    ]
    expected = simulated(workers)
    assert [list(own) for own in seen] == expected
    m = trajectory.metrics()
    assert m.decoded_tokens == sum(tokens for _, tokens, _ in workers)
    assert m.seen_tokens == sum(map(sum, expected))
    assert m.longest_context == max(map(max, expected)) + 1
    assert m.critical_path == max(header + tokens for header, tokens, _ in workers), (
        "that of the longest worker"
    )
    assert m.mean_context == m.seen_tokens / m.decoded_tokens


def test_without_a_group_a_token_sees_what_is_before_it():
    workers = [(2, 3, 3), (1, 4, 4)]
    trajectory = replace(group_of(workers), groups=())
    seen = [list(own) for own in trajectory.tokens_seen]
    assert seen[2] == [PROMPT + 2 + k for k in range(3)]
    assert seen[4] == [PROMPT + 1 + k for k in range(4)]
    assert trajectory.metrics().seen_tokens == sum(seen[2]) + sum(seen[4])
    assert trajectory.metrics().longest_context == PROMPT + 1 + 4


def test_it_survives_json():
    trajectory = group_of([(1, 3, 3), (2, 2, 3)], "hogwild")
    assert Trajectory.from_json(trajectory.to_json()) == trajectory


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"path": [2]}, r"groups\[0\].path: expected the path of a block"),
        ({"kind": "crowd"}, r"groups\[0\].kind: expected group_think or hogwild"),
        ({"position_range": -1}, r"groups\[0\].position_range: expected 0 or more"),
    ],
)
def test_json_of_other_groups_is_refused(change: dict, place: str):
    data = json.loads(group_of([(1, 1, 1)]).to_json())
    data["groups"][0] |= change
    with pytest.raises(apr.TraceError, match=place):
        Trajectory.from_dict(data)


def test_structures_without_a_shared_view_refuse_it():
    from sgl_apr.training.training_tree import build_training_tree

    trajectory = group_of([(1, 3, 3), (1, 3, 3)])
    with pytest.raises(
        apr.SharedViewUnsupported, match=r"block \(1,\) is a group of workers \(group_think\)"
    ):
        apr.causality(trajectory)
    with pytest.raises(apr.SharedViewUnsupported, match="which a training tree cannot express"):
        build_training_tree([trajectory])
    build_training_tree([replace(trajectory, groups=())])
