"""Whether a language model forks where a question has several parts, and what that costs it elsewhere, on held-out questions.

python -m benchmarks.quality.language_model [MODEL] [--base smollm2] [--questions 400] [--plain 120] [--parts forks base perplexity]
       [--json] [--check]

MODEL is a checkpoint or a name that `sgl-apr serve --model` knows, by default the trained SmolLM2. Topics, wordings, puzzles, lists and
ordinary instructions are in no training data (sgl_apr/training/demonstrations). Half of the questions have several parts. The base
model answers the same questions without forks.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp
from statistics import fmean
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.metrics import RESAMPLES, bootstrap_interval
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.demonstrations.chat_prompt import chat_prompt
from sgl_apr.training.demonstrations.dataset import demonstrations, plain_demonstrations, prompt_trajectory
from sgl_apr.training.demonstrations.fork_reply import DIALECT, Demonstration
from sgl_apr.training.demonstrations.keywords import best_keyword, keyword_accuracy
from sgl_apr.training.models import locate_model

DECISION, CLOSED, PERPLEXITY = 0.85, 0.90, 1.05  # bars
SEED = 1000
BUDGET = apr.Budget(tokens=480, width=8, branch_tokens=96)
CONCURRENT = 16
PARTS = ("forks", "base", "perplexity")
Interval = tuple[float, float]
Mode = Literal["auto", "sequential"]


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one question.

    Attributes:
        question: The question.
        trajectory: The reply.
        right: For each part whether its answer is right; empty where nothing can be verified.
    """

    question: Demonstration
    trajectory: apr.Trajectory
    right: tuple[bool, ...]

    @property
    def forks(self) -> bool:
        """Whether the model decided to fork."""
        return bool(self.trajectory.blocks)


def contains_answer(text: str, answer: str) -> bool:
    """Whether an answer stands in a text, as words of its own.

    Examples:
        >>> contains_answer("It is Lima.", "lima"), contains_answer("It is 112.", "12")
        (True, False)
    """
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def judge(question: Demonstration, trajectory: apr.Trajectory) -> tuple[bool, ...]:
    """Whether each part is right. Where a reply forks, branch k has to have the answer to part k; elsewhere the reply has it."""
    texts = [branch_text(trajectory, k) for k in range(len(question.answers))] if trajectory.blocks else []
    if not question.is_multi_part or not texts:
        texts = [trajectory.text] * len(question.answers)
    return tuple(contains_answer(text, answer) for text, answer in zip(texts, question.answers, strict=True))


def branch_text(trajectory: apr.Trajectory, index: int) -> str:
    """What a branch of the first block wrote; empty if there is no such branch."""
    number = index + 1
    return "".join(s.text for s in trajectory.spans if s.path == (1, number) and s.role == "body")


async def answer_all(url: str, questions: Sequence[Demonstration], mode: Mode) -> list[Reply]:
    """Greedy replies to all questions."""
    semaphore = asyncio.Semaphore(CONCURRENT)
    async with await apr.HttpEngine.connect(url) as engine:

        async def answer(one: Demonstration) -> Reply:
            async with semaphore:
                trajectory = await apr.areason(
                    engine, chat_prompt(one.message), DIALECT, budget=BUDGET, mode=mode, max_blocks=None if mode == "sequential" else 1, temperature=0.0,
                )  # fmt: skip
            return Reply(one, trajectory, judge(one, trajectory))

        return list(await asyncio.gather(*map(answer, questions)))


def stratified_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """95% bootstrap interval of the mean of the means of groups, each resampled by itself."""
    rng = random.Random(0)
    means = sorted(fmean(fmean(rng.choices(g, k=len(g))) for g in groups) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40 - 1]


