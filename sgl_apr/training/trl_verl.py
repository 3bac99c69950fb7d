"""Our rewards as TRL's reward functions and as verl's `compute_score`; neither library is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.lenient_parser import read
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.rewards import Reward, judged_trajectory

IsCorrect = Callable[[str, Any], bool]


def for_trl(
    reward: Reward,
    correct: IsCorrect,
    tokenizer: Tokenizer,
    dialect: Dialect | str | None = None,
    column: str = "answer",
) -> Callable[..., list[float | None]]:
    """A reward function for TRL's `GRPOTrainer(reward_funcs=...)`.

    TRL drops special tokens from its texts, and tags may be special tokens. So the ids that TRL also passes are read instead.
    In a completion with messages of tools, the texts of the assistant are read instead: a result that a tool returned may
    spell tags. A text with defects counts as malformed. Where the reward drops a reply, the score is None: for TRL, a score that does
    not apply. It takes 0 for a completion for which no function has a score.

    Examples:
        >>> score = for_trl(lambda trajectory, correct: float(correct), lambda answer, truth: answer == truth, None)
        >>> score(prompts=["6 * 7 = "], completions=["42"], answer=["42"])
        [1.0]

    Args:
        reward: One of `sgl_apr.training.rewards`.
        correct: Compares the answer of a reply, its text after the last join, with the dataset's.
        tokenizer: The model's tokenizer.
        dialect: How replies are read; by default recognized by their tags.
        column: The dataset's column of answers.
    """

    def score(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float | None]:
        truths = columns.get(column) or [None] * len(completions)
        texts = list(map(_completion_text, completions))
        for k, ids in enumerate(completion_ids or ()):
            if not _has_results(completions[k]):
                texts[k] = tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids])
        return [
            _reward_text(reward, correct, text, truth, tokenizer, dialect)
            for text, truth in zip(texts, truths, strict=True)
        ]

    return score


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
        score = _reward_text(reward, correct, solution_str, ground_truth, tokenizer, dialect)
        return 0.0 if score is None else score

    return compute_score


def _reward_text(
    reward: Reward,
    correct: IsCorrect,
    text: str,
    truth: Any,
    tokenizer: Tokenizer,
    dialect: Dialect | str | None,
) -> float | None:
    trajectory = judged_trajectory(read(text, dialect, tokenizer=tokenizer))
    return reward(trajectory, correct(trajectory.answer, truth))


def _has_results(completion: Any) -> bool:
    """Whether a completion of chat messages has results of tools."""
    return not isinstance(completion, str) and any(m.get("role") == "tool" for m in completion)


def _completion_text(completion: Any) -> str:
    """The text of a completion. Of chat messages it is that of the assistant; one that only calls tools has none."""
    if isinstance(completion, str):
        return completion
    return "".join(str(m.get("content") or "") for m in completion if m.get("role") != "tool")
