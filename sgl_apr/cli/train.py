"""`sgl-apr train sft`: the configuration and the directory of a run, its progress on stderr; it trains nothing itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_apr.training.grpo import GrpoStepLog
    from sgl_apr.training.sft import SftStepLog


def add_commands(commands: Any) -> None:
    """Add `train` to an argparse parser."""
    train = commands.add_parser(
        "train",
        help="train a model on trajectories",
        epilog="examples:\n"
        "  sgl-apr train sft configs/countdown-short.toml -o runs/short\n"
        "  sgl-apr train sft configs/countdown-short.toml -o runs/short    # again: goes on where it was",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = train.add_subparsers(required=True, metavar="KIND")
    sft = kinds.add_parser("sft", help="learn from demonstrations")
    sft.add_argument("config", type=Path, help="a TOML file: see configs/ and sgl_apr/training/config.py")
    sft.add_argument("-o", "--out", type=Path, required=True, help="log, checkpoints and model go there")
    sft.add_argument("--json", action="store_true", help="print one JSON object at the end")
    sft.set_defaults(command=_sft)
    grpo = kinds.add_parser("grpo", help="learn from rewards, on replies of a server that this starts")
    grpo.add_argument("config", type=Path, help="a TOML file: see configs/ and sgl_apr/training/config.py")
    grpo.add_argument("-o", "--out", type=Path, required=True, help="log, checkpoints and model go there")
    grpo.add_argument("--json", action="store_true", help="print one JSON object at the end")
    grpo.set_defaults(command=_grpo)


def _sft(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from sgl_apr.evaluation.plots import plot_training_log
    from sgl_apr.training.config import SftConfig, load_config
    from sgl_apr.training.sft import train

    config = load_config(SftConfig, options.config)
    last: list[SftStepLog] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("sft", total=config.steps.tokens)

        def on_step(step: SftStepLog) -> None:
            last[:] = [step]
            speed = f"{step.tokens // max(1, step.step):,} tokens a step"
            progress.update(
                bar,
                completed=step.tokens,
                description=f"sft: step {step.step}, loss {step.loss:.3f}, {speed}",
            )

        model = train(config, options.out, on_step)
    plot_training_log(options.out / "log.jsonl", options.out / "log.png", ("loss", "rate", "norm"))
    found = {"model": str(model)} | ({"step": last[0].step, "loss": last[0].loss} if last else {})
    print(json.dumps(found) if options.json else model)
    return 0


def _grpo(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.evaluation.plots import plot_training_log
    from sgl_apr.training.config import GrpoConfig, load_config
    from sgl_apr.training.grpo import train

    config = load_config(GrpoConfig, options.config)
    last: list[GrpoStepLog] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("grpo", total=config.updates.steps)

        def on_update(update: GrpoStepLog) -> None:
            last[:] = [update]
            said = f"reward {update.reward:.3f}, accuracy {update.accuracy:.1%}, critical path {update.critical_path:.0f}"
            progress.update(bar, completed=update.step + 1, description=f"grpo: {said}")

        model = train(config, options.out, on_update)
    shown = ("reward", "accuracy", "critical_path", "total", "forked_3", "forked_4", "width")
    plot_training_log(options.out / "log.jsonl", options.out / "log.png", shown)
    found = {"model": str(model)} | ({"step": last[0].step, "accuracy": last[0].accuracy} if last else {})
    print(json.dumps(found) if options.json else model)
    return 0
