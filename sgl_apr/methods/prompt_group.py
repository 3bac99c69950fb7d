"""Lets workers decode as one group after any prompt, each after a header of its own, without a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.collaborative import runs_exactly
from sgl_apr.methods.group_run import GroupRun
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.session import method_session
from sgl_apr.runtime.prompts import Prompt as PromptInput
from sgl_apr.runtime.prompts import check_engine
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.trajectory.worker_groups import GroupKind

MAX_WORKERS = 64  # of the server's
MAX_STEP_END = 64  # characters


async def decode_group(
    engine: Engine,
    prompt: PromptInput,
    kind: GroupKind,
    headers: Sequence[str],
    *,
    step_end: str | None = None,
    **options: Any,
) -> Trajectory:
    """Let workers decode as one group after a prompt: each token sees the tokens of all workers so far.

    The methods `group_think` and `hogwild` make the prompt and the headers of a task, stop when enough workers have an
    answer, and vote. This is the group alone, until all workers have ended or at the budget.

    Args:
        engine: The engine. It decodes groups of this kind (`Engine.groups`).
        prompt: Text, token ids, or chat messages: what all workers share.
        kind: "group_think" or "hogwild".
        headers: What each worker begins with, such as its name. No text is empty.
        step_end: Text that ends a step of Hogwild!, such as two line ends. None if no step ends.
        options: Those of `MethodSession`: budget, on_event, seed, retry, sampling parameters and so on.

    Returns:
        The trajectory. Its one block has a branch for each worker.

    Raises:
        AprError: An argument is wrong.
        UnsupportedEngine: The engine does not decode groups of this kind.
        EngineError: The group failed for good, and failed branches are to raise.
    """
    check_engine(engine)
    check_group(kind, headers, step_end)
    runs_exactly(engine, kind, True, options)
    async with method_session(engine, prompt, kind, **options) as session:
        width = session.affordable_width(len(headers))
        prompts = [Prompt(header) for header in headers[:width]]
        await GroupRun(session, engine, kind, prompts, step_end=step_end, is_enough=lambda _: False).run()
        return session.finish()


def check_group(kind: Any, headers: Any, step_end: Any) -> None:
    """Check the arguments of a group.

    Raises:
        AprError: One is wrong.
    """
    if kind not in get_args(GroupKind):
        raise AprError(f"the group has the kind {shorten(kind)}, expected {' or '.join(get_args(GroupKind))}")
    if isinstance(headers, str) or not isinstance(headers, Sequence) or not 1 <= len(headers) <= MAX_WORKERS:
        raise AprError(
            f"headers={shorten(headers)}, expected a list of 1 to {MAX_WORKERS} texts, one for each worker"
        )
    for number, header in enumerate(headers, 1):
        if not (isinstance(header, str) and header):
            raise AprError(f"header {number} is {shorten(header)}, expected text that is not empty")
    if step_end is None:
        return
    if kind != "hogwild" or not isinstance(step_end, str) or not 1 <= len(step_end) <= MAX_STEP_END:
        raise AprError(
            f"step_end={shorten(step_end)} of a group of kind {kind}, expected a text of 1 to {MAX_STEP_END} characters, and "
            "only for hogwild"
        )
