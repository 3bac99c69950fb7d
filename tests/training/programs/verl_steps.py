"""Steps of verl on a CPU, by its own code: agent loop workers, TransferQueue, log-probabilities, advantages, updates.

What verl cannot do here is left out: it starts its rollout servers on GPUs only, and its worker groups want one each. So a
server that runs already stands in its load balancer, and its actor worker is in this process. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
os.environ |= {"MASTER_PORT": "0", "TRANSFER_QUEUE_ENABLE": "1"}
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # without one, Ray writes one into the home directory

import asyncio  # noqa: E402

import ray  # noqa: E402
import torch  # noqa: E402
import transfer_queue as tq  # noqa: E402
import verl_cpu_platform  # noqa: E402, F401  # before anything asks verl for its platform
from hydra import compose, initialize_config_module  # noqa: E402
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size  # noqa: E402
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ  # noqa: E402
from verl.trainer.ppo.v1.trainer_base import PPOTrainer  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import HFModelConfig, TrainingWorkerConfig  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.rollout.llm_server import LLMServerClient  # noqa: E402
from verl.workers.rollout.router import get_router_handle  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from sgl_apr.evaluation.tasks.countdown.problems import generate_problems  # noqa: E402
from sgl_apr.training.weight_sync import load_weights  # noqa: E402

PROMPTS, GROUP, MINI_BATCH = 4, 2, 8
FLOAT32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
OVERRIDES = (
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision=" + FLOAT32,
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.model_dtype=float32",
    "actor_rollout_ref.actor.fsdp_config.dtype=float32",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.optim.lr=1e-4",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI_BATCH}",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.name=sglang",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    f"actor_rollout_ref.rollout.n={GROUP}",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "actor_rollout_ref.rollout.agent.default_agent_loop=sgl_apr",
    "actor_rollout_ref.rollout.calculate_log_probs=true",
    "data.max_prompt_length=64",
    "data.max_response_length=1200",
    "algorithm.adv_estimator=grpo",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
)


class InProcessActor:
    """verl's actor worker, called as verl's trainer calls its group of workers."""

    def __init__(self, config) -> None:
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        engine = actor.engine
        engine.use_dynamic_bsz = False
        engine.micro_batch_size_per_gpu = engine.infer_micro_batch_size_per_gpu = 8
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model, dataclass_type=HFModelConfig)
        torch.distributed.init_process_group(
            "gloo", rank=0, world_size=1, init_method=f"file://{tempfile.mktemp()}"
        )
        self.worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=model,
                engine_config=engine,
                optimizer_config=actor.optim,
                checkpoint_config=actor.checkpoint,
            )
        )
        self.worker.reset()
        self.worker.set_loss_fn(partial(ppo_loss, config=actor))
        self.tokenizer = model.tokenizer

    def compute_log_prob(self, batch):
        return self.worker.infer_batch(batch)

    def update_actor(self, batch):
        return self.worker.train_mini_batch(batch)

    def save(self, path: Path, start: Path) -> None:
        """Save what the server loads."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        weights, _ = self.worker.engine.get_per_tensor_param()
        model.load_state_dict(dict(weights), strict=False)
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def parameters(self) -> torch.Tensor:
        weights, _ = self.worker.engine.get_per_tensor_param()
        return torch.cat([p.detach().flatten().clone() for _, p in weights])


class CpuTrainer(PPOTrainer):
    """The steps of verl's trainer after sampling, without the workers that it would start on GPUs."""

    def __init__(self, config, actor: InProcessActor) -> None:
        self.config, self.actor_rollout_wg, self.global_steps = config, actor, 1

    def on_sample_end(self):
        pass

    def on_step_end(self):
        pass


def submit(manager, trainer: PPOTrainer, texts: list[str]) -> list[str]:
    """Let verl's agent loops sample, and return the keys of the prompts."""
    uids = [f"step{trainer.global_steps}prompt{k}" for k in range(len(texts))]
    objects = np.empty(len(texts), dtype=object)
    objects[:] = [[{"role": "user", "content": text}] for text in texts]
    truths = np.empty(len(texts), dtype=object)
    truths[:] = [{"ground_truth": text} for text in texts]
    batch = tu.get_tensordict(
        {
            "uid": np.array(uids, dtype=object),
            "raw_prompt": objects,
            "reward_model": truths,
            "index": np.array([str(k) for k in range(len(texts))], dtype=object),
        }
    )
    tu.assign_non_tensor_data(batch, "global_steps", trainer.global_steps)
    tags = [{"is_prompt": True, "status": "pending", "global_steps": trainer.global_steps} for _ in texts]
    tq.kv_batch_put(keys=uids, partition_id="train", tags=tags)
    manager.generate_sequences(batch)
    return uids


