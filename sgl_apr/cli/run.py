"""`sgl-apr run`: answer one question with a served model, by its own forks or by a method."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sgl_apr.cli.arguments import ALLOW_CODE_HELP, parse_budget
from sgl_apr.cli.display import print_trajectory
from sgl_apr.errors import AprError
from sgl_apr.methods.registry import METHOD_MODULES
from sgl_apr.runtime.budget import Budget
from sgl_apr.views.printable import printable, printable_json

if TYPE_CHECKING:
    from sgl_apr.engine.base import Engine
    from sgl_apr.methods.registry import MethodResult
    from sgl_apr.methods.task import Task
    from sgl_apr.runtime.events import OnEvent
    from sgl_apr.trajectory.trajectory import Trajectory

TASKS = ("question", "mathematics", "countdown")


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
    server.add_argument("--model", help="a checkpoint to serve meanwhile, or builtin")
    parser.add_argument("--api-key", help="key of the server")
    parser.add_argument("--dialect", help="default: recognized by the tags of the server's tokenizer")
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
    parser.add_argument(
        "--budget",
        type=parse_budget,
        default=Budget(),
        metavar="NAME=N,...",
        help="limits: tokens (4096), critical_tokens, branch_tokens, width, depth (1), blocks, calls, seconds, "
        "outline_chars, reserve",
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
    from rich.live import Live

    from sgl_apr.views.live import LiveView

    view = LiveView(options.question)
    on_event = view if options.live else None
    with ExitStack() as stack:
        if options.model:
            from sgl_apr.server.launch.launcher import Server
            from sgl_apr.training.models import locate_model

            options.url = stack.enter_context(Server(locate_model(options.model))).url
        if options.live:  # on stderr, so that the result on stdout can be piped
            console = Console(stderr=True)
            stack.enter_context(
                Live(view, console=console, refresh_per_second=8, transient=console.is_terminal)
            )
        meta = _answer(options, on_event)
    trajectory: Trajectory = meta["trajectory"]
    result: MethodResult | None = meta.get("result")
    if options.json:
        print(printable_json(_result_json(result) if result else trajectory.to_json()))
        return 0
    print_trajectory(trajectory, options.question)
    if result:
        answer = printable(result.answer) or "(no answer)"
        Console().print(f"{result.method} ({result.label}): {answer}", markup=False)
    return 0


def _result_json(result: MethodResult) -> str:
    head = {"method": result.method, "answer": result.answer, "score": result.score, "label": result.label}
    return json.dumps({**head, "trajectory": json.loads(result.trajectory.to_json())}, ensure_ascii=False)


def _answer(options: argparse.Namespace, on_event: OnEvent | None) -> dict[str, Any]:
    """The meta information of the answer to the question, from an SGLang program of one expression."""
    import sglang as sgl

    from sgl_apr.runtime.frontend.endpoint import Endpoint

    expression = (
        _solve_expression(options, on_event) if options.method else _reason_expression(options, on_event)
    )

    def program(s: Any, question: str) -> None:
        if options.raw or options.method:
            s += question + expression
        else:
            s += sgl.user(question)
            s += sgl.assistant(expression)

    temperature = 1.0 if options.temperature is None else options.temperature
    with Endpoint(options.url, api_key=options.api_key) as endpoint:
        state = sgl.function(program).run(
            question=options.question, backend=endpoint, temperature=temperature
        )
        meta: dict[str, Any] = state.get_meta_info("answer")
        return meta


def _reason_expression(options: argparse.Namespace, on_event: OnEvent | None) -> Any:
    from sgl_apr.runtime.frontend.expressions import reason

    return reason(
        "answer", options.dialect, mode=options.mode, budget=options.budget, policy=options.policy, join=options.join,
        seed=options.seed, on_event=on_event,
    )  # fmt: skip


def _solve_expression(options: argparse.Namespace, on_event: OnEvent | None) -> Any:
    from sgl_apr.methods.expression import solve

    if options.allow_code and options.method != "recursive":
        raise AprError("--allow-code is for --method recursive")
    unsupported = [name for name in ("dialect", "policy", "join", "raw") if getattr(options, name)]
    if options.mode != "auto":
        unsupported.append("mode")
    if unsupported:
        raise AprError(f"--method has a fixed structure, expected no --{unsupported[0]}")
    task, problem = _task(options.task, options.question)
    method_options: dict[str, Any] = {}
    if options.temperature is not None:
        method_options["temperature"] = options.temperature
    if options.allow_code:
        method_options["allow_code"] = True
    return solve(
        "answer", problem, method=options.method, task=task, budget=options.budget, seed=options.seed,
        on_event=on_event, **method_options,
    )  # fmt: skip


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
