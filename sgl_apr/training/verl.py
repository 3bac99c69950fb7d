"""Our rewards as verl's `compute_score`. verl is not imported; see `verl_agent_loop` for rollouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_apr.formats.dialects import Dialect
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.rewards import Reward
from sgl_apr.training.text_rewards import IsCorrect, reward_text


def for_verl(
    reward: Reward, correct: IsCorrect, tokenizer: Tokenizer, dialect: Dialect | str | None = None
) -> Callable[..., float]:
    """A `compute_score` for verl's `custom_reward_function`: (data_source, solution_str, ground_truth, extra_info).

    verl's reward managers drop special tokens from `solution_str`, so the tags must not be special tokens. A text with
    defects counts as malformed. If a model calls tools, verl passes their results in the same text: what tools return should
    have no tags. verl needs a number, so a reply that the reward drops has 0.

    Args:
        reward: One of `sgl_apr.training.rewards`.
        correct: Compares the answer of a reply with the ground truth.
        tokenizer: The model's tokenizer.
        dialect: How replies are read; by default recognized by their tags.
    """

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
    ) -> float:
        score = reward_text(reward, correct, solution_str, ground_truth, tokenizer, dialect)
        return 0.0 if score is None else score

    return compute_score
