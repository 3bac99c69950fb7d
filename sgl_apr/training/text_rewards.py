"""The reward of a reply that is there as text, as other trainers pass it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.lenient_parser import read
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.rewards import Reward, judged_trajectory

IsCorrect = Callable[[str, Any], bool]


def reward_text(
    reward: Reward,
    correct: IsCorrect,
    text: str,
    truth: Any,
    tokenizer: Tokenizer,
    dialect: Dialect | str | None,
) -> float | None:
    """The reward of a text. One with defects counts as malformed.

    Args:
        reward: One of `sgl_apr.training.rewards`.
        correct: Compares the answer of the reply, its text after the last join, with the truth.
        text: The reply.
        truth: What the dataset says.
        tokenizer: The model's tokenizer.
        dialect: How replies are read; by default recognized by their tags.
    """
    trajectory = judged_trajectory(read(text, dialect, tokenizer=tokenizer))
    return reward(trajectory, correct(trajectory.answer, truth))
