"""Parses the JSON of a request for a fork of a context, and applies the operator's limits to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.methods.fork_task import ForkTask, Merge, make_merge, make_tasks
from sgl_apr.methods.fork_tools import ForkToolOptions
from sgl_apr.methods.method_options import FORK_OPTION_NAMES, check_method_options
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.option_checks import JSON_OPTION_NAMES, check_option_names
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.tools.tool import Tool
from sgl_apr.runtime.value_checks import (
    SAMPLING_TYPES,
    check_type,
    check_types,
    drop_nulls,
    number_types,
    shorten,
    unknown_name,
)
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import MAX_ATTEMPTS
from sgl_apr.server.api.tools.request import select_tools

PROMPT_FIELDS = ("prompt", "input_ids", "messages")
# Options of a fork that JSON can express.
FORK_REQUEST_OPTIONS = tuple(name for name in JSON_OPTION_NAMES if name not in FORK_OPTION_NAMES)
TASK_FIELDS = (
    "prompt", "messages", "name", "sampling", "response_format", "tools", "tool_choice", "budget", "max_tokens", "stop",
)  # fmt: skip
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
BODY_FIELDS = ("tasks", "merge", "stream", "policy", *PROMPT_FIELDS, *TOOL_FIELDS)
MERGE_FIELDS = ("prompt", "messages", "join", "sampling", "response_format", "max_tokens", "stop")


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """A request for a fork. Its tasks are checked, its options are still JSON.

    Attributes:
        prompt: Text, token ids, or chat messages.
        tasks: The tasks.
        merge: The merge, if there is one.
        policy: When the branches end.
        options: Options by name, of `FORK_REQUEST_OPTIONS`.
        stream: Whether the client wants events while the branches run.
        tools: The operator's tools that all tasks may call, and how.
    """

    prompt: Any
    tasks: tuple[ForkTask, ...]
    merge: Merge | None = None
    policy: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    tools: ForkToolOptions = field(default_factory=ForkToolOptions)

    @classmethod
    def from_json(cls, body: bytes, operator_tools: Sequence[Tool] = ()) -> ForkRequest:
        """Return the request in a body of `/apr/fork`.

        Args:
            body: The body.
            operator_tools: The tools of the operator, which a request names.

        Raises:
            AprError: The body is not such an object. The message says what was expected.
        """
        try:
            # Unlike the standard library, orjson accepts neither NaN nor unpaired surrogates.
            fields = drop_nulls(check_type("the body", orjson.loads(body), dict))
        except ValueError as error:
            raise AprError(f"the body is not JSON: {error}") from None
        prompts = [fields.pop(name) for name in PROMPT_FIELDS if name in fields]
        if len(prompts) != 1 or "tasks" not in fields:
            # A field with a wrong name, such as `task`, is the better explanation.
            check_option_names(fields, (*BODY_FIELDS, *FORK_REQUEST_OPTIONS))
        if len(prompts) != 1:
            raise AprError(f"the body has {len(prompts)} prompts, expected one of {', '.join(PROMPT_FIELDS)}")
        tasks, merge = fields.pop("tasks", []), fields.pop("merge", None)
        stream = check_type("stream", fields.pop("stream", False), bool)
        policy = check_type("policy", fields.pop("policy", "all"), str)
        if isinstance(tasks, list):  # if not, `make_tasks` says what was expected
            tasks = [_make_task(number, task, operator_tools) for number, task in enumerate(tasks, 1)]
        tools = {name: fields.pop(name) for name in TOOL_FIELDS if name in fields}
        if "tools" in tools:
            tools["tools"] = _select_tools(tools["tools"], operator_tools)
        return cls(
            prompts[0],
            make_tasks(tasks),
            _make_merge(merge),
            policy,
            fields,
            stream,
            ForkToolOptions.pop_from(tools),
        )

    def with_options(self, options: Mapping[str, Any], limits: RequestLimits) -> ForkRequest:
        """Return the request with checked options, within the operator's limits.

        Args:
            options: Its options, and the operator's defaults.
            limits: The operator's limits.

        Raises:
            AprError: An option is wrong.
            BudgetExceeded: The request has more tasks, or sets a higher limit, than the operator allows.
        """
        if limits.width is not None and len(self.tasks) > limits.width:
            raise BudgetExceeded(
                f"{len(self.tasks)} tasks are more than this server allows: --apr-max-width {limits.width}"
            )
        options = drop_nulls(options)
        check_option_names(options, FORK_REQUEST_OPTIONS, known_elsewhere=BODY_FIELDS)
        fields = check_types(
            check_type("budget", options.pop("budget", {}), dict), number_types(Budget), "budget "
        )
        check_method_options(options)
        retry = options.get("retry")
        if isinstance(retry, Mapping) and (retry.get("attempts") or Retry().attempts) > MAX_ATTEMPTS:
            raise AprError(f"retry attempts={retry['attempts']}, expected at most {MAX_ATTEMPTS}")
        return replace(self, options={**options, "budget": limits.fork_budget(fields)})


def _make_task(number: int, task: Any, operator_tools: Sequence[Tool]) -> ForkTask:
    try:
        if not isinstance(task, dict):
            return ForkTask(task)
        fields = _fields("task", task, TASK_FIELDS)
        if "tools" in fields:
            fields["tools"] = _select_tools(fields["tools"], operator_tools)
        return ForkTask(**fields)
    except AprError as error:
        raise type(error)(f"task {number}: {error}") from None


def _select_tools(names: Any, operator_tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The operator's tools of these names."""
    if names == []:
        return ()
    try:
        return select_tools(names, operator_tools)
    except AprError as error:  # in chat completions, they are a field of `apr`
        raise AprError(str(error).removeprefix("apr ")) from None


def _make_merge(merge: Any) -> Merge | None:
    if not isinstance(merge, dict):
        return make_merge(merge)
    try:
        return Merge(**_fields("merge", merge, MERGE_FIELDS))
    except AprError as error:
        raise type(error)(f"merge: {error}") from None


def _fields(what: str, value: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The arguments of a task or merge from its JSON. Sampling parameters may stand at its top level."""
    fields = drop_nulls(value)
    sampling = {name: fields.pop(name) for name in SAMPLING_TYPES if name in fields}
    for name in fields:
        if name not in known:
            raise AprError(unknown_name(name, (*known, *SAMPLING_TYPES), f"field of a {what} "))
    if ("prompt" in fields) == ("messages" in fields):
        raise AprError(f"{shorten(value)} has no prompt of its own, expected prompt or messages")
    if "messages" in fields:
        fields["prompt"] = fields.pop("messages")
    if sampling:
        fields["sampling"] = {**check_type("sampling", fields.get("sampling", {}), dict), **sampling}
    return fields
