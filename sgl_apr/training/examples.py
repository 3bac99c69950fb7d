"""The training trees of an SFT run, from the symbolic expert or from a file of trajectories; reproducible from a seed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.expert import SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems, two_number_problems
from sgl_apr.evaluation.tasks.countdown.search import SOLUTION_MARK
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.config import Data
from sgl_apr.training.training_tree import TrainingTree, build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory

CHUNK_SIZE = 256  # trajectories that are made, split into trees and batched by length together


class Examples(Protocol):
    """What a run learns from, in chunks; chunk n is the same every time."""

    def chunk(self, number: int) -> Sequence[Any]:
        """One chunk: training trees, or what an objective makes of trajectories."""
        ...

    def trajectories(self, number: int) -> Iterable[Trajectory]:
        """The trajectories of one chunk."""
        ...


class CountdownExamples:
    """Demonstrations of training problems by the expert, who searches in another way each time that a problem comes up.

    Where demonstrations differ in what their grammar allows, a loss counts only the tokens that it does, as the mask does when
    the model decodes.

    Raises:
        AprError: If the configuration asks for impossible problems or widths.
    """

    def __init__(self, data: Data, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer, self.eos = data, tokenizer, min(tokenizer.eos_ids)
        if len(data.width) != 2:
            raise AprError(
                f"width = {list(data.width)}, expected the smallest and the largest number of branches"
            )
        forks = {int(size): share for size, share in data.forks.items()}
        self.style = SearchStyle(
            data.window, forks, (data.width[0], data.width[1]), data.revisit_rate, data.hint_rate, data.depth
        )
        self.problems: Sequence[Problem] = list(_training_problems(data))
        self.dialects = [dialect(name) for name in data.dialects]
        if not self.dialects:
            raise AprError("dialects = [], expected the format of the demonstrations")

    def chunk(self, number: int) -> list[TrainingTree]:
        rng = random.Random(f"{self.data.seed} {number}")
        return [
            replace(tree, excluded=self._excluded_ids(n))
            for n, trajectory in enumerate(self.trajectories(number), number * CHUNK_SIZE)
            for tree in self._select_trees(trajectory, rng)
        ]

    def trajectories(self, number: int) -> list[Trajectory]:
        return asyncio.run(self._demonstrations(range(number * CHUNK_SIZE, (number + 1) * CHUNK_SIZE)))

    def _select_trees(self, trajectory: Trajectory, rng: random.Random) -> list[TrainingTree]:
        """The tree of the trunk and the trees of a few random branches, first of branches that found a solution."""
        kv = self.data.join or ("kv" if dialect(trajectory.dialect).published_join == "kv" else None)
        built = build_training_tree([trajectory], eos=self.eos, join=kv, separate_contexts=True)
        if self.data.answer_weight != 1 and trajectory.blocks:
            is_answer = np.isin(built.spans, trajectory.answer_spans)
            weights = np.where(is_answer, np.float32(self.data.answer_weight), np.float32(1))
            built = replace(built, weights=weights)
        trees = [t for t in built.split() if len(t.spans)]
        if not self.data.branches:
            return trees
        spans = trajectory.spans
        trunk = [t for t in trees if not spans[t.spans[0]].path]
        rest = [t for t in trees if spans[t.spans[0]].path]
        rng.shuffle(rest)
        rest.sort(key=lambda t: not any(SOLUTION_MARK in spans[k].text for k in set(t.spans.tolist())))
        return trunk + rest[: self.data.branches]

    async def _demonstrations(self, numbers: range) -> list[Trajectory]:
        size = len(self.problems)
        return [
            await demonstration(
                self.problems[n % size],
                self.tokenizer,
                seed=n // size,
                style=replace(self.style, forks={}) if self._is_sequential(n) else self.style,
                target_dialect=self._dialect(n),
                state_width=not self._is_sequential(n) and self._draw(n, "width") < self.data.state_width,
            )
            for n in numbers
        ]

    def _draw(self, n: int, what: str) -> float:
        """A random number from 0 to 1 that belongs to one demonstration."""
        return random.Random(f"{self.data.seed} {n} {what}").random()

    def _is_sequential(self, n: int) -> bool:
        """Whether a demonstration has no forks. A format without a trunk always begins with its branches."""
        has_trunk = "trunk" in self._dialect(n).grammar.rules
        return has_trunk and self._draw(n, "sequential") < self.data.sequential

    def _dialect(self, n: int) -> Dialect:
        """The format of a demonstration. Where a problem comes up again, it is in the next format."""
        return self.dialects[(n + n // len(self.problems)) % len(self.dialects)]

    @lru_cache(maxsize=64)  # noqa: B019  # a run has one instance
    def _excluded_tags(self, allowed: tuple[str, ...]) -> tuple[int, ...]:
        tags = {tag for each in self.dialects for tag in each.tags} - set(allowed)
        ids = (self.tokenizer.special_token_id(tag) for tag in tags)
        return tuple(sorted(i for i in ids if i is not None))

    def _excluded_ids(self, n: int) -> tuple[int, ...]:
        """The tags that the grammar of a demonstration does not allow. A model that never forks chooses so among all tags."""
        without_forks = self.data.sequential < 1 and self._is_sequential(n)
        return self._excluded_tags(() if without_forks else self._dialect(n).tags)


def _training_problems(data: Data) -> Iterator[Problem]:
    """As many problems as configured, their sizes in turn. Problems of two numbers are few, and repeat."""
    if data.problems < 1 or not data.numbers or min(data.numbers) < 2:
        raise AprError(
            f"problems = {data.problems} with numbers = {list(data.numbers)}, expected some, with at least 2 each"
        )
    rng = random.Random(f"{data.seed} solvable")
    kinds = [
        (size, size == 2 or rng.random() >= data.unsolvable)
        for size in islice(cycle(data.numbers), data.problems)
    ]
    pools: dict[tuple[int, bool], Iterator[Problem]] = {
        (size, solvable): iter(
            list(generate_problems(count, "train", seed=data.seed, numbers=(size,), solvable=solvable))
        )
        for (size, solvable), count in Counter(kinds).items()
        if size > 2
    }
    two_numbers = two_number_problems("train")
    pools[2, True] = cycle(random.Random(data.seed).sample(two_numbers, len(two_numbers)))
    for kind in kinds:
        yield next(pools[kind])


class FileExamples:
    """Trajectories of a file, in another order on every pass.

    Raises:
        AprError: If the file is empty or cannot be read, or another tokenizer made it.
    """

    def __init__(self, data: Data, tokenizer: Tokenizer) -> None:
        self.data, self.eos, self.path = data, min(tokenizer.eos_ids), Path(data.path)
        self.offsets = list(_line_offsets(self.path))
        if not self.offsets:
            raise AprError(f"{self.path} is empty, expected a trajectory in every line")
        for text in islice(self._texts(0), 8):
            _check_tokenizer(Trajectory.from_json(text), tokenizer, self.path)

    def chunk(self, number: int) -> list[TrainingTree]:
        join = self.data.join or None
        return [
            tree
            for trajectory in self.trajectories(number)
            for tree in build_training_tree(
                [trajectory], eos=self.eos, join=join, separate_contexts=True
            ).split()
        ]

    def trajectories(self, number: int) -> Iterator[Trajectory]:
        return map(Trajectory.from_json, self._texts(number))

    @lru_cache(maxsize=2)  # noqa: B019  # a run has one instance
    def _order(self, epoch: int) -> list[int]:
        """Byte offsets of the lines, in the order of one pass."""
        return random.Random(f"{self.data.seed} {epoch}").sample(self.offsets, len(self.offsets))

    def _texts(self, number: int) -> Iterator[str]:
        """The lines of one chunk."""
        with self.path.open("rb") as file:
            for k in range(number * CHUNK_SIZE, (number + 1) * CHUNK_SIZE):
                epoch, index = divmod(k, len(self.offsets))
                file.seek(self._order(epoch)[index])
                yield file.readline().decode("utf-8")


def _line_offsets(path: Path) -> Iterator[int]:
    """Byte offsets of the lines that are not blank."""
    try:
        with path.open("rb") as file:
            at = 0
            for line in file:
                if line.strip():
                    yield at
                at += len(line)
    except OSError as error:
        raise AprError(f"{path} cannot be read: {error.strerror}") from None


def _check_tokenizer(trajectory: Trajectory, tokenizer: Tokenizer, path: Path) -> None:
    for span in trajectory.spans:
        if (
            span.token_ids is not None
            and tokenizer.decode(span.token_ids) != span.text
            and span.text.isascii()
        ):
            raise AprError(
                f"{path} was made with another tokenizer: the model's does not decode its ids "
                f"{list(span.token_ids[:8])} to {span.text[:40]!r}"
            )


def make_examples(data: Data, tokenizer: Tokenizer) -> Examples:
    """The examples that a configuration asks for."""
    return FileExamples(data, tokenizer) if data.path else CountdownExamples(data, tokenizer)
