"""The tools of a request: those that its client runs, and those of the operator that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError, did_you_mean
from sgl_apr.runtime.tools.tool import Tool, make_tools
from sgl_apr.runtime.value_checks import check_type, shorten

MAX_TOOLS = 128  # of one request, as in OpenAI's API
ALL_TOOLS = "all"
NO_TOOLS = "this server has no tools of its own: start it with --apr-tools module:name"


@dataclass(frozen=True, slots=True)
class RequestTools:
    """The tools of one request.

    Attributes:
        client: Those that the client runs.
        operator: Those that the server runs.
        choice: Whether they may or have to be called: "auto", "none", "required", or a name.
        parallel: Whether one sequence may call several at once.
    """

    client: tuple[Tool, ...] = ()
    operator: tuple[Tool, ...] = ()
    choice: str = "auto"
    parallel: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The options of the trajectory."""
        if not (tools := (*self.client, *self.operator)):
            return {}
        return {"tools": make_tools(tools), "tool_choice": self.choice, "parallel_tool_calls": self.parallel}


def parse_tools(request: Any, body: Mapping[str, Any], names: Any, operator: Sequence[Tool]) -> RequestTools:
    """Return the tools of a request.

    Args:
        request: SGLang's request. Its field `tools` has those that the client runs.
        body: The fields of the request as they were sent: `tool_choice` and `parallel_tool_calls` count here.
        names: The option `tools` of `apr`: names of the operator's tools, or "all".
        operator: The operator's tools.

    Raises:
        AprError: A tool is not valid or not known, or the choice names none of them.
    """
    listed = [tool.model_dump(exclude_none=True) for tool in getattr(request, "tools", None) or ()]
    if len(listed) > MAX_TOOLS:
        raise AprError(f"tools has {len(listed)} entries, expected at most {MAX_TOOLS}")
    client = tuple(Tool.from_openai(tool) for tool in listed)
    choice, parallel = body.get("tool_choice"), body.get("parallel_tool_calls")
    return make_request_tools(client, select_tools(names, operator), choice, parallel)


def make_request_tools(
    client: tuple[Tool, ...], operator: tuple[Tool, ...], choice: Any, parallel: Any
) -> RequestTools:
    """Return the tools of a request, once it is checked that the choice names one of them.

    Raises:
        AprError: It does not, or two tools have one name.
    """
    known = [tool.name for tool in make_tools((*client, *operator))]
    name = _parse_choice(choice)
    if name not in ("auto", "none") and not known:
        raise AprError(f"tool_choice={shorten(choice)} needs tools")
    if name not in ("auto", "none", "required", *known):
        raise AprError(f"tool_choice={shorten(name)}, expected one of the tools: {', '.join(known)}")
    is_parallel = check_type("parallel_tool_calls", True if parallel is None else parallel, bool)
    if name == "none":
        return RequestTools(choice=name)
    return RequestTools(client, operator, name, is_parallel)


def select_tools(names: Any, operator: Sequence[Tool]) -> tuple[Tool, ...]:
    """Return the operator's tools of these names, or all of them for "all".

    Raises:
        AprError: There is none of a name.
    """
    if names is None:
        return ()
    if not operator:
        raise AprError(NO_TOOLS)
    if names == ALL_TOOLS:
        return tuple(operator)
    expected = f'expected "all" or a list with some of {", ".join(tool.name for tool in operator)}'
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AprError(f"apr tools={shorten(names)}, {expected}")
    by_name = {tool.name: tool for tool in operator}
    for name in names:
        if name not in by_name:
            hint = did_you_mean(name, by_name)
            raise AprError(f"apr tools has {shorten(name)}, {hint or expected}")
    return tuple(by_name[name] for name in dict.fromkeys(names))


def show_tools(request: Any, tools: RequestTools) -> None:
    """Change a request so that SGLang's chat template shows the model all tools, and SGLang constrains nothing.

    Args:
        request: SGLang's `ChatCompletionRequest`. It has the client's tools already.
        tools: All tools.
    """
    from sglang.srt.entrypoints.openai.protocol import Tool as SglangTool

    if tools.operator:
        request.tools = [*(request.tools or []), *(SglangTool(**tool.to_openai()) for tool in tools.operator)]
    if getattr(request, "tools", None):
        # SGLang would show a tool that has to be called without the others, and refuse it with a response_format.
        request.tool_choice = "none" if tools.choice == "none" else "auto"


def _parse_choice(choice: Any) -> str:
    """Return the choice as `ReasonOptions` has it. SGLang has checked its form."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return choice
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise AprError(f"tool_choice={shorten(choice)}, expected auto, none, required, or the name of a tool")
    return name


def pop_tools(options: dict[str, Any], operator: Sequence[Tool]) -> RequestTools:
    """Take the options about the operator's tools out of those of a request that has no fields for them.

    Args:
        options: Options by name: `tools`, `tool_choice` and `parallel_tool_calls` are removed.
        operator: The operator's tools.

    Raises:
        AprError: A tool is not known, or the choice names none of them.
    """
    names, choice, parallel = (
        options.pop(name, None) for name in ("tools", "tool_choice", "parallel_tool_calls")
    )
    return make_request_tools((), select_tools(names, operator), choice, parallel)
