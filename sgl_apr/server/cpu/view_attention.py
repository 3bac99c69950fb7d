"""Attention of the workers of groups: queries that are turned for each block, and the same attention with torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sgl_apr.server.shared_cache.rotary import Rotation, Turns
from sgl_apr.server.shared_cache.view_plan import ViewPlan


@dataclass(frozen=True, slots=True)
class TurnedQueries:
    """The queries of a batch, followed by those of its workers as they are turned for the blocks that they read.

    Attributes:
        rows: By (batch row, turn), the row that has the query. A query that is not turned is in its batch row.
        batch_rows: [turned], the batch rows of the turned queries.
        turns: How far they are turned.
    """

    rows: Mapping[tuple[int, int], int]
    batch_rows: torch.Tensor
    turns: Turns

    @classmethod
    def from_plan(cls, plan: ViewPlan, batch_size: int, rotation: Rotation) -> TurnedQueries:
        """Plan the queries that a batch of `batch_size` rows needs. Workers read several blocks with one turn."""
        needed = dict.fromkeys((r.batch_row, r.turn) for block in plan.blocks for r in block.readers)
        turned = [key for key in needed if key[1]]
        rows = {key: key[0] for key in needed if not key[1]} | {
            key: row for row, key in enumerate(turned, batch_size)
        }
        batch_rows = torch.tensor([row for row, _ in turned], dtype=torch.long)
        return cls(rows, batch_rows, rotation.turns([turn for _, turn in turned], batch_rows.device))

    def expand(self, query: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Return the queries of a layer, [batch + turned, heads, dim], from those of the batch."""
        turned = rotation.turn_queries(query.index_select(0, self.batch_rows), self.turns)
        return torch.cat([query, turned])


def attend_views(
    plan: ViewPlan,
    rows: Mapping[tuple[int, int], int],
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    scaling: float | None,
) -> None:
    """Compute the attention of workers with torch, in float32.

    Args:
        plan: What they attend to.
        rows: The row of each turned query, as `TurnedQueries` has them.
        query: [queries, heads, dim].
        output: [rows, heads, v_dim]. The workers' rows are written.
        k_cache: [slots, kv_heads, dim].
        v_cache: [slots, kv_heads, v_dim].
        req_to_token: [requests, context], SGLang's table of slots.
        scaling: The factor for the scores, 1 / sqrt(dim) by default.
    """
    kv_heads, v_dim = v_cache.shape[1:]
    queries = query.unflatten(1, (kv_heads, -1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    size = len(plan.batch_rows) * plan.parts
    parts = torch.zeros(size, *queries.shape[1:3], v_dim)
    sums = torch.full(parts.shape[:3], float("-inf"))  # the logarithms of sums of exponentials
    for block in plan.blocks:
        slots = req_to_token[block.row, block.first : block.last]
        keys, values = (cache.index_select(0, slots).float() for cache in (k_cache, v_cache))
        own = queries[[rows[reader.batch_row, reader.turn] for reader in block.readers]]
        scores = torch.einsum("rhgd,khd->rhgk", own.float() * scale, keys)
        places = [reader.place for reader in block.readers]
        parts[places] = torch.einsum("rhgk,khd->rhgd", scores.softmax(-1), values)
        sums[places] = scores.logsumexp(-1)
    weights = sums.unflatten(0, (-1, plan.parts)).softmax(1)
    merged = (parts.unflatten(0, (-1, plan.parts)) * weights[..., None]).sum(1)
    output[list(plan.batch_rows)] = merged.flatten(1, 2).to(output.dtype)
