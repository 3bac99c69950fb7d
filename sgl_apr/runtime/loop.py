"""Reasoning over any engine: one prompt, its events as a stream, or a blocking call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Unpack

from sgl_apr.engine.base import Engine
from sgl_apr.errors import KvJoinUnavailable
from sgl_apr.formats.dialects import Dialect
from sgl_apr.formats.masks.tool_checks import check_answer_schema
from sgl_apr.runtime.activity import Activity
from sgl_apr.runtime.arguments import ReasonArguments
from sgl_apr.runtime.branch_group import first_error
from sgl_apr.runtime.engine_cleanup import abort_requests
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.option_checks import check_function
from sgl_apr.runtime.options import ReasonOptions, check_call, make_options
from sgl_apr.runtime.prompts import (
    Prompt,
    check_engine,
    check_prompt,
    encode_prompt,
    layout_of_prompt,
    vocab_size,
)
from sgl_apr.runtime.reasoning_run import ReasoningRun
from sgl_apr.runtime.tools.rules import load_syntax
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout
from sgl_apr.trajectory.trajectory import Trajectory


async def areason(
    engine: Engine,
    prompt: Prompt,
    dialect: Dialect | str | None = None,
    *,
    on_event: OnEvent | None = None,
    **options: Unpack[ReasonArguments],
) -> Trajectory:
    """Let a model answer a prompt, forking and joining as it decides.

    Args:
        engine: Decodes.
        prompt: Text, token ids that are sent as they are, or chat messages in OpenAI's form, which the chat template of
            the model renders. `apr.next_turn` makes the token ids of the next turn of a conversation.
        dialect: The format. Without one it is the one whose tags the tokenizer has, else "threadweaver".
        on_event: Called with every event as it happens. See `sgl_apr.runtime.events`.
        options: The fields of `ReasonOptions`, and sampling parameters (temperature, top_p, ...). `budget`, `pacing`
            and `retry` may be mappings, such as `budget={"width": 2}`.

    Raises:
        AprError: An option or the prompt is wrong. This is raised before anything is sent.
        EngineError: The engine failed for good, where no branch is to blame or failed branches are to raise. All other
            requests of the trajectory are aborted before.
        BudgetExceeded: A fork that has to come does not fit into the budget, or the prompt does not fit into the
            engine's context. A budget above that context is cut to it.
        UnsupportedEngine: There are chat messages, and the model has no chat template.
    """
    check_engine(engine)
    checked = make_options(dialect, engine.tokenizer, vocab_size(engine), **options)
    if on_event is not None:
        check_function("on_event", on_event)
    ids = await encode_prompt(engine, prompt, checked.chat_tools)
    return await run_with_options(engine, ids, checked, on_event, prompt_layout=layout_of_prompt(prompt))


def stream(
    engine: Engine,
    prompt: Prompt,
    dialect: Dialect | str | None = None,
    **options: Unpack[ReasonArguments],
) -> AsyncGenerator[Event, None]:
    """Yield the events of `areason` as they happen. `apr.rebuild` makes the trajectory from them.

    Leaving the iteration early cancels the trajectory, at once inside `contextlib.aclosing`. What `areason` raises is
    raised after the events before it.

    Raises:
        AprError: An option or the prompt is wrong. This is raised at the call.

    Examples:
        >>> async for event in apr.stream(engine, "Question: ..."):  # doctest: +SKIP
        ...     if isinstance(event, apr.Delta):
        ...         print(event.path, event.text)
    """
    check_engine(engine)
    check_prompt(prompt)
    checked = make_options(dialect, engine.tokenizer, vocab_size(engine), **options)
    return _stream(engine, prompt, checked)


async def _stream(engine: Engine, prompt: Prompt, options: ReasonOptions) -> AsyncGenerator[Event, None]:
    ids = await encode_prompt(engine, prompt, options.chat_tools)

    def start(on_event: OnEvent) -> Coroutine[Any, Any, Trajectory]:
        return run_with_options(engine, ids, options, on_event, prompt_layout=layout_of_prompt(prompt))

    async with contextlib.aclosing(stream_events(start)) as events:
        async for event in events:
            if not isinstance(event, Trajectory):
                yield event


def run(
    url: str,
    prompt: Prompt,
    dialect: Dialect | str | None = None,
    *,
    api_key: str | None = None,
    tokenizer: Tokenizer | None = None,
    timeout: float = 120.0,
    on_event: OnEvent | None = None,
    **options: Unpack[ReasonArguments],
) -> Trajectory:
    """`areason` on the server at `url`, blocking, for scripts without an event loop."""
    from sgl_apr.engine.http import HttpEngine

    check_prompt(prompt)
    check_call(dialect, options, on_event)

    async def connect_and_run() -> Trajectory:
        async with await HttpEngine.connect(
            url, api_key=api_key, tokenizer=tokenizer, timeout=timeout
        ) as engine:
            return await areason(engine, prompt, dialect, on_event=on_event, **options)

    return asyncio.run(connect_and_run())


async def run_with_options(
    engine: Engine,
    prompt_ids: tuple[int, ...],
    options: ReasonOptions,
    on_event: OnEvent | None = None,
    activity: Activity | None = None,
    prompt_layout: Layout = (),
) -> Trajectory:
    """`areason` for token ids and checked options.

    Args:
        engine: Decodes.
        prompt_ids: The token ids of the prompt.
        options: What was asked for.
        on_event: Called with every event.
        activity: Counts what is in flight, so that somebody notices when all calls wait for the client.
        prompt_layout: How the beginning of the prompt is joined in the KV cache, up to the end of its last join
            (`sgl_apr.trajectory.context_layout` of an earlier turn). Only for engines that join there.

    Raises:
        KvJoinUnavailable: The options ask for joins in the KV cache, and the engine has none.
    """
    options = options.with_learned_join(engine)
    if options.join == "kv" and not engine.joins_kv:
        raise KvJoinUnavailable(
            'join="kv" needs an engine that joins in its KV cache: `sgl-apr serve` starts one where that '
            "works, and says so where it does not"
        )
    tasks = asyncio.TaskGroup()
    if options.tools:
        await load_syntax(options, engine)
    if options.answer_schema is not None:
        arguments = (options.answer_schema, engine.tokenizer, engine.grammar_backend)
        await asyncio.to_thread(check_answer_schema, *arguments)  # its imports take seconds
    run = ReasoningRun(engine, options, on_event, tasks, activity)
    try:
        async with tasks:
            trajectory = await run.run(prompt_ids, prompt_layout)
    except BaseException as failed:  # a failure or a cancellation: no request of it may continue
        error = first_error(failed) if isinstance(failed, BaseExceptionGroup) else failed
        run.report(error)
        await abort_requests(engine, run.rid)
        raise error from error.__cause__
    run.report(None)
    return trajectory