def decision_figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Balanced accuracy of the decision to fork, and what was decided for each kind of question."""
    groups = [
        [float(r.forks == multi) for r in replies if r.question.is_multi_part == multi]
        for multi in (True, False)
    ]
    kinds = {r.question.kind: r.question.is_multi_part for r in replies}
    return {
        "balanced_accuracy": fmean(map(fmean, groups)),
        "ci95": stratified_interval(groups),
        "forks_where_several_parts": fmean(groups[0]),
        "no_fork_where_one_part": fmean(groups[1]),
        "by_kind": {
            kind: {
                "count": len(own := [r for r in replies if r.question.kind == kind]),
                "several_parts": multi,
                "forks": fmean(r.forks for r in own),
            }
            for kind, multi in sorted(kinds.items(), key=lambda item: (not item[1], item[0]))
        },
    }


def closing_figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """The share of branches that the model closed, and how many branches there are beside how many parts."""
    metrics = [(r, r.trajectory.metrics()) for r in replies if r.forks]
    decoded, branches = sum(m.closers_decoded for _, m in metrics), sum(m.branches for _, m in metrics)
    shares = [m.closers_decoded / m.branches for _, m in metrics if m.branches]
    sized = [(r, m) for r, m in metrics if r.question.is_multi_part and r.question.answers]
    return {
        "branches": branches,
        "closed_by_model": decoded / branches if branches else 0.0,
        "ci95": bootstrap_interval(shares) if shares else (0.0, 0.0),
        "as_many_branches_as_parts": fmean(m.branches == len(r.question.answers) for r, m in sized)
        if sized
        else None,
        "critical_path_over_total": fmean(m.critical_path / m.total for _, m in metrics) if metrics else None,
    }


def accuracy_figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Right parts of questions with several parts, and right answers of the others, where they can be verified."""
    figures: dict[str, Any] = {}
    for name, multi in (("several_parts", True), ("one_part", False)):
        right = [fmean(r.right) for r in replies if r.question.is_multi_part == multi and r.right]
        figures[name] = {"questions": len(right), "accuracy": fmean(right), "ci95": bootstrap_interval(right)}
    return figures


def log_likelihoods(model: str, replies: Sequence[Demonstration]) -> list[tuple[float, int]]:
    """For each reply the sum of the log-probabilities of its tokens, end of text included, and their number."""
    import torch
    from transformers import AutoModelForCausalLM

    from sgl_apr.training.collate import Collator, log_probabilities
    from sgl_apr.training.training_tree import build_training_tree

    tokenizer = HfTokenizer(model)
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    eos, collate, sums = min(tokenizer.eos_ids), Collator(), list[tuple[float, int]]()
    with torch.inference_mode():
        for reply in replies:
            tree = build_training_tree([prompt_trajectory(reply, tokenizer)], eos=eos)
            values = log_probabilities(network, collate([tree]))
            sums.append((float(values.sum()), len(values)))
    return sums


