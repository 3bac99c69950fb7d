"""Trajectories as what a model is trained on: every token computed once, seeing what it saw when it was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sgl_apr.errors import AprError
from sgl_apr.training.trie import ROOT, Cursor, FlatTree, Ints, Trie
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.trajectory import Trajectory

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TrainingTree:
    """n tokens in one line and m losses: one for every token that a model decoded, none for what was injected.

    tree: the tokens and how they see one another (see `Flat`).
    sources: (m,), the index of the token behind which it was decoded.
    targets: (m,), the token id that was decoded: a child of its source in the tree, which may have several.
    spans: (m,), which span of its trajectory it belongs to.
    trajectories: (m,), which trajectory.
    """

    tree: FlatTree
    sources: Ints
    targets: Ints
    spans: Ints
    trajectories: Ints

    @property
    def tokens(self) -> int:
        """n."""
        return len(self.tree.token_ids)

    def split(self) -> list[TrainingTree]:
        """One for each root: contexts that have nothing in common, as of branches that got a message."""
        tree, found, begin = self.tree, list[TrainingTree](), 0
        while begin < self.tokens:
            end = int(tree.ends[begin])
            own = (self.sources >= begin) & (self.sources < end)
            rest = (self.targets[own], self.spans[own], self.trajectories[own])
            found.append(
                TrainingTree(tree.slice_tokens(begin, end), self.sources[own] - np.int32(begin), *rest)
            )
            begin = end
        return found


def build_training_tree(
    trajectories: Iterable[Trajectory],
    *,
    eos: int | None = None,
    join: Literal["kv", "text"] | None = None,
    separate_contexts: bool = False,
) -> TrainingTree:
    """The sequences that inference has read, merged into one prefix tree and flattened depth first.

    That is ThreadWeaver's training structure (arXiv 2512.07843, section 4), of any number of trajectories:
    they share the prefixes that they have in common and see nothing else of one another. A block that was
    joined as text stands in it twice: its branches side by side, as they were written, and in a line, as
    they were read again. One that was joined in the KV cache stands in it once, as `apr.causality` has it
    (Multiverse, arXiv 2506.09991, section 4). `join` says how all blocks are joined instead, for a model
    that is to be trained on the other kind.

    With `apart`, contexts of their own (of branches that got a message, of other trajectories) share nothing,
    so that `Structure.split` takes them from one another: rows are shorter, and a few tokens are computed again.
    With `eos`, the id of the end-of-text token, there is a loss for it too, wherever it was decoded; of a text
    that was read it is taken to end the trunk. Raises `AprError` for a trajectory without token ids, and for
    one that lost a KV join in its middle.
    """
    trie, losses = Trie(), _Losses([], [], [], [])
    for k, trajectory in enumerate(trajectories):
        _Reader(trie, trajectory, join, separate_contexts).read(losses, k, eos)
    tree, index = trie.flatten()
    sources = np.asarray(losses.sources, dtype=np.int32)
    return TrainingTree(
        tree,
        index[sources] if len(sources) else sources,
        *(np.asarray(x, dtype=np.int32) for x in (losses.targets, losses.spans, losses.trajectories)),
    )


def logprobs(found: TrainingTree, trajectories: Sequence[Trajectory]) -> Floats:
    """(m,), what the engine said of every token with a loss when it decoded it; the same trajectories in the same order.

    They are of the policy that it was sampled from: under the grammar's mask and the temperature; NaN where a
    request was cut before the engine said them. Raises `AprError` for a trajectory made without `logprobs=True`.
    """
    known: list[float] = []
    for k, trajectory in enumerate(trajectories):
        if all(call.logprobs is None for call in trajectory.calls):
            raise AprError("this trajectory has no log-probabilities: make it with logprobs=True")
        at = Counter[int]()
        for span, count in Counter(found.spans[found.trajectories == k].tolist()).items():
            call = trajectory.spans[span].call
            said = None if call is None else trajectory.calls[call].logprobs
            if call is None or said is None:
                known += [np.nan] * count
            else:
                known += said[at[call] : at[call] + count]
                at[call] += count
    return np.asarray(known, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Losses:
    sources: list[int]
    targets: list[int]
    spans: list[int]
    trajectories: list[int]

    def add(self, sources: Sequence[int], targets: Sequence[int], span: int, trajectory: int) -> None:
        self.sources.extend(sources)
        self.targets.extend(targets)
        self.spans.extend([span] * len(targets))
        self.trajectories.extend([trajectory] * len(targets))


class _Reader:
    """Puts one trajectory into a tree, span by span: parents come before children."""

    def __init__(
        self, trie: Trie, trajectory: Trajectory, join: Literal["kv", "text"] | None, apart: bool
    ) -> None:
        lost = [j for j in trajectory.joins if len(j.path) % 2 == 0]
        if lost and join is None:
            raise AprError(f"in the middle of this trajectory a join was lost: {lost[0].why}")
        self.trie, self.trajectory, self.spans = trie, trajectory, trajectory.spans
        self.join, self.apart = join, apart
        self.joined = {j.path for j in trajectory.joins if j.by == "kv"}
        self.behind: list[Cursor] = []  # of every span
        self.forks: dict[Path, tuple[int, ...]] = {}  # what the branches of a block follow
        self.ended = set(_spans_with_eos(trajectory))
        for span in self.spans:
            for depth in range(1, len(span.path), 2):
                self.forks.setdefault(span.path[:depth], span.parents)

    def read(self, losses: _Losses, number: int, eos: int | None) -> None:
        for i, span in enumerate(self.spans):
            if span.token_ids is None:
                raise AprError("this trajectory was read from text: parse it with tokenizer= to train on it")
            before = self._cursor_before(i)
            after, nodes = self.trie.insert(before, span.token_ids)
            self.behind.append(after)
            decoded = span.token_ids if span.origin == "decoded" else ()
            if eos is not None and i in self.ended:
                decoded = (*decoded, eos)
                nodes = np.append(nodes, -1)
            if decoded:
                if before.node < 0 or before.ends:
                    raise AprError(f"span {i} was decoded behind nothing, or at once behind a join")
                losses.add([before.node, *nodes[:-1].tolist()], decoded, i, number)

    def _is_joined(self, block: Path) -> bool:
        """Whether what follows a block sees its branches side by side."""
        return self.join == "kv" or (self.join is None and block in self.joined)

    def _in_branch(self, p: int, path: Path) -> bool:
        """Whether span `p` ends a branch of a sequence; a message that came back stands in the sequence itself."""
        return len(self.spans[p].path) > len(path) and self.spans[p].role != "result"

    def _cursor_before(self, i: int) -> Cursor:
        """Behind what span `i` follows."""
        span = self.spans[i]
        ends = [p for p in span.parents if self._in_branch(p, span.path)]
        if not ends:
            if len(span.parents) > 1:
                raise AprError(f"span {i} follows {span.parents}, expected the branches of one block")
            if not span.parents:
                return replace(ROOT, join_group=len(self.trie) + 1) if self.apart else ROOT
            before = self.behind[span.parents[0]]
            begins = len(span.path) > len(self.spans[span.parents[0]].path)
            return (
                replace(before, join_group=span.path[-1])
                if begins and self._is_joined(span.path[:-1])
                else before
            )
        block = self.spans[ends[0]].path[: len(span.path) + 1]
        fork = min((self.forks[self.spans[p].path[: len(span.path) + 1]] for p in ends), default=())
        base = self.behind[fork[0]] if fork else ROOT
        if self._is_joined(block):
            return self.trie.join(base, [self.behind[p] for p in span.parents])
        seen = set(self.trajectory.ancestors(fork[0])) if fork else set[int]()
        for a in sorted({a for p in span.parents for a in self.trajectory.ancestors(p)} - seen):
            base, _ = self.trie.insert(base, self.spans[a].token_ids or ())
        return base


def _spans_with_eos(trajectory: Trajectory) -> Iterator[int]:
    """The spans behind which an end of text was decoded: their call brought one token more than they have."""
    tokens, last = Counter[int](), dict[int, int]()
    for i, span in enumerate(trajectory.spans):
        if span.call is not None:
            tokens[span.call] += span.tokens
            last[span.call] = i
    yield from (i for call, i in last.items() if trajectory.calls[call].output_tokens > tokens[call])
    if not trajectory.calls and trajectory.spans and trajectory.finish in (None, "eos"):
        yield max(i for i, span in enumerate(trajectory.spans) if not span.path)
