"""Trajectories as training data: every token is computed once, and sees what it saw when it was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sgl_apr.errors import AprError, SharedViewUnsupported
from sgl_apr.training.trie import ROOT, Cursor, FlatTree, Ints, Trie
from sgl_apr.trajectory.join_layout import Layout
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.trajectory import Trajectory

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TrainingTree:
    """A tree of n tokens with m losses: one for each decoded token, none for injected tokens.

    Attributes:
        tree: The tokens, and how they see one another.
        sources: (m,), index of the token that predicts the target.
        targets: (m,), the decoded token id: a child of its source in the tree, which may have several.
        spans: (m,), the span of its trajectory that the target belongs to.
        trajectories: (m,), the trajectory that it belongs to.
        excluded: Token ids that were not allowed where the targets were decoded.
        weights: (m,), what each loss counts. None for 1 each.
    """

    tree: FlatTree
    sources: Ints
    targets: Ints
    spans: Ints
    trajectories: Ints
    excluded: tuple[int, ...] = ()
    weights: Floats | None = None

    @property
    def tokens(self) -> int:
        """n, the number of tokens."""
        return len(self.tree.token_ids)

    def split(self) -> list[TrainingTree]:
        """One tree per root: contexts that share nothing, such as branches that got a message."""
        tree, parts, begin = self.tree, list[TrainingTree](), 0
        while begin < self.tokens:
            end = int(tree.ends[begin])
            own = (self.sources >= begin) & (self.sources < end)
            losses = (self.targets[own], self.spans[own], self.trajectories[own])
            part = tree.slice_tokens(begin, end)
            weights = None if self.weights is None else self.weights[own]
            sources = self.sources[own] - np.int32(begin)
            parts.append(TrainingTree(part, sources, *losses, self.excluded, weights))
            begin = end
        return parts


def build_training_tree(
    trajectories: Iterable[Trajectory],
    *,
    eos: int | None = None,
    join: Literal["kv", "text"] | None = None,
    separate_contexts: bool = False,
) -> TrainingTree:
    """Merge everything that inference read for some trajectories into one prefix tree, flattened depth first.

    This is ThreadWeaver's training structure (arXiv 2512.07843, section 4), for any number of trajectories: they share
    common prefixes, and see nothing else of one another. A block that was joined as text is in it twice: its branches in
    parallel, as they were written, and sequentially, as they were read again. A block that was joined in the KV cache
    is in it once, with the visibility of `apr.causality` (Multiverse, arXiv 2506.09991, section 4).

    Args:
        trajectories: Trajectories with token ids.
        eos: Id of the end-of-text token, which then has a loss wherever it was decoded. In a trajectory that was parsed
            from text it is taken to end the trunk.
        join: How all blocks are joined instead, for a model that is to be trained on the other kind of join.
        separate_contexts: Let separate contexts (branches that got a message, other trajectories) share nothing, so that
            `TrainingTree.split` can separate them. Rows are shorter, and a few tokens are computed again.

    Raises:
        AprError: For a trajectory without token ids, and for one that lost a KV join in its middle.
        SharedViewUnsupported: For a trajectory with a group of workers, whose tokens saw those of other branches.
    """
    trie, losses = Trie(), _Losses([], [], [], [])
    for k, trajectory in enumerate(trajectories):
        _TreeBuilder(trie, trajectory, join, separate_contexts).add_spans(losses, k, eos)
    tree, index = trie.flatten()
    sources = np.asarray(losses.sources, dtype=np.int32)
    return TrainingTree(
        tree,
        index[sources] if len(sources) else sources,
        np.asarray(losses.targets, dtype=np.int32),
        np.asarray(losses.spans, dtype=np.int32),
        np.asarray(losses.trajectories, dtype=np.int32),
    )


def logprobs(training_tree: TrainingTree, trajectories: Sequence[Trajectory]) -> Floats:
    """The log-probability that the engine reported for every token with a loss, (m,).

    They belong to the policy that was sampled from: with the grammar's mask and the temperature. They are NaN where a request
    was aborted before the engine reported them.

    Args:
        training_tree: The tree.
        trajectories: The trajectories that it was built from, in the same order.

    Raises:
        AprError: For a trajectory that was made without `logprobs=True`.
    """
    values: list[float] = []
    for k, trajectory in enumerate(trajectories):
        if all(call.logprobs is None for call in trajectory.calls):
            raise AprError("this trajectory has no log-probabilities: make it with logprobs=True")
        read = Counter[int]()  # by call: how many of its log-probabilities were read
        spans = training_tree.spans[training_tree.trajectories == k]
        for span, count in Counter(spans.tolist()).items():
            call = trajectory.spans[span].call
            reported = None if call is None else trajectory.calls[call].logprobs
            if call is None or reported is None:
                values += [np.nan] * count
            else:
                values += reported[read[call] : read[call] + count]
                read[call] += count
    return np.asarray(values, dtype=np.float32)


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


class _TreeBuilder:
    """Inserts one trajectory into a tree, span by span: parents come before children."""

    def __init__(
        self, trie: Trie, trajectory: Trajectory, join: Literal["kv", "text"] | None, separate_contexts: bool
    ) -> None:
        if join is None and (lost := trajectory.lost_joins):
            raise AprError(f"the cache lost a join in the middle of this trajectory: {lost[0].why}")
        if trajectory.groups:
            raise SharedViewUnsupported(
                f"block {trajectory.groups[0].path} is a group of workers ({trajectory.groups[0].kind}), which a training tree "
                "cannot express: a token of a tree sees its ancestors, and a worker sees tokens of others as they are written"
            )
        self.trie, self.trajectory, self.spans = trie, trajectory, trajectory.spans
        self.join, self.separate_contexts = join, separate_contexts
        self.joined = {j.path for j in trajectory.joins if j.by == "kv"}
        self.prompt_layout = trajectory.joined_prefix if join != "text" else ()
        self.cursors: list[Cursor] = []  # after every span
        self.forks: dict[Path, tuple[int, ...]] = {}  # by block: the spans that its branches follow
        self.with_eos = set(_spans_with_eos(trajectory))
        for span in self.spans:
            for depth in range(1, len(span.path), 2):
                self.forks.setdefault(span.path[:depth], span.parents)

    def add_spans(self, losses: _Losses, number: int, eos: int | None) -> None:
        for i, span in enumerate(self.spans):
            if span.token_ids is None:
                raise AprError(
                    "this trajectory was parsed without token ids: parse it with tokenizer= to train on it"
                )
            before = self._cursor_before(i)
            if span.origin == "prompt" and self.prompt_layout:
                self.cursors.append(self._insert_joined(before, span.token_ids))
                continue
            after, nodes = self.trie.insert(before, span.token_ids)
            self.cursors.append(after)
            decoded = span.token_ids if span.origin == "decoded" else ()
            if eos is not None and i in self.with_eos:
                decoded = (*decoded, eos)
                nodes = np.append(nodes, -1)
            if decoded:
                if before.node < 0 or before.ends:
                    raise AprError(f"span {i} was decoded at the very start, or directly after a join")
                losses.add([before.node, *nodes[:-1].tolist()], decoded, i, number)

    def _insert_joined(self, cursor: Cursor, ids: Sequence[int]) -> Cursor:
        """Insert a prompt whose beginning was joined in the KV cache in earlier turns."""
        position = 0

        def insert(cursor: Cursor, layout: Layout) -> Cursor:
            nonlocal position
            for item in layout:
                if isinstance(item, int):
                    if item:
                        cursor, _ = self.trie.insert(cursor, ids[position : position + item])
                    position += item
                else:
                    branches = [replace(cursor, join_group=k) for k in range(1, len(item) + 1)]
                    ends = [insert(branch, own) for branch, own in zip(branches, item, strict=True)]
                    cursor = self.trie.join(cursor, ends)
            return cursor

        cursor = insert(cursor, self.prompt_layout)
        return self.trie.insert(cursor, ids[position:])[0]

    def _is_joined(self, block: Path) -> bool:
        """Whether the branches of a block were joined in the KV cache."""
        return self.join == "kv" or (self.join is None and block in self.joined)

    def _in_branch(self, p: int, path: Path) -> bool:
        """Whether span `p` ends a branch of the sequence `path`; a returned message is in the sequence itself."""
        return len(self.spans[p].path) > len(path) and self.spans[p].role != "result"

    def _cursor_before(self, i: int) -> Cursor:
        """The cursor after everything that span `i` follows."""
        span = self.spans[i]
        ends = [p for p in span.parents if self._in_branch(p, span.path)]
        if not ends:
            if len(span.parents) > 1:
                raise AprError(f"span {i} follows {span.parents}, expected the branches of one block")
            if not span.parents:
                return replace(ROOT, join_group=len(self.trie) + 1) if self.separate_contexts else ROOT
            before = self.cursors[span.parents[0]]
            starts_branch = len(span.path) > len(self.spans[span.parents[0]].path)
            if starts_branch and self._is_joined(span.path[:-1]):
                return replace(before, join_group=span.path[-1])
            return before
        block = self.spans[ends[0]].path[: len(span.path) + 1]
        fork = min((self.forks[self.spans[p].path[: len(span.path) + 1]] for p in ends), default=())
        base = self.cursors[fork[0]] if fork else ROOT
        if self._is_joined(block):
            return self.trie.join(base, [self.cursors[p] for p in span.parents])
        seen = set(self.trajectory.ancestors(fork[0])) if fork else set[int]()
        for a in sorted({a for p in span.parents for a in self.trajectory.ancestors(p)} - seen):
            base, _ = self.trie.insert(base, self.spans[a].token_ids or ())
        return base


def _spans_with_eos(trajectory: Trajectory) -> Iterator[int]:
    """The spans after which an end-of-text token was decoded: their call has one token more than its spans."""
    tokens, last = Counter[int](), dict[int, int]()
    for i, span in enumerate(trajectory.spans):
        if span.call is not None:
            tokens[span.call] += span.tokens
            last[span.call] = i
    yield from (i for call, i in last.items() if trajectory.calls[call].output_tokens > tokens[call])
    if not trajectory.calls and trajectory.spans and trajectory.finish in (None, "eos"):
        yield max(i for i, span in enumerate(trajectory.spans) if not span.path)
