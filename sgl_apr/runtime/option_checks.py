"""Checks the options of a trajectory by name, for Python and for HTTP."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.formats.options import JoinMethod
from sgl_apr.runtime.branch_scoring import BranchScoring
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.join_policy import POLICY_HELP, is_valid_policy
from sgl_apr.runtime.pacing import Pacing
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.tools.tool import make_tools
from sgl_apr.runtime.value_checks import (
    SAMPLING_TYPES,
    check_sampling,
    check_type,
    check_types,
    drop_nulls,
    number_types,
    shorten,
    unknown_name,
)

Mode = Literal["auto", "sequential", "parallel"]
OnBranchFailure = Literal["skip", "retry", "raise"]
ONE_REPLY = "a trajectory is one reply"
GRAMMAR = "the dialect's grammar constrains decoding"
STOP = "the dialect decides where a reply stops"
NOT_AVAILABLE = "a trajectory does not have it"
BUDGET = 'a budget limits the tokens, such as budget={"tokens": 1000}'
TOKEN_IDS = "a trajectory is made of token ids, and its text has all of them"
# Parameters of SGLang and of OpenAI that do nothing in a trajectory, or would break it, and why.
REFUSED_OPTIONS: Mapping[str, str] = {
    "n": ONE_REPLY, "best_of": ONE_REPLY, "echo": ONE_REPLY, "suffix": ONE_REPLY, "session_id": ONE_REPLY,
    "session_params": ONE_REPLY,
    "response_format": GRAMMAR, "regex": GRAMMAR, "ebnf": GRAMMAR, "json_schema": GRAMMAR,
    "structural_tag": GRAMMAR, "custom_logit_processor": GRAMMAR, "custom_params": GRAMMAR, "watermark": GRAMMAR,
    "stop_token_ids": STOP, "stop_regex": STOP, "min_tokens": STOP, "min_new_tokens": STOP,
    "ignore_eos": STOP, "no_stop_trim": STOP,
    "max_tokens": BUDGET, "max_new_tokens": BUDGET, "max_completion_tokens": BUDGET,
    "skip_special_tokens": TOKEN_IDS, "spaces_between_special_tokens": TOKEN_IDS,
    "sampling_seed": "the seeds of all requests are derived from `seed`",
    "return_logprob": "use logprobs=True", "top_logprobs_num": "use top_logprobs",
    "return_hidden_states": NOT_AVAILABLE, "return_routed_experts": NOT_AVAILABLE,
}  # fmt: skip
# Options that a request over HTTP has as fields of its own, and not as options of `apr`.
REQUEST_LEVEL = "it is a field of the request itself"
REQUEST_LEVEL_OPTIONS: Mapping[str, str] = dict.fromkeys(
    ("tools", "tool_choice", "parallel_tool_calls", "stop"), REQUEST_LEVEL
)

OPTION_TYPES: Mapping[str, type] = {
    "join": str, "mode": str, "min_blocks": int, "max_blocks": int, "min_width": int, "policy": str,
    "cap_width_by_load": bool, "eager_branches": bool, "on_branch_failure": str, "seed": int, "constrain": bool, "forbid_angle_brackets": bool,
    "logprobs": bool, "top_logprobs": int,
}  # fmt: skip
REQUEST_FIELDS = ("lora_path", "cache_salt", "extra_key", "priority")
REQUEST_FIELD_TYPES: Mapping[str, type] = {n: int if n == "priority" else str for n in REQUEST_FIELDS}
OBJECT_TYPES: Mapping[str, type] = {
    "budget": Budget,
    "pacing": Pacing,
    "retry": Retry,
    "scoring": BranchScoring,
}
IMPLIED_BY_SCORING = ("logprobs", "top_logprobs")  # for the confidence of the model
CHOICES: Mapping[str, tuple[str, ...]] = {
    "join": get_args(JoinMethod), "mode": get_args(Mode), "on_branch_failure": get_args(OnBranchFailure),
}  # fmt: skip
# The names that JSON can express, without `dialect`. Python has these and `PYTHON_OPTION_NAMES`.
JSON_OPTION_NAMES = (*OBJECT_TYPES, "sampling", *OPTION_TYPES, *SAMPLING_TYPES, *REQUEST_FIELD_TYPES)
# Those of tools, and of what the final text has to be. OpenAI's API has fields of its own for most of them.
TOOL_OPTION_NAMES = ("tools", "tool_choice", "parallel_tool_calls", "tool_call_parser", "run_tool")
PYTHON_OPTION_NAMES = (
    "branch_prompt_template",
    "request_fields",
    *TOOL_OPTION_NAMES,
    "answer_schema",
    "stop",
)
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
OPTION_NAMES = dict.fromkeys((*JSON_OPTION_NAMES, *PYTHON_OPTION_NAMES)).keys()
# Functions among the options: their arguments, and what a message calls them.
FUNCTIONS: Mapping[str, tuple[int, str]] = {
    "policy": (1, "the branches that have ended"),
    "pacing": (2, "a Demand and a Load"),
    "branch_prompt_template": (1, "the message of a branch"),
    "on_event": (1, "an event"),
}


def check_option_names(
    options: Iterable[Any], known: Collection[str], known_elsewhere: Collection[str] = ()
) -> None:
    """Check that all options are known.

    Args:
        options: Their names.
        known: The names that are known.
        known_elsewhere: Names that were taken out of the options before, and that a message may suggest.

    Raises:
        AprError: One is not. The message says what it may mean, or why it cannot be had.
    """
    for name in options:
        if name in known:
            continue
        refused = {**REFUSED_OPTIONS, **REQUEST_LEVEL_OPTIONS}
        if isinstance(name, str) and name in refused:
            raise AprError(f"no option {name!r}: {refused[name]}")
        raise AprError(unknown_name(name, [*known, *known_elsewhere], "option "))


def check_options(options: Mapping[str, Any], vocab_size: int | None = None) -> dict[str, Any]:
    """Return the fields of `ReasonOptions` for options by name.

    What depends on the dialect is checked by `ReasonOptions`. A None counts as absent; `pacing=None` is a value of its
    own.

    Args:
        options: Options by name, of `JSON_OPTION_NAMES` and `PYTHON_OPTION_NAMES`.
        vocab_size: Number of token ids that the model has. None if it is not known.

    Raises:
        AprError: An option has an unknown name, a wrong type, or a value that is not possible.
    """
    check_option_names(options, OPTION_NAMES)
    given = drop_nulls(options)
    checked: dict[str, Any] = {"pacing": None} if "pacing" in options else {}
    for name, value in given.items():
        if name in FUNCTIONS and callable(value) and not isinstance(value, Pacing):
            checked[name] = check_function(name, value)
        elif name == "branch_prompt_template":
            raise AprError(f"{name}={shorten(value)}, expected a function of {FUNCTIONS[name][1]}")
        elif name in OBJECT_TYPES:
            checked[name] = make_object(name, value)
        elif name in OPTION_TYPES:
            checked[name] = _check_scalar(name, value)
        elif name in ANSWER_CHECKS:
            checked[name] = ANSWER_CHECKS[name](value)
    sampling = _check_mapping("sampling", given)
    if sampling is not None:
        _check_refused(sampling, "sampling ")
        checked["sampling"] = check_sampling(sampling, vocab_size, "sampling ")
    by_name = {name: value for name, value in given.items() if name in SAMPLING_TYPES}
    if by_name:
        checked["sampling"] = checked.get("sampling", {}) | check_sampling(by_name, vocab_size)
    request_fields = _check_mapping("request_fields", given) or {}
    by_name = {name: value for name, value in given.items() if name in REQUEST_FIELD_TYPES}
    if request_fields or by_name:
        checked["request_fields"] = {
            **check_types(request_fields, REQUEST_FIELD_TYPES, "request_fields "),
            **check_types(by_name, REQUEST_FIELD_TYPES, ""),
        }
    if scoring := checked.get("scoring"):
        checked = scoring.request_options | checked
    _check_consistent(checked)
    return checked


def make_object(name: str, value: Any) -> Any:
    """Return the `Budget`, `Pacing` or `Retry` that an option is, or that its fields describe. A budget may be text.

    Raises:
        AprError: The value is neither, or a field is unknown or wrong.
    """
    kind = OBJECT_TYPES[name]
    if isinstance(value, kind):
        return value
    if kind is Budget and isinstance(value, str):
        return Budget.parse(value)
    if not isinstance(value, Mapping):
        also = f", or a {kind.__name__}"
        raise AprError(f"{name}={shorten(value)}, expected an object with fields of {kind.__name__}{also}")
    if kind is BranchScoring:
        check_option_names(value, [f.name for f in fields(kind)])
        return kind(**drop_nulls(value))
    return kind(**check_types(value, number_types(kind), f"{name} "))


def check_function(name: str, function: Any, arguments: int | None = None, of: str = "") -> Any:
    """Return a function that is an option, if it can be called as it will be.

    Args:
        name: The name of the option.
        function: The function.
        arguments: How many arguments it will get. By default as `FUNCTIONS` says.
        of: What they are, for the message.

    Raises:
        AprError: It is no function, is a coroutine function, or takes other arguments.
    """
    if arguments is None:
        arguments, of = FUNCTIONS[name]
    expected = f"expected a function of {of}"
    if not callable(function):
        raise AprError(f"{name}={shorten(function)}, {expected}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # of an object
    ):
        raise AprError(f"{name}={shorten(function)} is a coroutine function, {expected} that is not async")
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except ValueError:  # a builtin without a signature
        pass
    except TypeError:
        takes = inspect.signature(function)
        raise AprError(f"{name} is a function of {takes}, {expected}") from None
    return function


def _check_scalar(name: str, value: Any) -> Any:
    """Return the value of an option of `OPTION_TYPES`."""
    if name == "policy":
        if not is_valid_policy(value):
            raise AprError(f"policy={shorten(value)}, expected {POLICY_HELP}")
    elif name in CHOICES:
        if value not in CHOICES[name]:
            *choices, last = (f'"{choice}"' for choice in CHOICES[name])
            raise AprError(f"{name}={shorten(value)}, expected {', '.join(choices)} or {last}")
    else:
        check_type(name, value, OPTION_TYPES[name])
    return value


def check_tool_choice(choice: Any) -> str:
    """Return whether tools may or have to be called: "auto", "required", "none", or the name of a tool."""
    if isinstance(choice, Mapping):  # as in OpenAI's API
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    if not isinstance(choice, str) or not choice:
        raise AprError(
            f'tool_choice={shorten(choice)}, expected "auto", "required", "none", or the name of a tool'
        )
    return choice


def check_answer_schema(schema: Any) -> str:
    """Return the JSON text of a JSON schema."""
    expected = "expected a JSON schema"
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise AprError(f"answer_schema={shorten(schema)}, {expected}") from None
    if not isinstance(schema, Mapping):
        raise AprError(f"answer_schema={shorten(schema)}, {expected}")
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AprError(f"answer_schema={shorten(schema)}, {expected}: {error}") from None


def check_stop(stop: Any) -> tuple[str, ...]:
    """Return the texts that end the final text."""
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
        raise AprError(f"stop={shorten(stop)}, expected a text, or a list of texts that are not empty")
    if len(stops) > MAX_STOPS:
        raise AprError(f"stop has {len(stops)} texts, expected at most {MAX_STOPS}")
    return tuple(stops)


def check_run_tool(function: Any) -> Any:
    """Return a function that runs the tools without a function."""
    if not callable(function):
        raise AprError(f"run_tool={shorten(function)}, expected an async function of a ToolRequest")
    return function


ANSWER_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "tools": make_tools,
    "tool_choice": check_tool_choice,
    "parallel_tool_calls": lambda value: check_type("parallel_tool_calls", value, bool),
    "tool_call_parser": lambda value: check_type("tool_call_parser", value, str),
    "run_tool": check_run_tool,
    "answer_schema": check_answer_schema,
    "stop": check_stop,
}


def _check_consistent(options: Mapping[str, Any]) -> None:
    """Check what does not depend on the dialect."""
    mode, min_blocks, max_blocks = (
        options.get("mode", "auto"),
        options.get("min_blocks", 0),
        options.get("max_blocks"),
    )
    if mode == "sequential" and min_blocks:
        raise AprError(f'mode="sequential" forbids the min_blocks={min_blocks} blocks asked for')
    min_forks = max(1, min_blocks) if mode == "parallel" else min_blocks
    max_forks = 0 if mode == "sequential" else max_blocks
    if min_forks < 0 or (max_forks is not None and max_forks < min_forks):
        raise AprError(f"min_blocks={min_forks}, max_blocks={max_forks}: expected 0 <= min <= max")
    if options.get("min_width", 1) < 1:
        raise BudgetExceeded(f"min_width={options['min_width']}, expected at least 1")
    if options.get("cap_width_by_load") and options.get("pacing", True) is None:
        raise AprError("cap_width_by_load=True needs pacing, found pacing=None")
    top_logprobs = options.get("top_logprobs", 0)
    if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
        raise AprError(f"top_logprobs={top_logprobs}, expected 0 to {MAX_TOP_LOGPROBS}")
    if top_logprobs and not options.get("logprobs"):
        raise AprError(f"top_logprobs={top_logprobs} needs logprobs=True")


def _check_mapping(name: str, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return an option that is an object, or None."""
    value = options.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise AprError(f"{name}={shorten(value)}, expected an object")
    return value


def _check_refused(names: Iterable[Any], prefix: str) -> None:
    for name in names:
        if isinstance(name, str) and name in REFUSED_OPTIONS:
            raise AprError(f"no {prefix}{name!r}: {REFUSED_OPTIONS[name]}")
