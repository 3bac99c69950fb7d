"""Attention of workers equals plain attention at the positions of their views, with and without the C kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.layers.rotary_embedding import get_rope

from sgl_apr.server.cpu import attention
from sgl_apr.server.cpu.decode_schedule import PIECE_SLOTS
from sgl_apr.server.shared_cache.rotary import Rotation
from sgl_apr.server.shared_cache.view_plan import plan_views
from sgl_apr.server.shared_cache.views import BlockView, WorkerView

HEADS = [(9, 3, 64), (4, 4, 16), (8, 1, 8), (4, 2, 32)]
SIZE, ROWS = 6000, 16


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch) -> str:
    """Decoding with the C kernel, and without one."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "decode_kernel", lambda: None)
    else:
        assert attention.decode_kernel() is not None, "this machine has a compiler"
    return request.param


@dataclass
class Case:
    """One decode step: a pool of scattered slots, requests, and workers of groups among them."""

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

    def backend(self) -> attention.AprCpuAttention:
        runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
        made = attention.AprCpuAttention(runner)
        made.rotation = Rotation.from_rotary_embedding(self.rotary)
        return made

    def decode(
        self, backend: attention.AprCpuAttention, layers: int = 1, dtype=torch.float32
    ) -> torch.Tensor:
        backend.worker_views = self.views
        backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None, batch_size=len(self.rows)))
        requests, lengths = (torch.tensor(numbers) for numbers in zip(*self.rows, strict=True))
        query, key, value = (x.to(dtype) for x in (self.query, self.key, self.value))
        output = torch.full_like(query, float("nan"))
        for _ in range(layers):
            backend._run_sdpa_forward_decode(
                query, output, key, value, self.table, requests, lengths, scaling=None, enable_gqa=True
            )
        return output

    def check(self, output: torch.Tensor, atol: float = 2e-5) -> None:
        expected = torch.stack([self.expected[row] for row in range(len(self.rows))])
        torch.testing.assert_close(output.float(), expected, atol=atol, rtol=0)


def two_groups(heads: tuple[int, int, int] = (9, 3, 64)) -> Case:
    """Two groups between ordinary requests, of other sizes; the blocks of one are after steps in the history."""
    case = Case(heads)
    case.add_request(0, 40)
    case.add_hogwild(1, 300, [5, 1, 260, 33])
    case.add_request(6, 1)
    case.add_hogwild(7, 17, [1, 2], offset=40)
    case.add_request(10, 600)
    return case


@pytest.mark.parametrize("heads", HEADS)
def test_workers_between_requests(way, heads):
    case = two_groups(heads)
    case.check(case.decode(case.backend()))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_alone(way, workers):
    case = Case((4, 2, 32))
    case.add_hogwild(0, 700, list(range(1, workers + 1)))
    case.check(case.decode(case.backend()))


def test_queries_that_are_not_turned_differ(way):
    case = two_groups()
    backend = case.backend()
    case.views = [
        WorkerView(v.batch_row, tuple(BlockView(b.row, b.first, b.last, 0) for b in v.blocks))
        for v in case.views
    ]
    with pytest.raises(AssertionError):
        case.check(case.decode(backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = two_groups()
    case.check(case.decode(case.backend(), dtype=dtype), atol=3e-2)


def test_what_torch_native_handles_has_workers_too(monkeypatch):
    """Another type of queries than of keys, as in a cache of fewer bits."""
    case = two_groups()
    monkeypatch.setattr(attention, "_is_unsupported", lambda *arguments: True)
    case.check(case.decode(case.backend()))


def test_one_plan_for_all_layers(way, monkeypatch):
    calls: list[str] = []
    for name in ("plan_views", "plan_pieces" if way == "kernel" else "plan_decode"):
        original = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, _f=original, _n=name, **o: (calls.append(_n), _f(*a, **o))[1]
        )
    case = two_groups()
    case.check(case.decode(case.backend(), layers=3))
    assert len(calls) == 2


def test_the_next_pass_has_no_workers(way):
    case, plain = two_groups(), Case()
    backend = case.backend()
    case.check(case.decode(backend))
    plain.add_request(3, 50)
    plain.add_request(4, 20)
    plain.check(plain.decode(backend))


def test_a_block_is_read_once_for_all_workers():
    case = two_groups()
    backend = case.backend()
    case.decode(backend)
    pieces = backend._schedule.pieces.tolist()
    assert sum(last - first for _, first, last, *_ in pieces) == 40 + 1 + 600 + 300 + 299 + 17 + 3
    assert all(last - first <= PIECE_SLOTS for _, first, last, *_ in pieces)
    readers = {(row, first): rows for row, first, _, _, rows, _ in pieces}
    assert readers[1, 0] == readers[1, PIECE_SLOTS] == 4  # the prompt, in two pieces
    assert (readers[4, 306], readers[7, 0]) == (4, 2)


def test_workers_that_lack_blocks():
    views = [
        WorkerView(3, (BlockView(0, 0, 5, 9), BlockView(1, 5, 5, 2), BlockView(2, 5, 6, 0))),
        WorkerView(1, (BlockView(0, 0, 5, -4),)),
    ]
    plan = plan_views(views)
    assert (plan.batch_rows, plan.parts) == ((3, 1), 2)
    found = [(b.row, [(r.batch_row, r.turn, r.place) for r in b.readers]) for b in plan.blocks]
    assert found == [(0, [(3, 9, 0), (1, -4, 2)]), (2, [(3, 0, 1)])]
    assert plan_views([]).blocks == ()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_views(way, data):
    """Blocks and turns as they come, against one block after the other in plain torch."""
    case = Case(data.draw(st.sampled_from(HEADS)))
    sizes = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=5))
    for row, size in enumerate(sizes):
        case.write(row, 0, range(size))
    for batch_row in range(data.draw(st.integers(1, 5))):
        case.add(row := data.draw(st.integers(0, len(sizes) - 1)), sizes[row])
        if not data.draw(st.booleans()):
            slots = case.table[row, : sizes[row]].long()
            case.expected[batch_row] = case.attend(case.query[batch_row], slots, case.key[slots])
            continue
        blocks = []
        for other in data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, unique=True)):
            first = data.draw(st.integers(0, sizes[other] - 1))
            last = data.draw(st.integers(first if blocks else first + 1, sizes[other]))
            blocks.append(BlockView(other, first, last, data.draw(st.integers(-500, 500))))
        case.views.append(WorkerView(batch_row, tuple(blocks)))
        slots = torch.cat([case.table[b.row, b.first : b.last] for b in blocks]).long()
        # The same by keys that are turned back, at one query.
        turns = [-b.turn for b in blocks for _ in range(b.first, b.last)]
        rotation = Rotation.from_rotary_embedding(case.rotary)
        keys = rotation.turn_queries(case.key[slots], rotation.turns(turns, slots.device))
        case.expected[batch_row] = case.attend(case.query[batch_row], slots, keys)
    case.check(case.decode(case.backend()))
