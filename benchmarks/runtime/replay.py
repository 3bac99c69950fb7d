"""Decode the branches of a trajectory again, one after another, to measure what parallel decoding gained."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from sgl_apr.engine.base import Engine, Request
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Replay:
    """Times for the same branch tokens.

    Attributes:
        parallel_s: Seconds in parallel, from the record of the original run.
        serial_s: Seconds with one branch after another.
        tokens: Number of tokens.
    """

    parallel_s: float
    serial_s: float
    tokens: int


async def replay_serially(engine: Engine, trajectory: Trajectory) -> Replay:
    """Decode each branch of a trajectory again, alone and token for token, after the same cached prefix.

    A grammar of single tokens leaves the model one choice per step, so the work is the same and only the order differs.
    Both times run from the first branch request of a block to its last.
    """
    parallel = serial = 0.0
    tokens = 0
    for block in trajectory.blocks:
        calls = [trajectory.calls[c] for c in _calls(trajectory, block.path)]
        if not calls:
            continue
        parallel += max(c.ended for c in calls) - min(c.started for c in calls)
        for branch in block.branches:
            first = min(i for i in branch.spans if trajectory.spans[i].call is not None)
            context = _context(trajectory, first)
            ids = tuple(
                t
                for i in branch.spans
                if trajectory.spans[i].origin == "decoded"
                for t in trajectory.spans[i].token_ids or ()
            )
            forced = "start: " + " ".join(f"<[{t}]>" for t in ids) + "\n"
            request = Request(f"apr-{uuid.uuid4().hex}", context, len(ids), {"temperature": 0}, forced)
            started = time.monotonic()
            result = await engine.decode(request)
            serial += time.monotonic() - started
            tokens += len(result.token_ids)
    return Replay(parallel, serial, tokens)


def _calls(trajectory: Trajectory, block: tuple[int, ...]) -> list[int]:
    return [i for i, c in enumerate(trajectory.calls) if c.phase == "branch" and c.path[:-1] == block]


def _context(trajectory: Trajectory, index: int) -> tuple[int, ...]:
    """The ids that a span was decoded after: its ancestors, in the order of the text."""
    return tuple(t for i in trajectory.ancestors(index)[:-1] for t in trajectory.spans[i].token_ids or ())
