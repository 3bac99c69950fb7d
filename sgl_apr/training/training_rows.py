"""Trajectories as rows of tokens with a mask, for trainers that know causal sequences only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.options import check_call, resolve_dialect
from sgl_apr.training.training_tree import TrainingTree, build_training_tree, logprobs
from sgl_apr.trajectory.trajectory import Trajectory

NO_KV_JOIN = (
    'which no row of one causal sequence can express: expected join="text" or "message", or a trainer that takes training trees '
    "(sgl-apr train, Collator)"
)


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One causal sequence that the engine has read, split into a prompt of p and a completion of c tokens.

    Attributes:
        prompt_ids: (p,), tokens before the first loss.
        completion_ids: (c,), the rest.
        mask: (c,), 1 for a decoded token whose loss is in this row, 0 for a token that is context here.
        logprobs: (c,), the log-probability that the server reported for each token with a loss; None elsewhere, and where
            it reported none.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float | None, ...]


def row_options(dialect: Dialect | str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `areason` for trajectories that rows can express: joined as text, where the dialect has that.

    Args:
        dialect: The format. If it is None, the tokenizer decides about it later, and `join` stays as it is.
        options: The options.

    Raises:
        AprError: An option is wrong, or asks for joins in the KV cache.
    """
    check_call(dialect, options)
    if options.get("join") == "kv":
        raise AprError(f"found join='kv', {NO_KV_JOIN}")
    by_text = dialect is not None and "text" in resolve_dialect(dialect).joins
    return {"join": "text", **options} if by_text else dict(options)


def build_training_rows(trajectory: Trajectory, *, eos: int | None = None) -> list[TrainingRow]:
    """The sequences of a trajectory's training tree, from root to leaf, each decoded token with one loss in all of them.

    The first row ends where the trunk ends. It is the only one if nothing was forked. Of a block that was joined as text it has
    the branches one after another, as the conclusion read them. Only the first of these read what stands before it there, so each
    other branch has a row of its own, as every branch has that was joined by message. Where results replace the fork in the context
    of the trunk, the text up to each fork has a row, too. A row computes the tokens that it shares with others again, which a
    training tree does not.

    Args:
        trajectory: A trajectory with token ids.
        eos: Id of the end-of-text token, as for `build_training_tree`.

    Returns:
        The row of the trunk, and those of the branches, the longest first.

    Raises:
        AprError: If a block was joined in the KV cache: what follows it saw branches that did not see one another, at positions
            that a causal sequence does not have. If nothing was decoded.
        SharedViewUnsupported: As `build_training_tree`.
    """
    tree = build_training_tree([trajectory], eos=eos)
    if len(tree.tree.joined):
        raise AprError(f"a block was joined in the KV cache, {NO_KV_JOIN}")
    if not len(tree.targets):
        raise AprError("nothing was decoded in this trajectory, expected at least one token to train on")
    sampled = any(call.logprobs is not None for call in trajectory.calls)
    reported = [None if x != x else float(x) for x in logprobs(tree, [trajectory])] if sampled else None
    sequences = _RootToLeaf(tree, reported)
    trunk = [m for m, span in enumerate(tree.spans.tolist()) if not trajectory.spans[span].path]
    longest = sorted(range(len(tree.targets)), key=lambda m: -int(tree.tree.positions[tree.sources[m]]))
    order = [*trunk[-1:], *longest]
    prompt = next((len(span.token_ids or ()) for span in trajectory.spans if span.origin == "prompt"), 0)
    return list(sequences.rows(order, prompt if trunk else 0))


class _RootToLeaf:
    """Takes losses out of a tree, row by row."""

    def __init__(self, tree: TrainingTree, reported: list[float | None] | None) -> None:
        self.ids, self.parents = tree.tree.token_ids.tolist(), tree.tree.parents.tolist()
        self.sources, self.targets = tree.sources.tolist(), tree.targets.tolist()
        self.reported = reported or [None] * len(self.targets)
        # Two branches that wrote the same text after the same context are one path with two losses for each token.
        self.pending = defaultdict[tuple[int, int], list[int]](list)
        for m, edge in enumerate(zip(self.sources, self.targets, strict=True)):
            self.pending[edge].append(m)

    def rows(self, order: list[int], prompt: int) -> Iterator[TrainingRow]:
        """Rows that end with the losses of `order`, without those that an earlier row has.

        Args:
            order: Numbers of losses.
            prompt: Tokens of the prompt of the first row; other rows have no loss in their prompts, and one directly after.
        """
        for m in order:
            if m in self.pending[self.sources[m], self.targets[m]]:
                yield self._row(m, prompt)
                prompt = 0

    def _row(self, last: int, prompt: int) -> TrainingRow:
        path = self._path(self.sources[last])
        ids = [*(self.ids[node] for node in path), self.targets[last]]
        losses: list[int | None] = [None]
        for source, target in zip(path, ids[1:], strict=True):
            waiting = self.pending[source, target]
            own = last if source == path[-1] else next(iter(waiting), None)
            losses.append(own)
            if own is not None:
                waiting.remove(own)
        begin = prompt or next(k for k, loss in enumerate(losses) if loss is not None)
        return TrainingRow(
            tuple(ids[:begin]),
            tuple(ids[begin:]),
            tuple(int(loss is not None) for loss in losses[begin:]),
            tuple(None if loss is None else self.reported[loss] for loss in losses[begin:]),
        )

    def _path(self, node: int) -> list[int]:
        """The nodes from the root to `node`."""
        path = list[int]()
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]
