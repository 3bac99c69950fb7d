"""The parts of OpenAI's responses that describe a trajectory: usage, finish reason and structure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sgl_apr.server.api.openai.reply import answer_tokens
from sgl_apr.trajectory.blocks import Block
from sgl_apr.trajectory.trajectory import Trajectory


def finish_reason(trajectory: Trajectory, *, is_stopped: bool = False) -> str:
    """Return OpenAI's finish reason: "length" if a limit cut the trunk, else "stop".

    Args:
        trajectory: The trajectory.
        is_stopped: Whether a stop string ended the content before that.
    """
    is_cut = trajectory.finish in ("length", "timeout", "aborted")
    return "length" if is_cut and not is_stopped else "stop"


def usage(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return OpenAI's usage object for the choices of a response, with our own counts in `apr`.

    `completion_tokens` are all tokens after the prompt, including those of branches and injected ones, and
    `completion_tokens_details.reasoning_tokens` those of them before the answer. Both are sums over the choices. The
    prompt counts once. `prompt_tokens_details.cached_tokens` are its tokens that were cached before the first choice.
    `apr.cached` and `apr.reprefilled` are sums over all requests to the engine, so they count a shared prefix once per
    request. `apr.critical_path` is the longest one of the choices.
    """
    metrics = [trajectory.metrics() for trajectory in trajectories]
    first = trajectories[0]
    prompt = sum(span.tokens for span in first.spans if span.origin == "prompt")
    cached = first.calls[0].cached_tokens if first.calls else None
    total = sum(one.total for one in metrics)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": total,
        "total_tokens": prompt + total,
        "prompt_tokens_details": {"cached_tokens": min(cached or 0, prompt)},
        "completion_tokens_details": {"reasoning_tokens": total - sum(map(answer_tokens, trajectories))},
        "apr": {
            "total": total,
            "critical_path": max(one.critical_path for one in metrics),
            "cached": sum(one.cached_tokens for one in metrics),
            "reprefilled": sum(one.reprefilled_tokens for one in metrics),
            "forks": sum(one.blocks for one in metrics),
        },
    }


def trajectory_summary(trajectory: Trajectory, *, include_trajectory: bool = False) -> dict[str, Any]:
    """Return the field `apr` of a response: structure, joins, limits and metrics of the trajectory."""
    metrics = trajectory.metrics()
    summary = {
        "dialect": trajectory.dialect,
        "finish": trajectory.finish,
        "blocks": [_block_summary(trajectory, block) for block in trajectory.blocks],
        "joins": [asdict(join) for join in trajectory.joins],
        "limits": [asdict(limit) for limit in trajectory.limits],
        "metrics": {
            **{name: value for name, value in asdict(metrics).items() if name != "phases"},
            "acceleration": metrics.acceleration,
            "parallelism": metrics.parallelism,
        },
        "seed": trajectory.seed,
        "seeds_honoured": trajectory.seeds_honoured,
        "tokens_shared": trajectory.tokens_shared,
    }
    if include_trajectory:
        summary["trajectory"] = json.loads(trajectory.to_json())
    return summary


def _block_summary(trajectory: Trajectory, block: Block) -> dict[str, Any]:
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
