"""The tasks of a fork, and its merge, checked when they are made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.option_checks import make_object
from sgl_apr.runtime.prompts import Messages, check_prompt, is_chat
from sgl_apr.runtime.tools.tool import Tool, make_tools
from sgl_apr.runtime.value_checks import check_sampling, check_type, shorten

MAX_TASKS = 256
MAX_NAME_CHARS = 200
MAX_OUTLINE_CHARS = 80
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
TaskPrompt = str | Messages
MergeJoin = Literal["text", "kv"]
TASK_EXPECTED = "text, chat messages, or an apr.ForkTask"
# What a budget of one task may limit. The others are about forks, which a task does not make.
TASK_BUDGET_FIELDS = ("tokens", "seconds", "calls", "tool_calls", "tool_seconds", "tool_result_tokens")
RESULTS_PLACEHOLDER = "{results}"


@dataclass(frozen=True)
class ForkTask:
    """What one branch of a fork is to do, and how.

    Attributes:
        prompt: Text, which continues the prompt or becomes a user message after the conversation. Or chat messages that
            follow the conversation.
        name: Names the task in the result, in events and for the merge. By default its number.
        sampling: SGLang's sampling parameters, over those of the fork.
        response_format: `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"schema": {...}}}` as in
            OpenAI's API. The text of the result is such JSON then.
        tools: The tools that this branch may call. None for those of the fork, an empty list for none.
        tool_choice: "auto", "none", "required", or the name of a tool. None for that of the fork.
        budget: Limits of this branch, within those of the fork: `tokens`, `seconds`, `calls`, and those of tools.
        max_tokens: Tokens that are decoded, at most. The same as `budget={"tokens": ...}`.
        stop: Texts that end the branch, and are left out of its result.
    """

    prompt: TaskPrompt
    name: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    response_format: Mapping[str, Any] | None = None
    tools: Sequence[Any] | None = None
    tool_choice: str | None = None
    budget: Budget | Mapping[str, Any] | str | None = None
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_task_prompt("the prompt of a task", self.prompt)
        check_type("name", self.name, str)
        if len(self.name) > MAX_NAME_CHARS or "\n" in self.name:
            raise AprError(
                f"name={shorten(self.name)}, expected one line of at most {MAX_NAME_CHARS} characters"
            )
        if not isinstance(self.sampling, Mapping):
            raise AprError(f"sampling={shorten(self.sampling)}, expected an object")
        object.__setattr__(self, "sampling", check_sampling(self.sampling, None, "sampling "))
        answer_schema(self.response_format)
        if self.tools is not None:
            object.__setattr__(self, "tools", make_tools(self.tools))
        if self.tool_choice is not None:
            check_type("tool_choice", self.tool_choice, str)
        if self.max_tokens is not None and check_type("max_tokens", self.max_tokens, int) < 1:
            raise BudgetExceeded(f"max_tokens={self.max_tokens}, expected at least 1")
        object.__setattr__(self, "stop", _check_stop(self.stop))
        if self.budget is not None:
            object.__setattr__(self, "budget", _check_budget(self.budget))

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end it."""
        return tuple(self.stop)

    @property
    def outline(self) -> str:
        """What people and the merge read about it: its name, or the first line of its text."""
        if self.name and not self.name.isdecimal():
            return self.name
        texts = [self.prompt] if isinstance(self.prompt, str) else [m.get("content") for m in self.prompt]
        text = next((t for t in reversed(texts) if isinstance(t, str) and t.strip()), self.name)
        line = text.strip().partition("\n")[0]
        return line if len(line) <= MAX_OUTLINE_CHARS else f"{line[: MAX_OUTLINE_CHARS - 3]}..."

    @property
    def limits(self) -> Budget | None:
        """Its budget."""
        return self.budget if isinstance(self.budget, Budget) else None

    @property
    def own_tools(self) -> tuple[Tool, ...] | None:
        """Its tools, None for those of the fork."""
        return None if self.tools is None else tuple(self.tools)

    @property
    def token_limit(self) -> int | None:
        """Tokens that it may decode, None for what the fork leaves it."""
        limits = [self.max_tokens, self.limits.tokens if self.limits else None]
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class Merge:
    """What follows the branches of a fork.

    Attributes:
        prompt: Text, or chat messages. With `join="text"` the results come before it, in the same message if that is a
            user's. `{results}` in it stands for them instead.
        join: "text": the model reads the results as text, after the conversation. "kv": it continues after the branches as
            they are in the KV cache, and nothing is computed again.
        sampling: SGLang's sampling parameters, over those of the fork.
        response_format: As in `ForkTask`.
        max_tokens: Tokens that are decoded, at most. None for what the workers leave.
        stop: Texts that end it, and are left out.
    """

    prompt: TaskPrompt
    join: MergeJoin = "text"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    response_format: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.join not in get_args(MergeJoin):
            raise AprError(f'join={shorten(self.join)}, expected "text" or "kv"')
        task = ForkTask(
            self.prompt,
            sampling=self.sampling,
            response_format=self.response_format,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )
        object.__setattr__(self, "sampling", task.sampling)
        object.__setattr__(self, "stop", task.stop)
        if self.join == "kv" and RESULTS_PLACEHOLDER in json.dumps(self.prompt, ensure_ascii=False):
            raise AprError(
                f'the prompt of a merge with join="kv" has {RESULTS_PLACEHOLDER}, expected none: it sees the branches'
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end it."""
        return tuple(self.stop)


def make_tasks(tasks: Any) -> tuple[ForkTask, ...]:
    """Return the tasks of a fork, each with a name.

    Raises:
        AprError: They are no sequence of tasks, or two of them cannot be told apart.
    """
    if isinstance(tasks, str | bytes | Mapping) or not isinstance(tasks, Sequence):
        raise AprError(f"tasks={shorten(tasks)}, expected a list, each of which is {TASK_EXPECTED}")
    if not 1 <= len(tasks) <= MAX_TASKS:
        raise AprError(f"tasks has {len(tasks)} tasks, expected 1 to {MAX_TASKS}")
    made = list[ForkTask]()
    for number, task in enumerate(tasks, 1):
        try:
            made.append(task if isinstance(task, ForkTask) else ForkTask(task))
        except AprError as error:
            raise type(error)(f"task {number}: {error}") from None
    named = tuple(task if task.name else replace(task, name=str(n)) for n, task in enumerate(made, 1))
    for number, (task, name) in enumerate(zip(made, (task.name for task in named), strict=True), 1):
        for other in range(number - 1):
            if name == named[other].name:
                raise AprError(
                    f"tasks {other + 1} and {number} have the name {shorten(name)}, expected one for each"
                )
            if not task.name and not made[other].name and task == made[other]:
                raise AprError(
                    f"tasks {other + 1} and {number} are the same, expected different ones, or names that tell them apart"
                )
    return named


def make_merge(merge: Any) -> Merge | None:
    """Return the merge of a fork. Text or messages are its prompt.

    Raises:
        AprError: It is something else.
    """
    if merge is None or isinstance(merge, Merge):
        return merge
    try:
        return Merge(merge)
    except AprError as error:
        raise type(error)(f"merge: {error}") from None


def answer_schema(response_format: Any) -> str | None:
    """Return the JSON schema, as text, that a `response_format` of OpenAI's API asks for. None for plain text.

    Raises:
        AprError: It is something else.
    """
    expected = 'expected {"type": "json_schema", "json_schema": {"schema": {...}}}, {"type": "json_object"} or {"type": "text"}'
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise AprError(f"response_format={shorten(response_format)}, {expected}")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    described = response_format.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise AprError(f"response_format={shorten(response_format)}, {expected}")
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise AprError(f"response_format has a schema that is not JSON: {error}") from None


def _check_task_prompt(name: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise AprError(f"{name} is {shorten(prompt)}, expected text that is not empty")
        return
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence) or not prompt:
        raise AprError(f"{name} is {shorten(prompt)}, expected text or chat messages")
    if not is_chat(prompt):
        raise AprError(f"{name} is {shorten(prompt)}, expected text or chat messages")
    check_prompt(prompt)


def _check_stop(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or isinstance(stops, bytes) or len(stops) > MAX_STOPS:
        raise AprError(f"stop={shorten(stop)}, expected text, or a list of at most {MAX_STOPS} texts")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            raise AprError(f"stop has {shorten(text)}, expected text of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _check_budget(value: Any) -> Budget:
    budget: Budget = make_object("budget", value)
    default = Budget()
    for name in Budget.__dataclass_fields__:
        if name not in TASK_BUDGET_FIELDS and getattr(budget, name) != getattr(default, name):
            raise AprError(
                f"the budget of a task has {name}={getattr(budget, name)}, expected some of "
                f"{', '.join(TASK_BUDGET_FIELDS)}"
            )
    return budget
