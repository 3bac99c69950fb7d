"""TRL's GRPOTrainer with a reward of this package, on Countdown problems. Run `pip install -e '.[trl]'` in the clone first.

python examples/trl_grpo.py [--model builtin] [--steps 4] [--json]

TRL samples sequentially and without a grammar, so the reward parses each reply, and a fork gets no branches. Use
`sgl-apr train grpo` to sample through the runtime and to learn from every branch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from trl import GRPOConfig, GRPOTrainer

from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems, solves
from sgl_apr.evaluation.tasks.countdown.search import extract_solution
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models import locate_model
from sgl_apr.training.rewards import gated
from sgl_apr.training.trl_verl import for_trl


def correct(answer: str, problem: str) -> bool:
    """Whether the text after the last join solves the problem."""
    return solves(Problem.parse(problem), extract_solution(answer))


def main() -> None:
    """Train for a few steps and print the mean reward of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    model = locate_model(options.model)
    texts = [p.text for p in generate_problems(8 * options.steps, "train", numbers=(3,))]
    reward = for_trl(partial(gated, parallel=0.3), correct, HfTokenizer(model), column="problem")
    with tempfile.TemporaryDirectory() as out:
        trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=[reward],
            train_dataset=Dataset.from_dict({"prompt": texts, "problem": texts}),
            args=GRPOConfig(
                output_dir=out, max_steps=options.steps, per_device_train_batch_size=32, num_generations=8,
                max_completion_length=160, learning_rate=1e-4, temperature=1.0, logging_steps=1,
                report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=options.json,
            ),
        )  # fmt: skip
        trainer.train()
    rewards = [round(line["reward"], 4) for line in trainer.state.log_history if "reward" in line]
    print(json.dumps({"steps": len(rewards), "rewards": rewards}) if options.json else f"rewards: {rewards}")


if __name__ == "__main__":
    main()
