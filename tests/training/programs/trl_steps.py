"""Steps of TRL's trainer, which compares on each the log-probabilities that TRL computes with those that the server reported.

Runs in the environment of TRL, where this package has no tests: it prints one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[3] / "examples" / "trl_grpo.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    figures = {
        name: [] for name in ("difference", "rows", "trajectories", "losses", "decoded", "forked", "versions")
    }

    class ComparingTrainer(example.BranchGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            with torch.no_grad():
                logps, *_ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, batch["completion_ids"].shape[1], batch_size=16
                )
            losses = (batch["completion_mask"] * batch["tool_mask"]).bool()
            trajectories = [example["trajectory"] for example in inputs]
            figures["difference"].append(
                float((logps - batch["sampling_per_token_logps"])[losses].abs().max())
            )
            figures["rows"].append(len(ids))
            figures["trajectories"].append(len(inputs))
            figures["losses"].append(int(losses.sum()))
            figures["decoded"].append(sum(c.output_tokens for t in trajectories for c in t.calls))
            figures["forked"].append(sum(bool(t.blocks) for t in trajectories))
            figures["versions"].append(sorted({c.weight_version for t in trajectories for c in t.calls}))
            assert batch["num_items_in_batch"] == losses.sum()
            return batch

    options = example.read_options(__doc__)
    with tempfile.TemporaryDirectory() as out:
        # Two updates for each batch, with ratios to the policy that sampled, and a term for the distance from the first one.
        trainer = example.make_trainer(
            options, out, ComparingTrainer, num_iterations=2, beta=0.01,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=2,
        )  # fmt: skip
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    lines = [line for line in trainer.state.log_history if "reward" in line]
    figures["steps"] = trainer.state.global_step
    figures["rewards"] = [line["reward"] for line in lines]
    figures["branch_rows"] = [line["branch_rows"] for line in lines]
    figures["moved"] = float((after - before).norm())
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
