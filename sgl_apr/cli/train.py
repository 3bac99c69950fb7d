"""`sgl-apr train sft` and `sgl-apr train grpo`: run a training configuration, with progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.cli.arguments import add_training_arguments, load_dialects
from sgl_apr.errors import MissingExtra

if TYPE_CHECKING:
    from sgl_apr.training.grpo_log import GrpoStepLog
    from sgl_apr.training.heldout import HeldOutPoint
    from sgl_apr.training.sft import SftStepLog

SFT_CURVES = ("loss", "rate", "norm")
GRPO_CURVES = ("reward", "accuracy", "critical_path", "total", "forked", "width")
HELDOUT_CURVES = ("reward", "accuracy", "false_claims", "critical_path", "forked")


def add_command(commands: Any) -> None:
    """Add `train` to the subcommands of an argparse parser."""
    train = commands.add_parser(
        "train",
        help="train a model on trajectories",
        epilog="examples:\n"
        "  sgl-apr train sft configs/countdown-short.toml -o runs/short\n"
        "  sgl-apr train sft configs/countdown-short.toml -o runs/short    # again: continues where it stopped\n"
        "  sgl-apr train sft configs/countdown-short.toml --set model.seed=1 --set data.seed=1 -o runs/short-1\n"
        "  sgl-apr train grpo configs/countdown-rl.toml -o runs/rl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = train.add_subparsers(required=True, metavar="KIND")
    sft = kinds.add_parser("sft", help="learn from demonstrations")
    add_training_arguments(sft)
    sft.set_defaults(command=_sft)
    grpo = kinds.add_parser(
        "grpo", help="learn from rewards, on replies of a server that this command starts"
    )
    add_training_arguments(grpo)
    grpo.set_defaults(command=_grpo)


def _sft(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from sgl_apr.training.config import SftConfig, load_config
    from sgl_apr.training.sft import train

    load_dialects(options.dialect)
    config = load_config(SftConfig, options.config, options.set)
    last: list[SftStepLog] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("sft", total=config.steps.tokens)

        def on_step(step: SftStepLog) -> None:
            last[:] = [step]
            speed = f"{step.tokens // max(1, step.step):,} tokens a step"
            description = f"sft: step {step.step}, loss {step.loss:.3f}, {speed}"
            progress.update(bar, completed=step.tokens, description=description)

        model = train(config, options.out, on_step)
    _finish(options, model, SFT_CURVES, {"step": last[0].step, "loss": last[0].loss} if last else {})
    return 0


def _grpo(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sgl_apr.training.config import load_config
    from sgl_apr.training.grpo import train
    from sgl_apr.training.grpo_config import GrpoConfig
    from sgl_apr.training.heldout import HELDOUT_FILE

    load_dialects(options.dialect)
    config = load_config(GrpoConfig, options.config, options.set)
    last: list[GrpoStepLog] = []
    heldout: list[HeldOutPoint] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("grpo", total=config.updates.steps)

        def show() -> None:
            parts = [
                f"reward {step.reward:.3f}, accuracy {step.accuracy:.1%}, critical path {step.critical_path:.0f}"
                for step in last
            ]
            parts += [f"held out {point.accuracy:.1%} at step {point.step}" for point in heldout]
            completed = last[0].step + 1 if last else 0
            progress.update(bar, completed=completed, description=f"grpo: {'; '.join(parts)}")

        def on_update(step: GrpoStepLog) -> None:
            last[:] = [step]
            show()

        def on_heldout(point: HeldOutPoint) -> None:
            heldout[:] = [point]
            show()

        model = train(config, options.out, on_update, on_heldout)
    if (options.out / HELDOUT_FILE).exists():
        _plot(options.out / HELDOUT_FILE, options.out / "heldout.png", HELDOUT_CURVES)
    _finish(options, model, GRPO_CURVES, {"step": last[0].step, "accuracy": last[0].accuracy} if last else {})
    return 0


def _finish(
    options: argparse.Namespace, model: Path, curves: Sequence[str], last_step: dict[str, Any]
) -> None:
    """Plot the log, and print the result."""
    _plot(options.out / "log.jsonl", options.out / "log.png", curves)
    print(json.dumps({"model": str(model), **last_step}) if options.json else model)


def _plot(log: Path, image: Path, curves: Sequence[str]) -> None:
    """Plot a log, if matplotlib is installed."""
    from sgl_apr.evaluation.plots import plot_training_log

    try:
        plot_training_log(log, image, curves)
    except MissingExtra as error:
        print(f"no {image.name}: {error}", file=sys.stderr)
