"""Find a benchmark by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sgl_apr.errors import AprError, did_you_mean
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.tasks.countdown.problems import Split
from sgl_apr.runtime.value_checks import shorten

BENCHMARK_NAMES = ("countdown", "countdown:VARIANT", "game24", "gym:NAME", "ledger:SIZE", "FILE.jsonl")


def benchmark(name: str, limit: int, split: Split = "test", seed: int | Sequence[int] = 0) -> Benchmark:
    """The benchmark of a name.

    A higher limit adds problems after those of a lower one, and another seed adds its problems after those of the
    first, so that an evaluation can be extended.

    Args:
        name: "countdown", "countdown:VARIANT" (see `games.countdown`), "game24", "gym:NAME", "ledger:SIZE" (see
            `long_context.ledger`), or a path "FILE.jsonl".
        limit: Problems at most, of each seed.
        split: For generated problems: "test", or "train" to choose settings by.
        seed: Seed of generated problems, or several. A problem that two seeds generate is taken once. The problems of
            a file are taken in order, whatever the seed.

    Raises:
        AprError: If there is no such benchmark.
    """
    seeds = list(dict.fromkeys([seed] if isinstance(seed, int) else seed))
    if limit < 1:
        raise AprError(f"limit={limit}, expected at least 1")
    if not seeds:
        raise AprError("no seed, expected at least one")
    if name.endswith(".jsonl"):
        return _of_seed(name, limit, split, seeds[0])
    return _merge({each: _of_seed(name, limit, split, each) for each in seeds})


def _of_seed(name: str, limit: int, split: Split, seed: int) -> Benchmark:
    from sgl_apr.evaluation.benchmarks import games, gym, long_context, problem_file

    kind, _, rest = name.partition(":")
    if kind == "countdown":
        return games.countdown(limit, split, seed, rest)
    if name == "game24":
        return games.game24(limit, split, seed)
    if kind == "gym" and rest:
        return gym.gym(rest, limit, split, seed)
    if kind == "ledger":
        return long_context.ledger(rest, limit, split, seed)
    if name.endswith(".jsonl"):
        return problem_file.problem_file(name, limit)
    close = f" ({proposal})" if (proposal := did_you_mean(name, BENCHMARK_NAMES)) else ""
    raise AprError(f"no task {shorten(name)}{close}, expected one of {', '.join(BENCHMARK_NAMES)}")


def _merge(by_seed: dict[int, Benchmark]) -> Benchmark:
    """One benchmark with the problems of several seeds. Each answer is judged by the benchmark of its seed."""
    first = next(iter(by_seed.values()))
    cases: list[Case] = []
    judges: dict[str, Benchmark] = {}
    for seed, of_seed in by_seed.items():
        names, problems = {case.name for case in cases}, {case.problem for case in cases if len(by_seed) > 1}
        for number, case in enumerate(of_seed.cases):
            if case.name not in names and case.problem not in problems:
                judges[case.name] = of_seed
                cases.append(replace(case, key=(seed, number)))

    def is_correct(case: Case, answer: str) -> bool:
        return judges.get(case.name, first).is_correct(case, answer)

    return replace(first, cases=cases, is_correct=is_correct)
