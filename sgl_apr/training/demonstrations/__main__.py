"""Write demonstrations into a file that `sgl-apr train sft` reads, or let the base model reply to ordinary instructions.

python -m sgl_apr.training.demonstrations write runs/smollm2/train.jsonl --count 6000
python -m sgl_apr.training.demonstrations ledger runs/ledger/train.jsonl
python -m sgl_apr.training.demonstrations replies plain.jsonl.gz --train 1000 --test 120 [--seconds 200]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import dialect
from sgl_apr.server.launch.launcher import Server
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.checkpoint import write_errors
from sgl_apr.training.demonstrations.chat_prompt import chat_prompt
from sgl_apr.training.demonstrations.dataset import as_trajectory, count_kinds, demonstrations
from sgl_apr.training.demonstrations.fork_reply import DIALECT
from sgl_apr.training.demonstrations.ledger_notes import ledger_readings, reading_trajectory
from sgl_apr.training.demonstrations.plain_prompts import plain_messages
from sgl_apr.training.demonstrations.plain_replies import generate_replies, read_replies, write_replies
from sgl_apr.training.demonstrations.topics import Split
from sgl_apr.training.models.pretrained import smollm2


def _write(options: argparse.Namespace) -> None:
    model = options.model or smollm2(dialect(DIALECT).tags, label=DIALECT)
    tokenizer = HfTokenizer(model)
    made = list(demonstrations(options.split, options.count, options.seed))
    tokens = 0
    options.file.parent.mkdir(parents=True, exist_ok=True)
    partial = options.file.with_name(f"{options.file.name}.partial")
    with write_errors(partial), partial.open("w", encoding="utf-8") as file:
        for each in made:
            trajectory = as_trajectory(each, tokenizer)
            tokens += sum(span.tokens or 0 for span in trajectory.spans)
            file.write(trajectory.to_json() + "\n")
    partial.replace(options.file)
    print(
        json.dumps(
            {
                "file": str(options.file),
                "demonstrations": len(made),
                "tokens": tokens,
                "kinds": count_kinds(made),
            }
        )
    )


def _ledger(options: argparse.Namespace) -> None:
    tokenizer = HfTokenizer(options.model or smollm2())
    tokens = 0
    options.file.parent.mkdir(parents=True, exist_ok=True)
    partial = options.file.with_name(f"{options.file.name}.partial")
    with write_errors(partial), partial.open("w", encoding="utf-8") as file:
        for reading in ledger_readings(options.count, options.seed):
            trajectory = reading_trajectory(reading, tokenizer)
            tokens += sum(span.tokens for span in trajectory.spans)
            file.write(trajectory.to_json() + "\n")
    partial.replace(options.file)
    print(json.dumps({"file": str(options.file), "demonstrations": options.count, "tokens": tokens}))


def _replies(options: argparse.Namespace) -> None:
    known = read_replies(options.file) if options.file.exists() else []
    until, done = time.monotonic() + options.seconds, {(r.split, r.message) for r in known}
    wanted: dict[Split, int] = {"test": options.test, "train": options.train}
    with Server(options.model or smollm2(), max_total_tokens=32768) as server:
        for split, count in wanted.items():
            messages = [m for m in plain_messages(split, count) if (split, m) not in done]
            left = until - time.monotonic()
            known += asyncio.run(generate_replies(server.url, messages, split, chat_prompt, seconds=left))
    with write_errors(options.file):
        write_replies(options.file, known)
    counts = {split: sum(r.split == split for r in known) for split in wanted}
    print(json.dumps({"file": str(options.file), **counts, "complete": sum(r.is_complete for r in known)}))


def main() -> int:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m sgl_apr.training.demonstrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    write = commands.add_parser("write", help="write demonstrations as trajectories, one per line")
    write.add_argument("file", type=Path)
    write.add_argument("--count", type=int, default=6000, help="(default: %(default)s)")
    write.add_argument("--seed", type=int, default=0)
    write.add_argument("--split", choices=["train", "test"], default="train")
    write.add_argument("--model", type=Path, help="a checkpoint with the tags (default: SmolLM2)")
    write.set_defaults(command=_write)
    ledger = commands.add_parser("ledger", help="write readings of ledgers (docs/methods.md)")
    ledger.add_argument("file", type=Path)
    ledger.add_argument("--model", type=Path, help="whose tokenizer to use (default: SmolLM2)")
    ledger.add_argument("--count", type=int, default=2_000, help="(default: %(default)s)")
    ledger.add_argument("--seed", type=int, default=0)
    ledger.set_defaults(command=_ledger)
    replies = commands.add_parser(
        "replies", help="let a served model reply to ordinary instructions; continues a file"
    )
    replies.add_argument("file", type=Path)
    replies.add_argument(
        "--train", type=int, default=1000, help="messages for training (default: %(default)s)"
    )
    replies.add_argument("--test", type=int, default=120, help="held-out messages (default: %(default)s)")
    replies.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no request later than this"
    )
    replies.add_argument("--model", type=Path, help="the model that replies (default: SmolLM2)")
    replies.set_defaults(command=_replies)
    options = parser.parse_args()
    try:
        options.command(options)
    except AprError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
