"""Forks a warm context: several tasks after one prompt, answered at once over one committed prefix, and merged."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, KvJoinUnavailable
from sgl_apr.methods.fork_prompts import ForkPrompts, PromptRenderer
from sgl_apr.methods.fork_result import ForkResult
from sgl_apr.methods.fork_run import ForkRun
from sgl_apr.methods.fork_task import ForkTask, Merge, TaskPrompt, make_merge, make_tasks
from sgl_apr.methods.fork_tools import ForkToolOptions
from sgl_apr.methods.method_options import check_method_options
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.runtime import telemetry
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.join_policy import POLICY_HELP, Policy, is_valid_policy
from sgl_apr.runtime.option_checks import check_function
from sgl_apr.runtime.prompts import Prompt, check_engine, check_prompt
from sgl_apr.runtime.value_checks import shorten

FORK_METHOD = "fork"  # what the trajectory has as its dialect
# Options that a task has, and a fork as a whole has not.
TASK_OPTION_NAMES = ("response_format", "stop", "max_tokens")


async def fork(
    engine: Engine,
    prompt: Prompt,
    tasks: Sequence[TaskPrompt | ForkTask],
    merge: TaskPrompt | Merge | None = None,
    *,
    policy: Policy = "all",
    budget: Budget | Mapping[str, Any] | str | None = None,
    on_event: OnEvent | None = None,
    **options: Any,
) -> ForkResult:
    """Give several tasks to a model after one prompt, and let it answer all of them at once.

    What the prompts of the tasks have in common is computed once. It needs no dialect, and no model that was trained to
    fork.

    Args:
        engine: Decodes.
        prompt: Text, token ids, or the messages of a chat.
        tasks: What each branch is to do. Text continues a prompt that is text, and becomes a user message after a chat.
            Messages follow a chat. An `apr.ForkTask` has options of its own.
        merge: What follows the branches: text or messages, before which the model reads all results, or an `apr.Merge`.
            None for nothing.
        policy: When the branches end: "all", "first", "quorum:k", "deadline:s", or a function of the branches that have
            ended. Those that still run are cut, and their results say so.
        budget: Limits of all branches and of the merge together, for which `reserve` is kept. `tokens` counts what is
            decoded and what tools return, and not the tasks themselves. `width` is how many branches run at once.
        on_event: Is called with every event. The path of branch k is `(1, k)`.
        options: Options of `areason` that concern requests, such as temperature, seed, retry and on_branch_failure, and those
            about tools (`tools`, `tool_choice`, `parallel_tool_calls`, `tool_call_parser`, `run_tool`), for tasks that have
            none of their own.

    Raises:
        AprError: The prompt, a task or an option is wrong. This is raised before anything is sent.
        BudgetExceeded: The budget or the engine's context has no room for all tasks and the merge.
        KvJoinUnavailable: The merge is to join in the KV cache, and the engine cannot.
        EngineError: The engine failed outside of the branches.
        BranchFailed: It failed a branch for good, and `on_branch_failure="raise"`.

    Examples:
        >>> result = await apr.fork(  # doctest: +SKIP
        ...     engine, messages, ["List the risks.", "List the costs."], merge="Write a summary."
        ... )
        >>> result["1"].text, result.merged  # doctest: +SKIP
    """
    tools = ForkToolOptions.pop_from(options)
    checked_tasks, checked_merge = check_fork(engine, prompt, tasks, merge, policy, on_event, options)
    prepared = await prepare_fork(engine, prompt, checked_tasks, checked_merge, tools)
    return await run_prepared_fork(prepared, policy, budget=budget, on_event=on_event, **options)


@dataclass(frozen=True, slots=True)
class PreparedFork:
    """A fork whose prompts are encoded.

    Attributes:
        engine: Decodes.
        renderer: Renders what follows the branches.
        prompts: The prompts of the branches.
        tasks: The tasks.
        merge: The merge, if there is one.
        tools: The options about tools of the fork.
    """

    engine: Engine
    renderer: PromptRenderer
    prompts: ForkPrompts
    tasks: tuple[ForkTask, ...]
    merge: Merge | None
    tools: ForkToolOptions = field(default_factory=ForkToolOptions)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts. What they have in common counts once."""
        shared = len(self.prompts.shared)
        return shared + sum(len(ids) - shared for ids in self.prompts.tasks)


