"""Rewards of this package for verl: of a trajectory, for the agent loop, or of a text.

actor_rollout_ref.rollout.agent.agent_loop_config_path=examples/verl_agent_loop.yaml     # the agent loop and `make_score`
custom_reward_function.path=examples/verl_reward.py custom_reward_function.name=compute_score

python examples/verl_reward.py     # prints the rewards of some replies, without verl
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.problems import Problem, solves
from sgl_apr.evaluation.tasks.countdown.search import extract_solution
from sgl_apr.training.rewards import gated
from sgl_apr.training.verl import for_verl


def correct(answer: str, problem: str) -> bool:
    """Whether the text after the last join solves the problem."""
    return solves(Problem.parse(problem), extract_solution(answer))


def make_score(parallel: float = 0.3) -> Callable[[apr.Trajectory, str], float]:
    """The score of the agent loop: it gets what the runtime recorded, with `reward_model.ground_truth` of the sample.

    Args:
        parallel: Weight of the parallel term.
    """
    return lambda trajectory, problem: gated(
        trajectory, correct(trajectory.answer, problem), parallel=parallel
    )


SPAWN = apr.dialect("spawn")
compute_score = for_verl(partial(gated, parallel=0.3), correct, apr.ByteTokenizer(SPAWN.tags), SPAWN)

REPLIES = (
    "\n 4+ 5= 9, 19> 28 10\n 5- 4= 1, 19> 20! 5- 4= 1, 1+ 19= 20",
    "<Spawn>\n<Message>1:> 4+ 5= 9; 20: 9 19</Message>\n<Message>2:> 5- 4= 1; 20: 1 19</Message>\n</Spawn><Join>\n"
    "<Result>1:?</Result>\n<Result>2:! 5- 4= 1, 1+ 19= 20</Result>\n</Join>\n! 5- 4= 1, 1+ 19= 20",
    "\n 4+ 5= 9, 19> 28 10! 4+ 5= 9, 9+ 19= 20",
)

if __name__ == "__main__":
    for reply in REPLIES:
        print(f"{compute_score('countdown', reply, ' 20: 4 5 19', None):.3f}  {reply[:60]!r}")
