#!/usr/bin/env bash
# verl's trainer with rollouts through the runtime, on a machine with GPUs:
#
#   pip install 'verl[sglang]==0.9.1' && pip install --no-deps -e .
#   MODEL=path-or-hub-id TRAIN=train.parquet TEST=test.parquet bash examples/verl_grpo.sh trainer.n_gpus_per_node=8
#
# Rows of the files have `prompt` (chat messages), `data_source`, and `reward_model` with `ground_truth`. Further arguments replace entries of
# verl's configuration. verl starts the SGLang servers and gives them new weights; the agent loop talks to them over HTTP.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # for examples.verl_reward
exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="${TRAIN:-train.parquet}" \
    data.val_files="${TEST:-test.parquet}" \
    data.max_response_length=4096 \
    actor_rollout_ref.model.path="${MODEL:-model}" \
    actor_rollout_ref.rollout.name=sglang \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.skip_tokenizer_init=false \
    +actor_rollout_ref.rollout.engine_kwargs.sglang.grammar_backend=llguidance \
    actor_rollout_ref.rollout.agent.default_agent_loop=sgl_apr \
    actor_rollout_ref.rollout.agent.agent_loop_config_path=examples/verl_agent_loop.yaml \
    "$@"
