"""Find a benchmark by its name."""

from __future__ import annotations

from sgl_apr.errors import AprError
from sgl_apr.evaluation.benchmarks.base import Benchmark
from sgl_apr.evaluation.tasks.countdown.problems import Split

BENCHMARK_NAMES = ("countdown", "game24", "gym:NAME", "FILE.jsonl")


def benchmark(name: str, limit: int, split: Split = "test", seed: int = 0) -> Benchmark:
    """The benchmark of a name.

    Args:
        name: "countdown", "game24", "gym:NAME" or a path "FILE.jsonl".
        limit: Problems at most.
        split: For generated problems: "test", or "train" to choose settings by.
        seed: Seed of generated problems. The problems of a file are taken in order.

    Raises:
        AprError: If there is no such benchmark.
    """
    from sgl_apr.evaluation.benchmarks import games, gym, problem_file

    kind, _, rest = name.partition(":")
    if limit < 1:
        raise AprError(f"limit={limit}, expected at least 1")
    if name in ("countdown", "game24"):
        game: Benchmark = getattr(games, name)(limit, split, seed)
        return game
    if kind == "gym" and rest:
        return gym.gym(rest, limit, split, seed)
    if name.endswith(".jsonl"):
        return problem_file.problem_file(name, limit)
    raise AprError(f"no task {name!r}, expected one of {', '.join(BENCHMARK_NAMES)}")
