"""Runs groups of workers for `/apr/generate`: one prompt, and a header for each worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.methods.method_options import check_method_options
from sgl_apr.methods.prompt_group import MAX_STEP_END, MAX_WORKERS, check_group, decode_group
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.option_checks import check_option_names
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.value_checks import check_type, check_types, drop_nulls, number_types
from sgl_apr.server.api.config import ApiConfig, merge_options
from sgl_apr.server.api.fork.request import FORK_REQUEST_OPTIONS
from sgl_apr.server.api.options import LONG_PROMPT, MAX_ATTEMPTS, OptionsParser, ReasonRequest
from sgl_apr.server.api.schema_parts import Schema, describe, nullable, object_schema
from sgl_apr.server.api.service import TrajectoryService, hold_first
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.trajectory.worker_groups import GroupKind

GROUP_FIELD = "group"
GROUP_FIELDS = ("kind", "headers", "step_end")


@dataclass(frozen=True, slots=True)
class CheckedGroup:
    """A request for a group of workers whose options were checked.

    Attributes:
        prompt: The token ids that all workers share.
        kind: How they see each other.
        headers: What each of them begins with.
        step_end: Text that ends a step of Hogwild!, or None.
        options: The other options, with the budget.
    """

    prompt: tuple[int, ...]
    kind: GroupKind
    headers: tuple[str, ...]
    step_end: str | None
    options: Mapping[str, Any]


async def check_group_request(
    parser: OptionsParser, config: ApiConfig, request: ReasonRequest
) -> CheckedGroup:
    """Check the options of a request that has a group, and encode its prompt.

    Args:
        parser: Checks the prompt.
        config: The operator's settings.
        request: The request.

    Raises:
        AprError: The request is not valid.
        BudgetExceeded: It asks for more than the operator allows.
    """
    limits = config.limits
    defaults = {n: v for n, v in config.default_options.items() if n in FORK_REQUEST_OPTIONS}
    options = merge_options(defaults, request.options)
    fields = drop_nulls(check_type(GROUP_FIELD, options.pop(GROUP_FIELD), dict))
    check_option_names(fields, GROUP_FIELDS)
    values: list[Any] = [fields.get(name) for name in GROUP_FIELDS]
    kind, headers, step_end = values
    check_group(kind, headers, step_end)
    if limits.width is not None and len(headers) > limits.width:
        raise BudgetExceeded(
            f"{len(headers)} workers are more than this server allows: --apr-max-width {limits.width}"
        )
    if options.pop("tools", None):
        raise AprError("tools with a group: a worker of a group cannot wait for the result of a tool")
    check_option_names(options, FORK_REQUEST_OPTIONS, known_elsewhere=(GROUP_FIELD, "tools"))
    budget = check_types(
        check_type("budget", options.pop("budget", {}), dict), number_types(Budget), "budget "
    )
    check_method_options(options)
    retry = options.get("retry")
    if isinstance(retry, Mapping) and (retry.get("attempts") or Retry().attempts) > MAX_ATTEMPTS:
        raise AprError(f"retry attempts={retry['attempts']}, expected at most {MAX_ATTEMPTS}")
    _check_header_size(headers, parser)
    is_long = isinstance(request.prompt, str | list) and len(request.prompt) > LONG_PROMPT
    prompt = (
        await asyncio.to_thread(parser.prompt_ids, request.prompt)
        if is_long
        else parser.prompt_ids(request.prompt)
    )
    return CheckedGroup(
        prompt, kind, tuple(headers), step_end, {**options, "budget": limits.fork_budget(budget)}
    )


def _check_header_size(headers: list[str], parser: OptionsParser) -> None:
    """Check the length of headers before anything encodes them."""
    limit = parser.context_length * parser.max_token_chars
    if (length := sum(map(len, headers))) > limit:
        raise BudgetExceeded(
            f"the headers have {length} characters, expected at most {limit}: the context of the model, which has "
            f"{parser.context_length} tokens"
        )


async def run_group(
    service: TrajectoryService, checked: CheckedGroup, on_event: OnEvent | None = None
) -> Trajectory:
    """Run a group to its end. It may wait until others have ended. Cancelling the call cancels the group.

    Raises:
        ServerBusy: As many trajectories run and wait as the operator allows, or no slot became free in time.
        UnsupportedEngine: The server does not decode groups of this kind.
        EngineError: The engine failed.
    """
    engine = await service.engine()
    async with service.admit(len(checked.prompt), checked.options["budget"].tokens) as slot:
        trajectory = slot.trajectory = await decode_group(
            engine,
            checked.prompt,
            checked.kind,
            checked.headers,
            step_end=checked.step_end,
            on_event=on_event,
            **checked.options,
        )
    service.counters.count_trajectory(trajectory, None)
    return trajectory


async def stream_group(
    service: TrajectoryService, checked: CheckedGroup
) -> AsyncGenerator[Event | Trajectory, None]:
    """Yield the events of a group as they happen, then its trajectory. Closing the stream cancels the group."""
    events = hold_first(stream_events(lambda on_event: run_group(service, checked, on_event)))
    async with aclosing(events):
        async for event in events:
            yield event


def group_schema() -> Schema:
    """Return the schema of the field `group`."""
    text: Schema = {"type": "string", "minLength": 1}
    schema = object_schema(
        {
            "kind": {"type": "string", "enum": ["group_think", "hogwild"]},
            "headers": {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_WORKERS},
            "step_end": nullable({**text, "maxLength": MAX_STEP_END}),
        }
    )
    schema["required"] = ["kind", "headers"]
    return describe(
        nullable(schema),
        "Workers that decode together after the prompt, each after its header: every token sees the tokens of all so far",
    )
