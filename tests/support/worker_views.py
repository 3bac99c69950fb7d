"""Decode steps with workers of groups, and what plain attention at the positions of their views gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from sglang.srt.layers.rotary_embedding import get_rope

from sgl_apr.server.shared_cache.rotary import Rotation
from sgl_apr.server.shared_cache.views import BlockView, WorkerView

SIZE, ROWS = 6000, 16


@dataclass
class WorkerBatch:
    """A decode step: a pool of scattered slots, requests, and workers of groups among them."""

    heads: tuple[int, int, int] = (9, 3, 64)
    views: list[WorkerView] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)  # (row of the table, tokens) of each request
    expected: dict[int, torch.Tensor] = field(default_factory=dict)  # by batch row

    def __post_init__(self) -> None:
        heads, kv_heads, dim = self.heads
        self.random = torch.Generator().manual_seed(1)
        self.free = iter((torch.randperm(SIZE - 1, generator=self.random) + 1).tolist())
        self.table = torch.randint(0, SIZE, (ROWS, 3000), dtype=torch.int32, generator=self.random)
        self.plain = self.normal(SIZE, kv_heads, dim)  # keys without positions
        self.key = torch.full_like(self.plain, float("nan"))  # unused slots: reading one would show
        self.value = torch.full_like(self.plain, float("nan"))
        self.rotary = get_rope(dim, dim, 4096, 10000.0, True, None, torch.float32)
        self.query = torch.zeros(0, heads, dim)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x` [n, heads, dim] by SGLang's embedding."""
        flat = x.flatten(1)
        return self.rotary.forward_native(positions, flat, flat.clone())[0].view_as(x)

    def write(self, row: int, first: int, positions: range) -> None:
        """Cache new keys and values, computed at `positions`, in places `first` and on of a row of the table."""
        slots = torch.tensor([next(self.free) for _ in positions])
        self.table[row, first : first + len(slots)] = slots.int()
        self.key[slots] = self.rotate(self.plain[slots], torch.tensor(positions))
        self.value[slots] = self.normal(*self.value[slots].shape)

    def add(self, row: int, length: int) -> int:
        """Add a request with a random query, which is rotated for its last token; returns its batch row."""
        query = self.normal(1, *self.query.shape[1:])
        self.rows.append((row, length))
        self.query = torch.cat([self.query, self.rotate(query, torch.tensor([length - 1]))])
        self.unrotated = query
        return len(self.rows) - 1

    def attend(self, query: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Plain attention of one query [heads, dim]."""
        group = self.heads[0] // self.heads[1]
        values = self.value[slots].repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", query, keys.repeat_interleave(group, 1)) * self.heads[2] ** -0.5
        return torch.einsum("hk,khd->hd", scores.softmax(-1), values)

    def add_request(self, row: int, length: int) -> None:
        self.write(row, 0, range(length))
        batch_row = self.add(row, length)
        slots = self.table[row, :length].long()
        self.expected[batch_row] = self.attend(self.query[batch_row], slots, self.key[slots])

    def add_hogwild(self, view_row: int, view: int, blocks: list[int], offset: int = 0) -> None:
        """Add a group: its prompt and history take `view` slots; worker w has `blocks[w]` tokens in its block.

        Worker w's block begins at place `view + offset + 3 w` of its own request. In its view it stands elsewhere.
        """
        self.write(view_row, 0, range(view))
        starts = [view + offset + 3 * w for w in range(len(blocks))]
        for w, (start, size) in enumerate(zip(starts, blocks, strict=True)):
            self.write(view_row + 1 + w, start, range(start, start + size))
        total = view + sum(blocks)
        for w in range(len(blocks)):
            length = starts[w] + blocks[w]
            batch_row = self.add(view_row + 1 + w, length)
            order = [*(o for o in range(len(blocks)) if o != w), w]
            found, slots, place = [], [self.table[view_row, :view]], view
            found.append(BlockView(view_row, 0, view, total - length))
            for o in order:
                turn = (total - length) + starts[o] - place
                found.append(BlockView(view_row + 1 + o, starts[o], starts[o] + blocks[o], turn))
                slots.append(self.table[view_row + 1 + o, starts[o] : starts[o] + blocks[o]])
                place += blocks[o]
            assert found[-1].turn == 0
            self.views.append(WorkerView(batch_row, tuple(found)))
            read = torch.cat(slots).long()
            query = self.rotate(self.unrotated, torch.tensor([total - 1]))[0]
            self.expected[batch_row] = self.attend(
                query, read, self.rotate(self.plain[read], torch.arange(total))
            )

    @property
    def rotation(self) -> Rotation:
        return Rotation.from_rotary_embedding(self.rotary)

    def check(self, output: torch.Tensor, atol: float = 2e-5) -> None:
        expected = torch.stack([self.expected[row] for row in range(len(self.rows))])
        torch.testing.assert_close(output.float(), expected, atol=atol, rtol=0)


def two_groups(heads: tuple[int, int, int] = (9, 3, 64)) -> WorkerBatch:
    """Two groups between ordinary requests, of other sizes; the blocks of one are after steps in the history."""
    case = WorkerBatch(heads)
    case.add_request(0, 40)
    case.add_hogwild(1, 300, [5, 1, 260, 33])
    case.add_request(6, 1)
    case.add_hogwild(7, 17, [1, 2], offset=40)
    case.add_request(10, 600)
    return case
