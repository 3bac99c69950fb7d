"""`sgl-apr fork`: give several tasks to a served model after one context, and merge what they return."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.cli.arguments import add_api_key, parse_budget, parse_count
from sgl_apr.cli.display import print_trajectory
from sgl_apr.cli.live_server import live_server
from sgl_apr.cli.tool_options import add_tool_arguments, connect_tools, load_tool_arguments
from sgl_apr.errors import AprError
from sgl_apr.runtime.budget import Budget
from sgl_apr.views.printable import printable, printable_json

if TYPE_CHECKING:
    from sgl_apr.methods.fork_result import ForkResult
    from sgl_apr.runtime.events import OnEvent
    from sgl_apr.runtime.tools.tool import Tool


def add_command(commands: Any) -> None:
    """Add `fork` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "fork",
        help="give several tasks to a served model after one context, all at once",
        epilog='example: sgl-apr fork --context report.txt --task "List the risks." --task "List the costs." \\\n'
        '             --merge "Write a summary of both." --url http://127.0.0.1:30000\n'
        '         sgl-apr fork --context chat.json --task "Answer yes or no." --task "Explain." --policy first --json\n'
        '         sgl-apr fork --context report.txt --task "Who built it?" --task "What did it cost?" \\\n'
        "             --tool my_tools:search --tool-choice required --budget tokens=2000,tool_calls=4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--context",
        required=True,
        metavar="FILE",
        help="what all tasks share: a text, or a .json file with the messages of a chat (- for standard input)",
    )
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        dest="tasks",
        metavar="TEXT",
        help="what one branch is to do; repeat it for each branch",
    )
    parser.add_argument(
        "--merge", metavar="TEXT", help="what follows the branches, with their results before it"
    )
    parser.add_argument(
        "--join",
        default="text",
        choices=["text", "kv"],
        help="whether the merge reads the results as text, or continues after the branches in the KV cache "
        "(default: %(default)s)",
    )
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    server.add_argument(
        "--model", help="a checkpoint to serve meanwhile, or a name that `sgl-apr model` knows"
    )
    add_api_key(parser)
    parser.add_argument(
        "--budget",
        type=parse_budget,
        default=Budget(),
        metavar="NAME=N,...",
        help="limits of all branches and of the merge: tokens (4096), critical_tokens, branch_tokens, width, calls, "
        "seconds, tool_calls, tool_seconds (60), tool_result_tokens (1024), reserve",
    )
    parser.add_argument("--max-tokens", type=parse_count, metavar="N", help="tokens of each branch, at most")
    parser.add_argument(
        "--policy",
        default="all",
        help='when the branches end: "all", "first", "quorum:k" or "deadline:s" (default: all)',
    )
    add_tool_arguments(parser)
    parser.add_argument("--seed", type=int, help="sampling seed, if the server supports seeds")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    parser.add_argument(
        "--live", action="store_true", help="show the branches in parallel while they are decoded"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from sgl_apr.methods.fork_task import ForkTask, make_merge, make_tasks

    prompt = read_context(options.context, raw=options.raw)
    tasks = make_tasks([ForkTask(text, max_tokens=options.max_tokens) for text in options.tasks])
    if options.merge is None and options.join != "text":
        raise AprError("--join is for a merge, expected --merge")
    merge = make_merge(options.merge)
    own_tools = load_tool_arguments(options)
    with live_server(options, options.context) as view:
        result = asyncio.run(_connect_and_fork(options, prompt, tasks, merge, own_tools, view))
    if options.json:
        print(printable_json(json.dumps(result.to_dict(), ensure_ascii=False)))
        return 0
    print_result(result)
    return 0


async def _connect_and_fork(
    options: argparse.Namespace,
    prompt: Any,
    tasks: Any,
    merge: Any,
    own_tools: list[Tool],
    on_event: OnEvent | None,
) -> ForkResult:
    from dataclasses import replace

    from sgl_apr.engine.http import HttpEngine
    from sgl_apr.methods.context_fork import fork

    if merge is not None:
        merge = replace(merge, join=options.join)
    async with (
        connect_tools(options) as tools,
        await HttpEngine.connect(options.url, api_key=options.api_key) as engine,
    ):
        tool_options: dict[str, Any] = {}
        if own_tools or tools:
            tool_options = {
                "tools": [*own_tools, *tools],
                "tool_choice": options.tool_choice or "auto",
                "tool_call_parser": options.tool_call_parser,
            }
        return await fork(
            engine,
            prompt,
            tasks,
            merge,
            policy=options.policy,
            budget=options.budget,
            on_event=on_event,
            seed=options.seed,
            temperature=options.temperature,
            **tool_options,
        )


def read_context(file: str, *, raw: bool) -> Any:
    """Return the prompt in a file: messages if it is JSON, else a user's message with its text, or with `raw` the text.

    Raises:
        AprError: There is no such file, or it holds neither.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AprError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise AprError(f"{file} is empty, expected the context that all tasks share")
    if file.endswith(".json"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AprError(f"{file} is not JSON: {error}") from None
    return text if raw else [{"role": "user", "content": text}]


def print_result(result: ForkResult) -> None:
    """Print the tree of a fork, and what each task and the merge returned."""
    from rich.console import Console

    console = Console()
    print_trajectory(result.trajectory, "fork")
    results = [*result.results, *([result.merge] if result.merge else [])]
    for task in results:
        cached = task.usage.cached_tokens or 0
        console.print(
            f"{task.name} ({task.outcome}, {cached} of {task.usage.prompt_tokens} prompt tokens cached): "
            f"{printable(task.text.strip())}",
            markup=False,
        )
