"""Parses a chat completion that asks for a method, and applies the operator's limits to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.errors import AprError, BudgetExceeded, CodeForbidden
from sgl_apr.methods.chat_tasks import DEFAULT_CHAT_TASK, chat_task, chat_task_names
from sgl_apr.methods.registry import METHOD_NAMES, check_arguments
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.option_checks import check_option_names
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.value_checks import (
    SAMPLING_TYPES,
    check_type,
    check_types,
    drop_nulls,
    number_types,
    shorten,
    unknown_name,
)
from sgl_apr.server.api.config import ApiConfig, merge_options
from sgl_apr.server.api.fork.request import FORK_REQUEST_OPTIONS
from sgl_apr.server.api.openai.request import includes_usage
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.options import MAX_ATTEMPTS

METHOD_FIELD = "method"
METHOD_FIELDS = (METHOD_FIELD, "options", "task")
MAX_NUMBER = 512  # of an option of a method, such as a number of replies: DeepConf's default
MAX_LIST = 16  # numbers in one option, such as PaCoRe's widths
UNSUPPORTED = ("stop", "tools", "response_format", "logprobs", "top_logprobs")  # fields of the request


@dataclass(frozen=True, slots=True)
class MethodRequest:
    """A request for a method whose options were checked.

    Attributes:
        name: The name of the method.
        task: The name of the task.
        messages: The conversation.
        options: The options of the method, with its budget.
        response: How the response should look.
        stream: Whether the response is streamed.
    """

    name: str
    task: str
    messages: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]
    response: ResponseOptions
    stream: bool

    @property
    def budget(self) -> Budget:
        """Its budget."""
        budget: Budget = self.options["budget"]
        return budget


def parse_method_request(request: Any, own: Mapping[str, Any], config: ApiConfig) -> MethodRequest:
    """Parse a request.

    Args:
        request: SGLang's `ChatCompletionRequest`.
        own: The field `apr`, which has the name of the method.
        config: The operator's settings.

    Raises:
        AprError: The request is not valid, or has a field that does not work together with a method.
        BudgetExceeded: It asks for more than the operator allows.
        CodeForbidden: It asks for the method to run code.
    """
    fields = drop_nulls(own)
    name = check_type(METHOD_FIELD, fields.pop(METHOD_FIELD), str)
    if name not in METHOD_NAMES:
        raise AprError(unknown_name(name, METHOD_NAMES, "method "))
    task = check_type("task", fields.pop("task", DEFAULT_CHAT_TASK), str)
    if task not in chat_task_names():
        raise AprError(unknown_name(task, chat_task_names(), "task "))
    method_options = drop_nulls(check_type("options", fields.pop("options", {}), dict))
    for field in UNSUPPORTED:
        if field in request.model_fields_set and getattr(request, field):
            raise AprError(f"{field} cannot be combined with a method")
    if request.n not in (None, 1):
        raise AprError(f"n={shorten(request.n)} cannot be combined with a method, expected n=1")
    defaults = {n: v for n, v in config.default_options.items() if n in FORK_REQUEST_OPTIONS}
    sampling = {n: getattr(request, n) for n in SAMPLING_TYPES if n in request.model_fields_set}
    options = merge_options(defaults, {"sampling": sampling, "seed": request.seed}, fields)
    response = replace(ResponseOptions.pop_from(options), include_usage=includes_usage(request))
    check_option_names(options, FORK_REQUEST_OPTIONS, known_elsewhere=METHOD_FIELDS)
    budget = check_types(
        check_type("budget", options.pop("budget", {}), dict), number_types(Budget), "budget "
    )
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None:
        budget["tokens"] = min(max_tokens, budget.get("tokens", max_tokens))
    options |= drop_nulls(check_type("sampling", options.pop("sampling", {}), dict))
    if config.limits.width is not None:
        budget.setdefault("width", config.limits.width)
    options |= method_options | {"budget": config.limits.fork_budget(budget)}
    _check_numbers(method_options)
    check_arguments(name, chat_task, options)
    retry = options.get("retry")
    if isinstance(retry, Mapping) and (retry.get("attempts") or Retry().attempts) > MAX_ATTEMPTS:
        raise AprError(f"retry attempts={retry['attempts']}, expected at most {MAX_ATTEMPTS}")
    messages = tuple(message.model_dump(exclude_none=True) for message in request.messages)
    return MethodRequest(name, task, messages, options, response, bool(request.stream))


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Check that no option of a method asks for a number of things that would exhaust the server.

    Raises:
        BudgetExceeded: One does.
        CodeForbidden: One lets the model run code, which only an operator may.
    """
    for name, value in options.items():
        if name in ("allow_code", "limits"):
            raise CodeForbidden(f"{name}: this server runs no code of a model")
        if name in ("budget", "task", "on_event", "tools"):
            raise AprError(f"{name} is no option of a method, expected it beside options, if at all")
        numbers = value if isinstance(value, list) else [value]
        too_large = any(isinstance(number, int) and number > MAX_NUMBER for number in numbers)
        if too_large or len(numbers) > MAX_LIST:
            raise BudgetExceeded(
                f"{name}={shorten(value)}, expected numbers of at most {MAX_NUMBER}, and no more than {MAX_LIST} of them"
            )
