"""Attention of workers equals plain attention at the positions of their views, with and without the C kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgl_apr.server.cpu import attention
from sgl_apr.server.cpu.decode_schedule import PIECE_SLOTS
from sgl_apr.server.shared_cache.view_plan import plan_views
from sgl_apr.server.shared_cache.views import BlockView, WorkerView
from tests.support.worker_views import WorkerBatch, two_groups

HEADS = [(9, 3, 64), (4, 4, 16), (8, 1, 8), (4, 2, 32)]


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch) -> str:
    """Decoding with the C kernel, and without one."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "decode_kernel", lambda: None)
    else:
        assert attention.decode_kernel() is not None, "this machine has a compiler"
    return request.param


def backend_of(case: WorkerBatch) -> attention.AprCpuAttention:
    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    made = attention.AprCpuAttention(runner)
    made.rotation = case.rotation
    return made


def decode(
    case: WorkerBatch, backend: attention.AprCpuAttention, layers: int = 1, dtype=torch.float32
) -> torch.Tensor:
    backend.worker_views = case.views
    backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None, batch_size=len(case.rows)))
    requests, lengths = (torch.tensor(numbers) for numbers in zip(*case.rows, strict=True))
    query, key, value = (x.to(dtype) for x in (case.query, case.key, case.value))
    output = torch.full_like(query, float("nan"))
    for _ in range(layers):
        backend._run_sdpa_forward_decode(
            query, output, key, value, case.table, requests, lengths, scaling=None, enable_gqa=True
        )
    return output


@pytest.mark.parametrize("heads", HEADS)
def test_workers_between_requests(way, heads):
    case = two_groups(heads)
    case.check(decode(case, backend_of(case)))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_alone(way, workers):
    case = WorkerBatch((4, 2, 32))
    case.add_hogwild(0, 700, list(range(1, workers + 1)))
    case.check(decode(case, backend_of(case)))


def test_queries_that_are_not_turned_differ(way):
    case = two_groups()
    backend = backend_of(case)
    case.views = [
        WorkerView(v.batch_row, tuple(BlockView(b.row, b.first, b.last, 0) for b in v.blocks))
        for v in case.views
    ]
    with pytest.raises(AssertionError):
        case.check(decode(case, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = two_groups()
    case.check(decode(case, backend_of(case), dtype=dtype), atol=3e-2)


def test_what_torch_native_handles_has_workers_too(monkeypatch):
    """Another type of queries than of keys, as in a cache of fewer bits."""
    case = two_groups()
    monkeypatch.setattr(attention, "_is_unsupported", lambda *arguments: True)
    case.check(decode(case, backend_of(case)))


def test_one_plan_for_all_layers(way, monkeypatch):
    calls: list[str] = []
    for name in ("plan_views", "plan_pieces" if way == "kernel" else "plan_decode"):
        original = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, _f=original, _n=name, **o: (calls.append(_n), _f(*a, **o))[1]
        )
    case = two_groups()
    case.check(decode(case, backend_of(case), layers=3))
    assert len(calls) == 2


def test_the_next_pass_has_no_workers(way):
    case, plain = two_groups(), WorkerBatch()
    backend = backend_of(case)
    case.check(decode(case, backend))
    plain.add_request(3, 50)
    plain.add_request(4, 20)
    plain.check(decode(plain, backend))


def test_a_block_is_read_once_for_all_workers():
    case = two_groups()
    backend = backend_of(case)
    decode(case, backend)
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
    case = WorkerBatch(data.draw(st.sampled_from(HEADS)))
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
        rotation = case.rotation
        keys = rotation.turn_queries(case.key[slots], rotation.turns(turns, slots.device))
        case.expected[batch_row] = case.attend(case.query[batch_row], slots, keys)
    case.check(decode(case, backend_of(case)))
