"""`sgl-apr run`: answer one question with a served model, by its own forks or by a method."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from sgl_apr.cli.arguments import ALLOW_CODE_HELP, add_api_key, load_dialect, parse_budget
from sgl_apr.cli.display import print_trajectory
from sgl_apr.cli.live_server import live_server
from sgl_apr.cli.method_options import add_method_options, check_methods, options_of
from sgl_apr.cli.tool_options import add_tool_arguments, connect_tools, load_tool_arguments
from sgl_apr.errors import AprError, UnsupportedEngine
from sgl_apr.methods.registry import METHOD_MODULES
from sgl_apr.runtime.budget import Budget
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.printable import printable, printable_json

if TYPE_CHECKING:
    from sgl_apr.engine.base import Engine
    from sgl_apr.methods.registry import MethodResult
    from sgl_apr.methods.task import Task
    from sgl_apr.runtime.arguments import ReasonArguments
    from sgl_apr.runtime.events import OnEvent
    from sgl_apr.runtime.tools.tool import Tool

    Answer = Callable[[Engine, OnEvent | None, Sequence[Tool]], Awaitable[Trajectory | MethodResult]]

TASKS = ("question", "mathematics", "countdown")
CHATML_PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PLAIN_PROMPT = "USER:{}\nASSISTANT:"
PLAIN_TEMPLATE = (
    "USER:{}\nASSISTANT:"  # for a model without a chat template: the default of SGLang's programs
)


def add_command(commands: Any) -> None:
    """Add `run` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "run",
        help="answer one question with a served model",
        epilog='example: sgl-apr run "Tell me about whales and eagles." --budget width=4,seconds=20 --live\n'
        '         sgl-apr run "Why is the sky blue?" --method self_consistency --budget tokens=2000\n'
        '         sgl-apr run " 24: 3 7 8 12" --task countdown --method tree_of_thoughts --model builtin',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", help="the question, or the problem of a task")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    server.add_argument(
        "--model", help="a checkpoint to serve meanwhile, or a name that `sgl-apr model` knows"
    )
    add_api_key(parser)
    parser.add_argument(
        "--dialect",
        metavar="NAME_OR_FILE",
        help="a dialect, or a .lark file (default: recognized by the tags of the server's tokenizer)",
    )
    parser.add_argument(
        "--mode",
        default="auto",
        choices=["auto", "sequential", "parallel"],
        help="whether the model may fork, must not, or must (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help=f"use one of {', '.join(METHOD_MODULES)}, with the options of its paper",
    )
    parser.add_argument(
        "--task",
        default="question",
        choices=TASKS,
        help="how a method puts the question (default: %(default)s)",
    )
    parser.add_argument("--allow-code", action="store_true", help=ALLOW_CODE_HELP)
    add_method_options(parser)
    parser.add_argument(
        "--budget",
        type=parse_budget,
        default=Budget(),
        metavar="NAME=N,...",
        help="limits: tokens (4096), critical_tokens, branch_tokens, width, depth (1), blocks, calls, seconds, "
        "outline_chars, tool_calls, tool_seconds (60), tool_result_tokens (1024), reserve",
    )
    parser.add_argument(
        "--policy",
        help='when branches join: "all", "first", "quorum:k" or "deadline:s" (default: the dialect\'s)',
    )
    parser.add_argument(
        "--join",
        choices=["text", "kv", "message"],
        help="how branches join (default: the first kind that the dialect has)",
    )
    add_tool_arguments(parser)
    parser.add_argument("--seed", type=int, help="sampling seed, if the server supports seeds")
    parser.add_argument("--temperature", type=float, help="default: 1, or that of a method's paper")
    parser.add_argument(
        "--raw", action="store_true", help="send the question as it is, without a chat template"
    )
    parser.add_argument(
        "--live", action="store_true", help="show the branches in parallel while they are decoded"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the trajectory as JSON, with the method's answer if there is one",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    if not options.question.strip():
        raise AprError("the question is empty, expected text")
    if options.option and not options.method:
        raise AprError("--option is for --method")
    answer = _method_call(options) if options.method else _reason_call(options)
    with live_server(options, options.question) as view:
        result = asyncio.run(_connect_and_answer(options, answer, view))
    trajectory = result if isinstance(result, Trajectory) else result.trajectory
    if options.json:
        print(printable_json(result.to_json() if isinstance(result, Trajectory) else _result_json(result)))
        return 0
    print_trajectory(trajectory, options.question)
    if not isinstance(result, Trajectory):
        text = printable(result.answer) or "(no answer)"
        Console().print(f"{result.method} ({result.label}): {text}", markup=False)
    return 0


def _result_json(result: MethodResult) -> str:
    head = {"method": result.method, "answer": result.answer, "score": result.score, "label": result.label}
    return json.dumps({**head, "trajectory": json.loads(result.trajectory.to_json())}, ensure_ascii=False)


async def _connect_and_answer(
    options: argparse.Namespace, answer: Answer, on_event: OnEvent | None
) -> Trajectory | MethodResult:
    # Not `apr.Endpoint`: it imports SGLang, which takes seconds.
    from sgl_apr.engine.http import HttpEngine

    async with (
        connect_tools(options) as tools,
        await HttpEngine.connect(options.url, api_key=options.api_key) as engine,
    ):
        return await answer(engine, on_event, tools)


def _reason_call(options: argparse.Namespace) -> Answer:
    """Check the options of a run with the model's own forks, and return the call that answers the question."""
    from sgl_apr.runtime.loop import areason
    from sgl_apr.runtime.options import check_call

    arguments: ReasonArguments = {
        "mode": options.mode, "budget": options.budget, "policy": options.policy, "join": options.join,
        "seed": options.seed, "temperature": 1.0 if options.temperature is None else options.temperature,
    }  # fmt: skip
    dialect = load_dialect(options.dialect) if options.dialect else None
    own_tools = load_tool_arguments(options)
    if own_tools:
        arguments["tools"] = own_tools
    if options.tool_call_parser:
        arguments["tool_call_parser"] = options.tool_call_parser
    choice: ReasonArguments = {"tool_choice": options.tool_choice} if options.tool_choice else {}
    # The tools of MCP servers are not known yet.
    check_call(dialect, arguments if options.mcp_servers else {**arguments, **choice})
    arguments |= choice

    async def answer(engine: Engine, on_event: OnEvent | None, tools: Sequence[Tool]) -> Trajectory:
        if all_tools := [*own_tools, *tools]:
            arguments["tools"] = all_tools
        shown = [] if options.tool_choice == "none" else all_tools
        prompt = options.question if options.raw else await _chat_prompt(engine, options.question, shown)
        return await areason(engine, prompt, dialect, on_event=on_event, **arguments)

    return answer


async def _chat_prompt(engine: Engine, question: str, tools: Sequence[Tool]) -> Sequence[int]:
    """The question as a user's message, with the tools that the model may call, by the chat template of the model, or else in plain text."""
    from sgl_apr.runtime.prompts import encode_prompt

    try:
        shown = [tool.to_openai() for tool in tools] or None
        return await encode_prompt(engine, [{"role": "user", "content": question}], shown)
    except UnsupportedEngine:
        # As SGLang's programs do it for a model without a chat template.
        has_tags = engine.tokenizer.special_token_id("<|im_start|>") is not None
        return await encode_prompt(engine, (CHATML_PROMPT if has_tags else PLAIN_PROMPT).format(question))


def _method_call(options: argparse.Namespace) -> Answer:
    """Check the options of a method, and return the call that answers the question."""
    from sgl_apr.methods.registry import check_arguments, method

    if options.allow_code and options.method != "recursive":
        raise AprError("--allow-code is for --method recursive")
    unsupported = [name for name in ("dialect", "policy", "join", "raw") if getattr(options, name)]
    if options.mode != "auto":
        unsupported.append("mode")
    if unsupported:
        raise AprError(f"--method has a fixed structure, expected no --{unsupported[0]}")
    task, problem = _task(options.task, options.question)
    arguments: dict[str, Any] = {"budget": options.budget, "seed": options.seed}
    if options.temperature is not None:
        arguments["temperature"] = options.temperature
    if options.allow_code:
        arguments["allow_code"] = True
    if own_tools := load_tool_arguments(options):
        arguments["tools"] = own_tools
    if options.tool_choice:
        arguments["tool_choice"] = options.tool_choice
    if options.tool_call_parser:
        arguments["tool_call_parser"] = options.tool_call_parser
    check_methods(options.option, [options.method])
    arguments |= options_of(options.method, options.option)
    check_arguments(options.method, task, arguments)

    async def answer(engine: Engine, on_event: OnEvent | None, tools: Sequence[Tool]) -> MethodResult:
        if tools:
            arguments["tools"] = [*own_tools, *tools]
        return await method(options.method)(
            engine, problem, task=task(engine), on_event=on_event, **arguments
        )

    return answer


def _task(name: str, question: str) -> tuple[Callable[[Engine], Task[Any]], Any]:
    """The class of a task, and the question as its problem."""
    if name == "countdown":
        from sgl_apr.evaluation.tasks.countdown.problems import Problem
        from sgl_apr.evaluation.tasks.countdown.task import CountdownTask

        return CountdownTask, Problem.parse(f" {question.strip()}")
    if name == "mathematics":
        from sgl_apr.evaluation.tasks.mathematics import MathTask

        return MathTask, question
    from sgl_apr.evaluation.tasks.question import QuestionTask

    return QuestionTask, question