async def prepare_fork(
    engine: Engine,
    prompt: Prompt,
    tasks: tuple[ForkTask, ...],
    merge: Merge | None,
    tools: ForkToolOptions | None = None,
) -> PreparedFork:
    """Encode the prompts of a fork, whose arguments are checked.

    Raises:
        AprError: A prompt cannot be rendered, or a tool cannot be used.
    """
    tools = tools or ForkToolOptions()
    renderer = PromptRenderer(engine, prompt, tools.shown_tools(tasks))
    await tools.load_syntax(engine, tasks)
    return PreparedFork(engine, renderer, await renderer.render_tasks(tasks, merge), tasks, merge, tools)


async def run_prepared_fork(
    prepared: PreparedFork,
    policy: Policy = "all",
    *,
    budget: Budget | Mapping[str, Any] | str | None = None,
    on_event: OnEvent | None = None,
    **options: Any,
) -> ForkResult:
    """Run a fork whose prompts are encoded. The arguments and exceptions are those of `fork`."""
    prompts = prepared.prompts
    async with method_session(
        prepared.engine, prompts.context, FORK_METHOD, budget=budget, on_event=on_event, **options
    ) as session:
        run = ForkRun(
            session, prompts, prepared.renderer, prepared.tasks, prepared.merge, policy, prepared.tools
        )
        try:
            result = await run.run()
        except BaseException as error:
            _export(session, error)
            raise
        _export(session, None)
        return result


def _export(session: MethodSession, error: BaseException | None) -> None:
    """Write the outcome of a fork to OpenTelemetry, if it is installed."""
    requests = session.requests
    log = requests.recorder.request_log
    tokens = sum(span.tokens for span in requests.recorder.graph.spans if span.origin != "prompt")
    telemetry.export(
        FORK_METHOD,
        log.calls,
        log.seconds,
        tool_calls=log.tool_calls,
        attributes={"apr.rid": requests.rid, "apr.tokens": tokens},
        error=error,
    )


async def stream_fork(
    engine: Engine,
    prompt: Prompt,
    tasks: Sequence[TaskPrompt | ForkTask],
    merge: TaskPrompt | Merge | None = None,
    *,
    policy: Policy = "all",
    budget: Budget | Mapping[str, Any] | str | None = None,
    **options: Any,
) -> AsyncGenerator[Event | ForkResult, None]:
    """Yield the events of `fork` as they happen, and its result last. The arguments are those of `fork`.

    Leaving the iteration early cancels all branches, at once inside `contextlib.aclosing`.

    Examples:
        >>> async for event in apr.stream_fork(engine, prompt, tasks):  # doctest: +SKIP
        ...     if isinstance(event, apr.Delta):
        ...         print(event.path, event.text)
    """

    def start(on_event: OnEvent) -> Coroutine[Any, Any, ForkResult]:
        return fork(engine, prompt, tasks, merge, policy=policy, budget=budget, on_event=on_event, **options)

    async with contextlib.aclosing(stream_events(start)) as events:
        async for event in events:
            yield event


def check_fork(
    engine: Any,
    prompt: Any,
    tasks: Any,
    merge: Any,
    policy: Any,
    on_event: Any,
    options: Mapping[str, Any],
) -> tuple[tuple[ForkTask, ...], Merge | None]:
    """Check the arguments of a fork before anything is sent, and return its tasks and its merge.

    Raises:
        AprError: One of them is wrong. The message says what was expected.
    """
    check_engine(engine)
    check_prompt(prompt)
    if isinstance(prompt, str) and not prompt:
        raise AprError("the prompt is empty, expected the context that all tasks share")
    checked_tasks, checked_merge = make_tasks(tasks), make_merge(merge)
    if not is_valid_policy(policy):
        raise AprError(f"policy={shorten(policy)}, expected {POLICY_HELP}")
    if callable(policy):
        check_function("policy", policy)
    if on_event is not None:
        check_function("on_event", on_event)
    for name in TASK_OPTION_NAMES:
        if name in options:
            raise AprError(f"no option {name!r}: each task has its own, as in apr.ForkTask(..., {name}=...)")
    check_method_options(options)
    if checked_merge and checked_merge.join == "kv" and not engine.joins_kv:
        raise KvJoinUnavailable(
            'Merge(join="kv") needs an engine that joins in its KV cache: `sgl-apr serve` starts one where that '
            'works. Merge(join="text") works everywhere'
        )
    return checked_tasks, checked_merge
