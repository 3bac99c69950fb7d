"""verl's agent loop by our runtime. Importing this module imports verl.

It does not register the loop, which would replace the entry of the configuration file that names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

from sgl_apr.engine.http import HttpEngine
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.loop import areason
from sgl_apr.training.training_rows import TrainingRow, build_training_rows, row_options
from sgl_apr.trajectory.trajectory import Trajectory

Score = Callable[[Trajectory, Any], float]

_engines: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Task[HttpEngine]]] = (
    WeakKeyDictionary()
)


class BranchAgentLoop(AgentLoopBase):  # type: ignore[misc]  # verl has no types
    """Trajectories that an SGLang server decodes, forks included, as the outputs of an agent loop.

    verl makes one loop for each sample, of an entry in the file of `rollout.agent.agent_loop_config_path`. Its `run` returns one
    output for each row of `build_training_rows`, the trunk last: verl's trainer computes the reward and the advantage of a
    sample from its last output, and gives them to the others. A decoded token whose log-probability the server did not report,
    since the request was aborted, is masked.

    Args:
        args: Passed on to verl's base class.
        url: The server, if verl does not start it. By default it is the one that verl's load balancer names, an SGLang server
            which verl gives the weights of every step. It needs `grammar_backend: llguidance` in `rollout.engine_kwargs.sglang`.
        dialect: The format, as for `areason`.
        options: Options of `areason`. Temperature, `top_p` and `top_k` are those of verl's configuration, and
            `Budget(tokens=response_length)` the default. Blocks are joined as text where the dialect has that.
        score: Computes the reward from a trajectory and the sample's `reward_model["ground_truth"]`. Without it, verl computes one
            from the text of the trunk.
        branch_rows: Return the rows of branches, too. verl's older trainer (`main_ppo_v0`) takes one output only.
        kwargs: Passed on to verl's base class.

    Raises:
        AprError: An option is wrong.
    """

    def __init__(
        self,
        *args: Any,
        url: str | None = None,
        dialect: str | None = None,
        options: Mapping[str, Any] | None = None,
        score: Score | None = None,
        branch_rows: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        given: Any = OmegaConf.to_container(options) if OmegaConf.is_config(options) else options
        budget = Budget(tokens=self.rollout_config.response_length)
        self.options = row_options(dialect, {"budget": budget, **(given or {})})
        self.url, self.dialect, self.score, self.branch_rows = url, dialect, score, branch_rows

    async def run(
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Decode one trajectory.

        Args:
            sampling_params: verl's `temperature`, `top_p`, `top_k`, `repetition_penalty` and `logprobs`.
            kwargs: The sample: `raw_prompt`, and what the dataset has.

        Raises:
            AprError: As `areason` and `build_training_rows`.
        """
        ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        async with self._engine() as engine:
            trajectory = await areason(
                engine, tuple(ids), self.dialect, **self.options, **{**sampling_params, "logprobs": True}
            )
        trunk, *others = build_training_rows(trajectory, eos=self.tokenizer.eos_token_id)
        steps = _weight_steps(trajectory, int(kwargs.get("global_steps") or 1))
        outputs = [self._output(row, trajectory, steps) for row in (*others, trunk)]
        if self.score is not None:
            truth = (kwargs.get("reward_model") or {}).get("ground_truth")
            outputs[-1].reward_score = self.score(trajectory, truth)
        return outputs if self.branch_rows else outputs[-1]

    def _output(self, row: TrainingRow, trajectory: Trajectory, steps: list[int]) -> AgentLoopOutput:
        metrics = trajectory.metrics()
        return AgentLoopOutput(
            prompt_ids=list(row.prompt_ids),
            response_ids=list(row.completion_ids),
            response_mask=[
                int(loss and x is not None) for loss, x in zip(row.mask, row.logprobs, strict=True)
            ],
            response_logprobs=[0.0 if x is None else x for x in row.logprobs],
            num_turns=2,
            metrics={},
            extra_fields={
                "turn_scores": [],
                "tool_rewards": [],
                "min_global_steps": min(steps),
                "max_global_steps": max(steps),
                "reward_extra_info": {
                    "branches": metrics.branches,
                    "decoded_tokens": sum(call.output_tokens for call in trajectory.calls),
                    "total_tokens": metrics.total,
                    "critical_path": metrics.critical_path,
                },
            },
        )

    @asynccontextmanager
    async def _engine(self) -> AsyncIterator[HttpEngine]:
        """The engine of the configured server, or of the one that verl's load balancer chooses for this trajectory."""
        if self.url is not None:
            yield await _connected(self.url)
            return
        request = uuid4().hex
        address, _ = await self.server_manager._acquire_server(request)
        try:
            yield await _connected(f"http://{address}")
        finally:
            self.server_manager._release_server(address, request)


def _weight_steps(trajectory: Trajectory, step: int) -> list[int]:
    """After which of verl's steps the weights were made that wrote a trajectory: before `step`, unless the server says more."""
    versions = [call.weight_version or "" for call in trajectory.calls]
    return [int(v) for v in versions] if versions and all(v.isdigit() for v in versions) else [step - 1]


async def _connected(url: str) -> HttpEngine:
    """The engine of a server, connected once for each event loop: verl makes a new agent loop for every sample."""
    engines = _engines.setdefault(asyncio.get_running_loop(), {})
    if url not in engines or (engines[url].done() and engines[url].exception()):
        engines[url] = asyncio.ensure_future(HttpEngine.connect(url, timeout=600))
    return await asyncio.shield(engines[url])
