"""Groups of workers in SGLang's scheduler: whether their tokens are those of transformers, and the time of a step.

python -m benchmarks.kv_join.groups [--json] [--check] [--parts equal steps] [--reps 7] [--steps 24]

The first part decodes greedily with a small random model, with and without overlap, and compares every token with a
forward pass with explicit masks and positions. Its controls are references in which workers do not see each other, Group Think has
no position ranges, or queries of Hogwild! are not turned. The second part times decode steps on the shape of SmolLM2
(random weights) with 4 workers, and with 4 independent requests after the same prompt. All run in one scheduler in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.checks import finish
from benchmarks.common.in_process_scheduler import (
    close_scheduler,
    make_request,
    make_scheduler,
    memory_state,
    run_requests,
)
from benchmarks.common.machine import hardware, versions
from benchmarks.common.worker_groups import CONTROLS, WorkerGroupCase, compare_group
from benchmarks.kv_join.latency import interval
from sgl_apr.server.constants import CPU_ATTENTION_BACKEND
from sgl_apr.training.models import random_llama
from tests.support.group_reference import load_reference

Kind = Literal["group_think", "hogwild"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARTS = ("equal", "steps")
MAX_STEP_RATIO = {"group_think": 1.1, "hogwild": 1.35}
MAX_CONTROL_SHARE = 0.5  # of tokens that a control may have by chance
MAX_LOGPROB_ERROR = 1e-4  # nats
# Headers and new tokens of the workers of each group: 2 to 8 workers, alike and not.
SIZES = (
    ((4, 4), (96, 96)),
    ((3, 7, 2), (64, 64, 64)),
    ((3, 3, 5, 2), (64, 32, 16, 64)),
    ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 30, 64, 40, 50, 64, 30)),
)
STEP_END = "e"  # the random model writes it in one of ten tokens

WORKERS, HEADER = 4, 4
PROMPTS = (256, 2048)
SMOLLM2_SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
EDGE_ROUNDS = 4  # at the beginning and end of a run, in which not all requests decode


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The time of a decode step of a group, relative to that of independent requests.

    Attributes:
        kind: The kind of the group.
        prompt_tokens: Tokens of the common prompt.
        workers: Number of workers, and of independent requests.
        independent_ms: Median milliseconds of a step of the independent requests.
        group_ms: The same for the group.
        ratio: The median over all repetitions of the ratio of both.
        interval: Its 95% bootstrap interval.
    """

    kind: Kind
    prompt_tokens: int
    workers: int
    independent_ms: float
    group_ms: float
    ratio: float
    interval: tuple[float, float]


def measure_equality(directory: Path) -> dict[str, Any]:
    """Count the greedy tokens that are those of transformers, for both kinds of group and their controls."""
    from transformers import AutoTokenizer

    model = random_llama(directory, layers=4, hidden=256, seed=3)
    reference, tokenizer = load_reference(model), AutoTokenizer.from_pretrained(model)
    rng = random.Random(1)
    equal: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
    controls = {kind: {control: [0, 0] for control in CONTROLS[kind]} for kind in KINDS}
    worst, leaks = 0.0, 0

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, 400) for _ in range(count)]

    for overlap in (True, False):
        scheduler = make_scheduler(model, overlap=overlap)
        before = memory_state(scheduler)
        variants: list[tuple[Kind, str | None]] = [*((kind, None) for kind in KINDS), ("hogwild", STEP_END)]
        for kind, step_end in variants:
            prompt = draw(60)
            run_requests(scheduler, [(0, make_request("commit", prompt, 1))])
            for number, (headers, news) in enumerate(SIZES):
                name = f"{kind}-{step_end}-{number}"
                case = WorkerGroupCase(
                    name, kind, prompt, [draw(n) for n in headers], news, step_end=step_end
                )
                run = run_requests(scheduler, case.due())
                result = compare_group(case, run, reference, tokenizer)
                _add(equal[kind], result.equal, result.tokens)
                worst = max(worst, result.logprob_error)
                for control in CONTROLS[kind] if step_end is None else ():
                    other = compare_group(case, run, reference, tokenizer, control)
                    _add(controls[kind][control], other.equal, other.tokens)
        leaks += memory_state(scheduler) != before
        close_scheduler(scheduler)
    return {"equal": equal, "controls": controls, "logprob_error": worst, "leaks": leaks}


def _add(counts: list[int], equal: int, tokens: int) -> None:
    counts[0] += equal
    counts[1] += tokens


