"""TRL's GRPOTrainer on Countdown, with rollouts that fork on a running server and a reward of this package.

make trainers                                     # the environments .venv-trl and .venv-verl
sgl-apr serve --model builtin                     # in another terminal
.venv-trl/bin/python examples/trl_grpo.py --url http://127.0.0.1:30000 [--steps 4] [--json]

Every step, the server decodes the trajectories, TRL updates the policy on the rows of their trunks and branches, and the
server loads the new weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from trl import GRPOConfig

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems, solves
from sgl_apr.evaluation.tasks.countdown.search import extract_solution
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.models import locate_model
from sgl_apr.training.rewards import gated
from sgl_apr.training.trl import TrlRollouts, for_trl
from sgl_apr.training.trl_trainer import BranchGRPOTrainer


def correct(answer: str, problem: str) -> bool:
    """Whether the text after the last join solves the problem."""
    return solves(Problem.parse(problem), extract_solution(answer))


def make_trainer(
    options: argparse.Namespace, out: str, trainer_class: Any = BranchGRPOTrainer, **config: Any
) -> Any:
    """A trainer whose rollouts run on the server at `options.url`, with further fields of its configuration."""
    model = locate_model(options.model)
    texts = [p.text for p in generate_problems(4 * options.steps, "train", numbers=(4,))]
    budget = apr.Budget(tokens=1200, width=8, branch_tokens=160)
    fields: dict[str, Any] = {
        "output_dir": out, "max_steps": options.steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "num_generations": 4, "max_completion_length": 1200, "learning_rate": 1e-5, "temperature": 1.0, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    return trainer_class(
        model=model,
        rollout_func=TrlRollouts(options.url, options.dialect, budget=budget, constrain=False),
        reward_funcs=[for_trl(partial(gated, parallel=0.3), correct, HfTokenizer(model), column="problem")],
        train_dataset=Dataset.from_dict({"prompt": texts, "problem": texts}),
        args=GRPOConfig(**(fields | config)),
    )


def read_options(description: str | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="the server, which has the same weights as --model")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--dialect", default="spawn")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Train for a few steps, and print the mean reward and the rows of branches of each."""
    options = read_options(__doc__)
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(options, out)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    figures = {name: [round(line[name], 4) for line in lines] for name in ("reward", "branch_rows", "loss")}
    print(json.dumps({"steps": len(lines), **figures}) if options.json else figures)


if __name__ == "__main__":
    main()
