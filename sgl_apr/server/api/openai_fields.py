"""A trajectory as a client of an OpenAI-like server reads it: text, structure, usage; nothing is sent here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from sgl_apr.trajectory.blocks import Block
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Content:
    """What the client gets as text: the whole reply, or the answer behind the last join and the trace before it."""

    text: str
    reasoning: str | None = None

    @classmethod
    def of(cls, trajectory: Trajectory, separate: bool) -> Content:
        whole, answer = trajectory.text, trajectory.answer
        if not separate:
            return cls(whole)
        return cls(answer, whole[: len(whole) - len(answer)] if trajectory.blocks else None)


def finish_reason(trajectory: Trajectory) -> str:
    """In OpenAI's words, "length" for whatever a limit has cut; the structure has it exactly."""
    return "length" if trajectory.finish in ("length", "timeout", "aborted") else "stop"


def usage(trajectory: Trajectory) -> dict[str, Any]:
    """Tokens in OpenAI's words, with `apr` for what they have none for.

    completion_tokens: all that was written, branches and injected tokens included. cached_tokens: those of
    the prompt that were cached before. apr: `cached` and `reprefilled` are over all requests of the
    trajectory, and count a prefix once for each.
    """
    metrics = trajectory.metrics()
    prompt = sum(s.tokens for s in trajectory.spans if s.origin == "prompt")
    first = trajectory.calls[0].cached_tokens if trajectory.calls else None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": metrics.total,
        "total_tokens": prompt + metrics.total,
        "prompt_tokens_details": {"cached_tokens": min(first or 0, prompt)},
        "apr": {
            "total": metrics.total,
            "critical_path": metrics.critical_path,
            "cached": metrics.cached_tokens,
            "reprefilled": metrics.reprefilled_tokens,
            "forks": metrics.blocks,
        },
    }


def trajectory_summary(trajectory: Trajectory, whole: bool = False) -> dict[str, Any]:
    """What the top-level field `apr` of an answer holds; with the `whole` trajectory if asked for."""
    metrics = trajectory.metrics()
    found = {
        "dialect": trajectory.dialect,
        "finish": trajectory.finish,
        "blocks": [_block(trajectory, block) for block in trajectory.blocks],
        "joins": [asdict(join) for join in trajectory.joins],
        "limits": [asdict(limit) for limit in trajectory.limits],
        "metrics": {
            **{name: value for name, value in asdict(metrics).items() if name != "phases"},
            "acceleration": metrics.acceleration,
            "parallelism": metrics.parallelism,
        },
        "seed": trajectory.seed,
        "seeds_honoured": trajectory.seeds_honoured,
    }
    return {**found, "trajectory": json.loads(trajectory.to_json())} if whole else found


def _block(trajectory: Trajectory, block: Block) -> dict[str, Any]:
    return {
        "path": block.path,
        "conclusion": block.conclusion,
        "branches": [
            {
                "path": branch.path,
                "outline": branch.outline,
                "text": branch.text,
                "result": branch.result,
                "outcome": branch.outcome,
                "tokens": sum(trajectory.spans[i].tokens for i in branch.spans),
            }
            for branch in block.branches
        ],
    }