def measure_steps(directory: Path, reps: int, steps: int) -> list[StepTimes]:
    """Time decode steps of groups and of independent requests in turns, in one scheduler."""
    model = random_llama(directory, layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | SMOLLM2_SHAPE))
    scheduler = make_scheduler(
        model, load_format="dummy", attention_backend=CPU_ATTENTION_BACKEND, max_total_tokens=8192
    )
    rng, rows = random.Random(2), list[StepTimes]()

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, 400) for _ in range(count)]

    def step_ms(kind: Kind | None, prompt: list[int]) -> float:
        case = WorkerGroupCase(
            "timed", kind or "hogwild", prompt, [draw(HEADER)] * WORKERS, [steps] * WORKERS
        )
        requests = case.requests(logprobs=False)
        if kind is None:
            for request in requests:
                request.sampling_params.custom_params = None
        run = run_requests(scheduler, [(0, request) for request in requests], limit_s=600)
        if any(len(output) != steps for output in case.outputs(run)):
            raise RuntimeError(f"{kind or 'independent requests'}: {run.finish_reason(case.rid(0))}")
        return 1000 * statistics.median(run.round_seconds[EDGE_ROUNDS:-EDGE_ROUNDS])

    for prompt_tokens in PROMPTS:
        prompt = draw(prompt_tokens)
        run_requests(scheduler, [(0, make_request("commit", prompt, 1, logprobs=False))], limit_s=600)
        times: dict[Kind | None, list[float]] = {None: [], "group_think": [], "hogwild": []}
        for rep in track(range(reps + 1), f"prompt of {prompt_tokens}", console=Console(stderr=True)):
            for kind in rng.sample([*times], len(times)):
                ms = step_ms(kind, prompt)
                if rep:  # the first one is warm-up
                    times[kind].append(ms)
        for kind in KINDS:
            ratios = [a / b for a, b in zip(times[kind], times[None], strict=True)]
            medians = [statistics.median(times[key]) for key in (None, kind)]
            low, high = interval([ratios], rng)
            ratio = statistics.median(ratios)
            rows.append(StepTimes(kind, prompt_tokens, WORKERS, medians[0], medians[1], ratio, (low, high)))
    close_scheduler(scheduler)
    return rows


def missed(results: dict[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    problems = []
    for kind, (equal, tokens) in results.get("equal", {}).items():
        if equal < tokens or tokens < 1000:
            problems.append(
                f"{kind}: {equal} of {tokens} tokens are those of transformers, expected all of 1000 or more"
            )
    for kind, controls in results.get("controls", {}).items():
        for control, (equal, tokens) in controls.items():
            if equal > MAX_CONTROL_SHARE * tokens:
                problems.append(
                    f"{kind}: {equal} of {tokens} tokens are those of the control {control}, expected others"
                )
    if results.get("logprob_error", 0) > MAX_LOGPROB_ERROR:
        problems.append(
            f"a log-probability differs by {results['logprob_error']:.1e}, expected {MAX_LOGPROB_ERROR}"
        )
    if results.get("leaks"):
        problems.append("slots or rows were neither free nor evictable afterwards")
    for row in results.get("steps", ()):
        if row["ratio"] > MAX_STEP_RATIO[row["kind"]]:
            problems.append(
                f"{row['kind']}, prompt of {row['prompt_tokens']}: {row['ratio']:.2f} of independent requests, "
                f"expected at most {MAX_STEP_RATIO[row['kind']]}"
            )
    return problems


def show(results: dict[str, Any]) -> None:
    console = Console(width=120)
    if "equal" in results:
        table = Table("group", "compared with", "equal", "tokens", title="Greedy tokens")
        for kind, counts in results["equal"].items():
            table.add_row(kind, "transformers", *map(str, counts))
            for control, other in results["controls"][kind].items():
                table.add_row(kind, f"control: {control}", *map(str, other))
        console.print(table)
        console.print(f"largest difference of a log-probability: {results['logprob_error']:.1e} nats")
    if rows := results.get("steps"):
        table = Table(*rows[0], title="Milliseconds of a decode step (shape of SmolLM2)")
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)


def worst_ratios(rows: Sequence[StepTimes]) -> dict[str, float]:
    """For each kind, the largest ratio over all prompts."""
    return {kind: max(row.ratio for row in rows if row.kind == kind) for kind in KINDS}


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: everything)")
    add("--reps", type=int, default=7, help="repetitions of every timed run (default: %(default)s)")
    add("--steps", type=int, default=24, help="decode steps of every timed run (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        if "equal" in options.parts:
            results |= measure_equality(Path(directory) / "equal")
        if "steps" in options.parts:
            rows = measure_steps(Path(directory) / "steps", options.reps, options.steps)
            results |= {"step_ratio": worst_ratios(rows), "steps": [asdict(row) for row in rows]}
    results |= {"hardware": hardware(), "versions": versions("sgl-apr", "sglang", "torch", "transformers")}
    return finish(results, missed(results), show, options)


if __name__ == "__main__":
    sys.exit(main())