def collect(uids: list[str]):
    """Wait for the samples, and return their rows, as verl's replay buffer does."""
    from transfer_queue import KVBatchMeta

    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        found = (tq.kv_list() or {}).get("train", {})
        states = [found.get(uid, {}).get("status") for uid in uids]
        if "failure" in states:
            sys.exit("an agent loop failed")
        if all(state == "finished" for state in states):
            keys = sorted(key for key in found if key.rpartition("_")[0].rpartition("_")[0] in uids)
            return KVBatchMeta(partition_id="train", keys=keys, tags=[found[key] for key in keys])
        time.sleep(0.5)
    sys.exit("the agent loops did not end in time")


def step(trainer: CpuTrainer, batch, figures: dict) -> None:
    metrics: dict = {}
    fields = ["response_mask", "rollout_log_probs", "uid"]
    sampled = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
    figures["rows"].append(len(batch.keys))
    figures["samples"].append(len({key.rpartition("_")[0] for key in batch.keys}))
    figures["losses"].append(int(sum(mask.sum() for mask in sampled["response_mask"])))
    figures["versions"].append(sorted({tag["min_global_steps"] for tag in batch.tags}))
    scores = tq.kv_batch_get(
        keys=batch.keys, partition_id="train", select_fields=["rm_scores", "extra_fields"]
    )
    figures["rewards"].append(float(np.mean([float(s.sum()) for s in scores["rm_scores"]])))
    decoded = {}  # by sample
    for key, extra in zip(batch.keys, scores["extra_fields"], strict=True):
        fields = getattr(extra, "data", extra)
        decoded[key.rpartition("_")[0]] = fields["reward_extra_info"]["decoded_tokens"]
    figures["decoded"].append(sum(decoded.values()))
    batch = upsample_batch_to_divisible_size(
        batch, MINI_BATCH * GROUP, trainer.actor_rollout_wg.tokenizer.eos_token_id
    )
    batch.extra_info["temperature"] = 1.0
    batch = trainer._compute_old_log_prob(batch, metrics)
    computed = tq.kv_batch_get(
        keys=batch.keys,
        partition_id="train",
        select_fields=["old_log_probs", "rollout_log_probs", "response_mask"],
    )
    differences = [
        (old - reported)[mask.bool()].abs()
        for old, reported, mask in zip(
            computed["old_log_probs"], computed["rollout_log_probs"], computed["response_mask"], strict=True
        )
    ]
    figures["difference"].append(float(torch.cat(differences).max()))
    figures["verl_difference"].append(metrics.get("training/rollout_probs_diff_max"))
    batch = trainer._compute_advantage(batch, metrics)
    advantages = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])[
        "advantages"
    ]
    figures["advantages"].append(float(max(a.abs().max() for a in advantages)))
    trainer._update_actor(batch, metrics)
    figures["grad_norm"].append(float(np.mean(metrics["actor/grad_norm"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--loops", default=str(ROOT / "examples" / "verl_agent_loop.yaml"))
    options = parser.parse_args()
    names = (
        "rows",
        "samples",
        "losses",
        "decoded",
        "versions",
        "rewards",
        "difference",
        "verl_difference",
        "advantages",
        "grad_norm",
    )
    figures: dict = {name: [] for name in names}
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                *OVERRIDES,
                f"actor_rollout_ref.model.path={options.model}",
                f"actor_rollout_ref.rollout.agent.agent_loop_config_path={options.loops}",
            ],
        )
    config.actor_rollout_ref.model.custom_chat_template = template
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=True,
        runtime_env={
            "env_vars": {"PYTHONPATH": path, "TRANSFER_QUEUE_ENABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        },
    )
    tq.init(config.transfer_queue)
    address = options.url.removeprefix("http://")
    client = LLMServerClient(config, load_balancer_handle=get_router_handle(servers={address: None}))
    manager = AgentLoopManagerTQ.create(config, client)
    trainer = CpuTrainer(config, InProcessActor(config))
    before = trainer.actor_rollout_wg.parameters()
    problems = [p.text for p in generate_problems(PROMPTS * options.steps, "train", numbers=(4,))]
    with tempfile.TemporaryDirectory() as weights:
        for number in range(options.steps):
            uids = submit(manager, trainer, problems[number * PROMPTS : (number + 1) * PROMPTS])
            step(trainer, collect(uids), figures)
            trainer.actor_rollout_wg.save(Path(weights), options.model)
            asyncio.run(load_weights(options.url, Path(weights), str(trainer.global_steps)))
            trainer.global_steps += 1
    figures["moved"] = float((trainer.actor_rollout_wg.parameters() - before).norm())
    ray.shutdown()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