def perplexity_figures(
    base: Sequence[tuple[float, int]], trained: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    """Perplexities over all tokens of all replies, and their ratio with a bootstrap over replies."""

    def perplexity(sums: Sequence[tuple[float, int]]) -> float:
        return exp(-sum(s for s, _ in sums) / sum(n for _, n in sums))

    def ratio(pairs: Sequence[tuple[tuple[float, int], tuple[float, int]]]) -> float:
        return perplexity([t for _, t in pairs]) / perplexity([b for b, _ in pairs])

    pairs, rng = list(zip(base, trained, strict=True)), random.Random(0)
    ratios = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return {
        "replies": len(pairs),
        "base": perplexity(base),
        "trained": perplexity(trained),
        "ratio": ratio(pairs),
        "ci95": (ratios[RESAMPLES // 40], ratios[-RESAMPLES // 40 - 1]),
    }


def keyword_control(questions: Sequence[Demonstration]) -> dict[str, Any]:
    """How well the single best word of the training messages decides the held-out ones."""
    word, says_several = best_keyword(list(demonstrations("train", 2000)))
    return {"word": word, "balanced_accuracy": keyword_accuracy(questions, word, says_several)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the parts that were chosen."""
    model, base = locate_model(options.model), locate_model(options.base)
    questions = list(demonstrations("test", options.questions, SEED))
    result: dict[str, Any] = {"hardware": hardware(), "model": options.model, "questions": len(questions)}
    if "forks" in options.parts:
        with apr.Server(model, max_total_tokens=options.pool) as server:
            replies = asyncio.run(answer_all(server.url, questions, "auto"))
        result["decision"] = decision_figures(replies)
        result["keyword_control"] = keyword_control(questions)
        result["closing"], result["answers"] = closing_figures(replies), accuracy_figures(replies)
    if "base" in options.parts:
        with apr.Server(base, max_total_tokens=options.pool) as server:
            replies = asyncio.run(answer_all(server.url, [d for d in questions if d.answers], "sequential"))
        result["answers_of_base"] = accuracy_figures(replies)
    if "perplexity" in options.parts:
        plain = list(dict.fromkeys(islice(plain_demonstrations("test"), options.plain)))  # there may be fewer
        result["perplexity"] = perplexity_figures(log_likelihoods(base, plain), log_likelihoods(model, plain))
    return result


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    lines = []
    for part, name, figure, bar in (
        ("decision", "balanced_accuracy", "balanced accuracy of the decision to fork", DECISION),
        ("closing", "closed_by_model", "branches that the model closes", CLOSED),
    ):
        if part in result and result[part][name] < bar:
            lines.append(f"{figure}: {result[part][name]:.1%}, expected at least {bar:.0%}")
    if "perplexity" in result and (ratio := result["perplexity"]["ratio"]) > PERPLEXITY:
        lines.append(
            f"perplexity of plain replies: {ratio:.3f} times that of the base model, expected at most {PERPLEXITY}"
        )
    return lines


def show(result: dict[str, Any]) -> None:
    """Print tables for people."""
    console = Console(width=120)
    table = Table(
        "figure",
        "found",
        "95% interval",
        "bar",
        title=f"{result['model']}, {result['questions']} held-out questions",
    )

    def add_share(name: str, share: float, interval: Interval | None, bar: float | None = None) -> None:
        shown = f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
        table.add_row(name, f"{share:.1%}", shown, "" if bar is None else f"{bar:.0%}")

    if decision := result.get("decision"):
        control, closing = result["keyword_control"], result["closing"]
        add_share(
            "decision to fork, balanced accuracy", decision["balanced_accuracy"], decision["ci95"], DECISION
        )
        add_share(f"the same, by the word {control['word']!r} alone", control["balanced_accuracy"], None)
        add_share("branches closed by the model", closing["closed_by_model"], closing["ci95"], CLOSED)
    for name, label in (("answers", "right"), ("answers_of_base", "right, base model")):
        for kind, row in result.get(name, {}).items():
            add_share(f"{label}: {kind.replace('_', ' ')}", row["accuracy"], row["ci95"])
    if perplexity := result.get("perplexity"):
        low, high = perplexity["ci95"]
        table.add_row(
            "perplexity of plain replies / base",
            f"{perplexity['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{PERPLEXITY}",
        )
    console.print(table)
    if decision:
        kinds = Table("kind of question", "parts", "questions", "forks")
        for kind, row in decision["by_kind"].items():
            parts = "several" if row["several_parts"] else "one"
            kinds.add_row(kind, parts, str(row["count"]), f"{row['forks']:.1%}")
        console.print(kinds)


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2:trained", metavar="MODEL")
    parser.add_argument("--base", default="smollm2", help="the model before training (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=400, help="held-out questions (default: %(default)s)"
    )
    parser.add_argument(
        "--plain", type=int, default=120, help="held-out plain replies (default: %(default)s)"
    )
    parser.add_argument(
        "--pool", type=int, default=32768, help="KV tokens of the server (default: %(default)s)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="what is measured (default: all): %(choices)s",
        metavar="PART",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    result = measure(options)
    return finish(result, missed(result), show, options)


if __name__ == "__main__":
    sys.exit(main())
