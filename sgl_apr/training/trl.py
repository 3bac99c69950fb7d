"""For TRL's `GRPOTrainer`: our rewards, and rollouts through our runtime. TRL is not imported; see `trl_trainer`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from sgl_apr.engine.http import HttpEngine
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.arguments import ReasonArguments
from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.loop import areason
from sgl_apr.runtime.prompts import Prompt
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.rewards import Reward
from sgl_apr.training.text_rewards import IsCorrect, reward_text
from sgl_apr.training.training_rows import build_training_rows, row_options
from sgl_apr.training.weight_sync import load_weights
from sgl_apr.trajectory.trajectory import Trajectory


def for_trl(
    reward: Reward,
    correct: IsCorrect,
    tokenizer: Tokenizer,
    dialect: Dialect | str | None = None,
    column: str = "answer",
) -> Callable[..., list[float | None]]:
    """A reward function for TRL's `GRPOTrainer(reward_funcs=...)`.

    It judges the trajectories that `TrlRollouts` made. Where TRL samples by itself, it reads the completions. TRL drops special
    tokens from its texts, and tags may be special tokens. So the ids that TRL also passes are read instead.
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
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        trajectory: Sequence[Trajectory] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        truths = columns.get(column) or [None] * len(completions)
        if trajectory is not None:
            return [reward(t, correct(t.answer, truth)) for t, truth in zip(trajectory, truths, strict=True)]
        texts = list(map(_completion_text, completions))
        for k, ids in enumerate(completion_ids or ()):
            if not _has_results(completions[k]):
                texts[k] = tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids])
        return [
            reward_text(reward, correct, text, truth, tokenizer, dialect)
            for text, truth in zip(texts, truths, strict=True)
        ]

    return score


class TrlRollouts:
    """Rollouts for TRL's `GRPOTrainer(rollout_func=...)`: trajectories that a running server decodes, forks included.

    A completion is the first row of `build_training_rows`: the trunk, with all that it has read. `env_mask` masks what was not decoded
    there. The rows of other branches are in `branch_rows`, on which `sgl_apr.training.trl_trainer.BranchGRPOTrainer` trains too;
    TRL's own `GRPOTrainer` has no place for them, and learns from the first rows only.
    Reward functions find the trajectories in the column `trajectory`.

    Before it samples, it lets the server load the weights of the trainer if there was a step since. The server begins
    with the weights that the trainer begins with, and reads them from the same file system. Nothing else may use it.

    Args:
        url: The server (`sgl-apr serve`).
        dialect: The format, as for `areason`.
        weights: The directory in which the server finds new weights; by default "weights" in the trainer's `output_dir`.
        timeout: As for `HttpEngine.connect`.
        options: Options of `areason`. The temperature is the trainer's, and `Budget(tokens=max_completion_length)` the default.
            Blocks are joined as text where the dialect has that.
            With `constrain=False` the policy that is sampled from is the one that TRL computes log-probabilities of;
            under the grammar, what the grammar excludes has none.

    Raises:
        AprError: An option is wrong.
    """

    def __init__(
        self,
        url: str,
        dialect: Dialect | str | None = None,
        *,
        weights: str | Path | None = None,
        timeout: float = 600.0,
        **options: Unpack[ReasonArguments],
    ) -> None:
        for name in ("temperature", "logprobs"):
            if name in options:
                raise AprError(f"found {name}, expected none: it is set for the trainer")
        self.url, self.dialect, self.timeout = url, dialect, timeout
        self.options = row_options(dialect, options)
        self._weights = None if weights is None else Path(weights)
        self._loaded_step = 0

    def __call__(self, prompts: list[Prompt], trainer: Any) -> dict[str, list[Any]]:
        """Decode one trajectory for each prompt; TRL repeats a prompt for a group.

        Args:
            prompts: Texts or chat messages.
            trainer: The `GRPOTrainer`.

        Returns:
            One entry for each prompt: `prompt_ids`, `completion_ids`, `logprobs` (None where nothing was decoded, or
            reported), `env_mask`, and `branch_rows` and `trajectory`, which TRL hands on.

        Raises:
            AprError: As `areason` and `build_training_rows`.
        """
        self._load_weights(trainer)
        trajectories = asyncio.run(self._sample(prompts, trainer))
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        rows = [build_training_rows(trajectory, eos=tokenizer.eos_token_id) for trajectory in trajectories]
        return {
            "prompt_ids": [list(first.prompt_ids) for first, *_ in rows],
            "completion_ids": [list(first.completion_ids) for first, *_ in rows],
            "logprobs": [list(first.logprobs) for first, *_ in rows],
            "env_mask": [list(first.mask) for first, *_ in rows],
            "branch_rows": [others for _, *others in rows],
            "trajectory": trajectories,
        }

    async def _sample(self, prompts: list[Prompt], trainer: Any) -> list[Trajectory]:
        options: dict[str, Any] = {"budget": Budget(tokens=trainer.max_completion_length), **self.options}
        options |= {"temperature": trainer.temperature, "logprobs": True}
        async with await HttpEngine.connect(self.url, timeout=self.timeout) as engine:
            return await gather([areason(engine, prompt, self.dialect, **options) for prompt in prompts])

    def _load_weights(self, trainer: Any) -> None:
        """Let the server load the trainer's weights, if it made a step since they were loaded.

        Each process of a distributed run takes part: sharded weights are gathered, and the first process writes them.
        """
        step = trainer.state.global_step
        if step == self._loaded_step:
            return
        if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
            raise AprError(
                "the trainer saves an adapter, which the server cannot load as weights: expected a model without adapters"
            )
        path = self._weights or Path(trainer.args.output_dir) / "weights"
        trainer.accelerator.wait_for_everyone()  # also for trajectories of others
        trainer.save_model(str(path), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            asyncio.run(load_weights(self.url, path, str(step)))
        trainer.accelerator.wait_for_everyone()
        self._loaded_step = step


def _has_results(completion: Any) -> bool:
    """Whether a completion of chat messages has results of tools."""
    return not isinstance(completion, str) and any(m.get("role") == "tool" for m in completion)


def _completion_text(completion: Any) -> str:
    """The text of a completion. Of chat messages it is that of the assistant; one that only calls tools has none."""
    if isinstance(completion, str):
        return completion
    return "".join(str(m.get("content") or "") for m in completion if m.get("role") != "tool")
