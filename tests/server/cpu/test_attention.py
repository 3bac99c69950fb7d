"""apr_cpu equals SGLang's torch_native and plain torch for any batch, and its plans cover every token once."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from sgl_apr.server.cpu.attention_plan import MAX_ROW_TOKENS, plan_decode, plan_extend
from sgl_apr.server.cpu.decode_schedule import MIN_SHARED_SLOTS, PIECE_SLOTS, plan_pieces

HEADS = [(9, 3, 64), (4, 4, 16), (4, 2, 32), (8, 1, 8), (5, 1, 20)]


@dataclass(frozen=True)
class Batch:
    """A pool with scattered slots. The first `shared[i]` tokens of request i are those of request 0."""

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    heads: tuple[int, int, int] = (4, 2, 32)
    dtype: torch.dtype = torch.float32
    scattered: bool = True

    def tensors(self, queries: int) -> SimpleNamespace:
        torch.manual_seed(sum(self.lengths))
        heads, kv_heads, dim = self.heads
        size = sum(self.lengths) + 8
        slots = (torch.randperm(size - 1) if self.scattered else torch.arange(size - 1)) + 1
        table = torch.randint(0, size, (len(self.lengths) + 3, max(self.lengths) + 5), dtype=torch.int32)
        places = torch.randperm(len(self.lengths) + 3)[: len(self.lengths)]
        taken = 0
        for place, length, shared in zip(places, self.lengths, self.shared, strict=True):
            table[place, :length] = slots[taken : taken + length].int()
            table[place, :shared] = table[places[0], :shared]
            taken += length
        key, value = (torch.randn(size, kv_heads, dim, dtype=self.dtype) for _ in "kv")
        free = torch.ones(size, dtype=torch.bool)
        for place, length in zip(places, self.lengths, strict=True):
            free[table[place, :length].long()] = False
        key[free] = value[free] = float("nan")  # unused slots: reading one would show
        query = torch.randn(queries, heads, dim, dtype=self.dtype)
        return SimpleNamespace(query=query, key=key, value=value, table=table, places=places)


def backend(kind: str, **options):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from sgl_apr.server.cpu.attention import AprCpuAttention

    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    return (AprCpuAttention if kind == "apr_cpu" else TorchNativeAttnBackend)(runner, **options)


def decode(kind: str, batch: Batch, **options) -> torch.Tensor:
    t = batch.tensors(len(batch.lengths))
    output = torch.full_like(t.query, float("nan"))
    where = (t.table, t.places, torch.tensor(batch.lengths))
    options = {"scaling": 0.2, "enable_gqa": True, "causal": False} | options
    backend(kind)._run_sdpa_forward_decode(t.query, output, t.key, t.value, *where, **options)
    return output


def extend(kind: str, batch: Batch, prefixes: tuple[int, ...], **options) -> torch.Tensor:
    new = [length - prefix for length, prefix in zip(batch.lengths, prefixes, strict=True)]
    t = batch.tensors(sum(new))
    output = torch.full_like(t.query, float("nan"))
    where = (t.table, t.places, torch.tensor(batch.lengths), torch.tensor(prefixes), torch.tensor(new))
    options = {"scaling": None, "enable_gqa": True, "causal": True} | options
    backend(kind)._run_sdpa_forward_extend(t.query, output, t.key, t.value, *where, **options)
    return output


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch) -> str:
    """Decoding with the C kernel, and without one."""
    if request.param == "torch":
        monkeypatch.setattr("sgl_apr.server.cpu.attention.decode_kernel", lambda: None)
    else:
        from sgl_apr.server.cpu.kernel import decode_kernel

        assert decode_kernel() is not None, "this machine has a compiler"
    return request.param


def same(left: torch.Tensor, right: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("lengths", "shared"),
    [
        ((1,), (0,)),
        ((37,), (0,)),
        ((5, 5, 5), (0, 0, 0)),
        ((1, 400, 7, 90), (0, 0, 0, 0)),
        ((700, 705, 701, 30), (700, 600, 600, 0)),
        ((900,) * 4 + (950,) * 4, (0, 850, 850, 850, 100, 100, 100, 100)),
        (tuple(range(1, 65)), (0,) * 64),
        ((1200,) * 9, (0,) * 9),
    ],
)
def test_decode(way, lengths, shared, heads):
    batch = Batch(lengths, shared, heads)
    same(decode("apr_cpu", batch), decode("torch_native", batch))


@pytest.mark.parametrize("dim", [5, 20, 36, 40, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_few_queries_of_any_size(way, dim, group):
    """A row of its own has as many queries as a key head has query heads: few, whose sizes need not divide into lanes."""
    batch = Batch((300, 7), (0, 0), (2 * group, 2, dim))
    same(decode("apr_cpu", batch), decode("torch_native", batch))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("lengths", "prefixes", "shared"),
    [
        ((1,), (0,), (0,)),
        ((50,), (0,), (0,)),
        ((50,), (49,), (0,)),
        ((700,), (100,), (0,)),
        ((602, 601, 640), (600, 600, 600), (0, 600, 600)),
        ((20, 300, 3, 800), (0, 290, 2, 770), (0, 0, 0, 0)),
        ((600, 600), (599 - MAX_ROW_TOKENS, 600 - MAX_ROW_TOKENS), (0, 500)),
    ],
)
def test_extend(lengths, prefixes, shared, heads):
    batch = Batch(lengths, shared, heads)
    same(extend("apr_cpu", batch, prefixes), extend("torch_native", batch, prefixes))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch(way, data):
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=12).map(tuple))
    shared = tuple(data.draw(st.integers(0, min(n, lengths[0]) - 1)) for n in lengths)
    batch = Batch(lengths, shared, data.draw(st.sampled_from(HEADS)))
    same(decode("apr_cpu", batch), decode("torch_native", batch))
    prefixes = tuple(data.draw(st.integers(0, n - 1)) for n in lengths)
    same(extend("apr_cpu", batch, prefixes), extend("torch_native", batch, prefixes))


def test_consecutive_slots(way):
    batch = Batch((900, 905, 910, 40), (0, 800, 800, 0), scattered=False)
    same(decode("apr_cpu", batch), decode("torch_native", batch))
    prefixes = (0, 898, 600, 30)
    same(extend("apr_cpu", batch, prefixes), extend("torch_native", batch, prefixes))


def test_half_precision():
    batch = Batch((300, 20), (0, 0), dtype=torch.bfloat16)
    same(decode("apr_cpu", batch), decode("torch_native", batch), 2e-2)
    same(extend("apr_cpu", batch, (298, 0)), extend("torch_native", batch, (298, 0)), 2e-2)


def test_rare_cases_use_torch_native():
    batch, window = Batch((30, 40), (0, 0)), {"sliding_window_size": 8}
    same(decode("apr_cpu", batch, **window), decode("torch_native", batch, **window), 0)
    same(extend("apr_cpu", batch, (0, 0), **window), extend("torch_native", batch, (0, 0), **window), 0)
    both_ways = {"causal": False}
    same(extend("apr_cpu", batch, (0, 0), **both_ways), extend("torch_native", batch, (0, 0), **both_ways), 0)


def test_plan_reads_a_shared_prefix_once():
    table = torch.arange(4 * 1000, dtype=torch.int32).view(4, 1000)
    table[1:3, :900] = table[0, :900]
    plan = plan_decode(table, torch.arange(4), [910, 920, 915, 905], heads=2)
    read = sum(group.prefix + group.own[:, 0].numel() for group in plan.groups)
    assert [group.prefix for group in plan.groups] == [900, 0]
    assert read == 900 + 3 * 20 + 905


def test_plan_finds_forks_below_a_common_system_prompt():
    table = torch.arange(8 * 1000, dtype=torch.int32).view(8, 1000)
    table[1:4, :900], table[5:8, :900] = table[0, :900].clone(), table[4, :900].clone()
    table[:, :50] = table[0, :50].clone()
    plan = plan_decode(table, torch.arange(8), [950] * 8, heads=1)
    assert sorted(group.prefix for group in plan.groups) == [900, 900]


@pytest.mark.parametrize("new", [1, MAX_ROW_TOKENS, MAX_ROW_TOKENS + 1, 1300])
def test_plan_covers_every_token_once(new):
    table = torch.arange(3 * 2000, dtype=torch.int32).view(3, 2000)
    plan = plan_extend(table, torch.arange(3), [0, 500, 7], [new, new, 2], heads=2)
    tokens = plan.rows.tolist()
    assert len(tokens) == sum(group.size for group in plan.groups)
    tokens += [token for span in plan.spans for token in range(span.start, span.stop)]
    assert sorted(tokens) == list(range(2 * new + 2))


@dataclass(frozen=True)
class Forks:
    """Requests that fork from one another: each begins with the first slots of an earlier one, then has its own.

    `steps` has (which earlier one, how many of its slots, how many own slots). Slots are scattered, as after a KV join.
    """

    steps: tuple[tuple[int, int, int], ...]

    @property
    def rows(self) -> list[list[int]]:
        size = sum(own for _, _, own in self.steps)
        free = iter((torch.randperm(size, generator=torch.Generator().manual_seed(size)) + 1).tolist())
        rows: list[list[int]] = []
        for parent, taken, own in self.steps:
            rows.append((rows[parent][:taken] if rows else []) + [next(free) for _ in range(own)])
        return rows


FORKS = {
    "one": Forks(((0, 0, 1),)),
    "a fork of 8": Forks(((0, 0, 1056), *[(0, 1024, own) for own in (1, 2, 17, 31, 32, 33, 300)])),
    "two forks and a stranger": Forks(
        ((0, 0, 420), (0, 400, 30), (0, 400, 1), (0, 0, 50), (0, 0, 300), (4, 290, 9), (4, 299, 40))
    ),
    "nested": Forks(
        ((0, 0, 340), (0, 320, 100), (1, 400, 5), (1, 410, 5), (0, 320, 60), (4, 370, 20), (0, 330, 9))
    ),
    "a chain, as before a trunk that continues": Forks(
        ((0, 0, 200), *[(i, 150 + 20 * i, 30) for i in range(7)])
    ),
    "in common less than is worth it": Forks(
        ((0, 0, 40), (0, MIN_SHARED_SLOTS - 1, 20), (1, MIN_SHARED_SLOTS + 3, 20))
    ),
    "a piece to the slot": Forks(
        ((0, 0, PIECE_SLOTS), (0, PIECE_SLOTS - 1, 1), (0, PIECE_SLOTS - 1, PIECE_SLOTS + 1))
    ),
    "one ends where others go on": Forks(((0, 0, 300), (0, 300, 1), (0, 300, 40))),
}


def any_forks() -> st.SearchStrategy[Forks]:
    step = st.tuples(st.integers(0, 11), st.integers(0, 400), st.integers(1, 200))
    steps = st.lists(step, min_size=1, max_size=12)
    return steps.map(
        lambda s: Forks(tuple((parent % max(i, 1), *rest) for i, (parent, *rest) in enumerate(s)))
    )


class Pool:
    """Keys and values of one layer, the rows of requests, and a backend that decodes for them."""

    def __init__(self, size: int, heads: tuple[int, int, int], **options) -> None:
        torch.manual_seed(size)
        self.heads = heads
        self.key, self.value = (torch.full((size, heads[1], heads[2]), float("nan")) for _ in "kv")
        self.table = torch.randint(0, size, (15, 2000), dtype=torch.int32)  # any slot after the end of a row
        self.backend = backend("apr_cpu", **options)

    def decode(
        self, rows: list[list[int]], places: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A step as SGLang does it, and the same in plain torch; both [rows, heads, dim]."""
        places = list(range(len(rows) - 1, -1, -1)) if places is None else places
        self.key.fill_(float("nan"))  # unused slots: reading one would show
        self.value.fill_(float("nan"))
        for place, row in zip(places, rows, strict=True):
            slots = torch.tensor(row)
            self.table[place, : len(row)] = slots.int()
            self.key[slots], self.value[slots] = (torch.randn(len(row), *self.key.shape[1:]) for _ in "kv")
        query = torch.randn(len(rows), self.heads[0], self.heads[2])
        lengths = torch.tensor([len(row) for row in rows])
        self.backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
        arguments = (self.key, self.value, self.table, torch.tensor(places), lengths)
        output = self.backend._run_sdpa_forward_decode(query, torch.empty_like(query), *arguments)
        return output, torch.stack([self._plain(*pair) for pair in zip(query, rows, strict=True)])

    def _plain(self, query: torch.Tensor, row: list[int]) -> torch.Tensor:
        times = self.heads[0] // self.heads[1]
        key, value = (x[row].repeat_interleave(times, 1).transpose(0, 1) for x in (self.key, self.value))
        return scaled_dot_product_attention(query[:, None], key, value)[:, 0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", FORKS)
def test_forks(way, name, heads, share):
    rows = FORKS[name].rows
    same(*Pool(2000, heads, share=share).decode(rows))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forks=any_forks(), heads=st.sampled_from(HEADS))
def test_any_forks(way, forks, heads):
    same(*Pool(2500, heads).decode(forks.rows))


def test_slots_that_another_request_reuses(way):
    """Same places, same lengths and the same slots, but no longer shared."""
    pool = Pool(2000, (9, 3, 64))
    rows = Forks(((0, 0, 620), (0, 600, 20), (0, 600, 20), (0, 0, 620))).rows
    same(*pool.decode(rows))
    before = [row.copy() for row in rows]
    rows[1], rows[3] = before[3], before[1]  # two requests change places
    same(*pool.decode(rows))
    rows[2] = [*before[2][:599], 1999, *before[2][600:]]  # the last shared slot changes
    same(*pool.decode(rows))
    rows = [row[::-1] for row in rows]  # all slots are freed and allocated again
    same(*pool.decode(rows))


def test_grows_slot_by_slot(way):
    pool, rows = Pool(2000, (4, 2, 32)), FORKS["a fork of 8"].rows
    free = iter(sorted(set(range(1, 2000)) - {slot for row in rows for slot in row}))
    for _ in range(5):
        same(*pool.decode(rows))
        rows = [[*row, next(free)] for row in rows]
    same(*pool.decode(rows[2:5], [4, 3, 2]))  # continues with fewer rows
    same(*pool.decode([rows[6]]))


@pytest.mark.parametrize("share", [True, False])
@given(forks=any_forks())
@settings(deadline=None)
def test_pieces_cover_every_slot_of_every_row_once(share, forks):
    rows = forks.rows
    table = torch.zeros(len(rows), 2500, dtype=torch.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row)
    work = plan_pieces(table, torch.arange(len(rows)), [len(row) for row in rows], share=share)
    parts = {}
    for request, first, last, member, size, part in work.pieces.tolist():
        assert 0 < last - first <= PIECE_SLOTS
        for i, row in enumerate(work.members[member : member + size].tolist()):
            parts[part + i] = row, (first, last)
            assert rows[row][first:last] == rows[request][first:last]
    assert len(parts) == len(work.part_indices)
    for i, row in enumerate(rows):
        mine = [parts[part] for part in work.part_indices[work.begin[i] : work.begin[i + 1]].tolist()]
        ends = sorted(end for _, end in mine)
        assert {owner for owner, _ in mine} == {i}
        assert [0, *(last for _, last in ends)] == [*(first for first, _ in ends), len(row)]


def read(forks: Forks, **options) -> int:
    """Return how many slots a step reads."""
    pool = Pool(2000, (4, 2, 32), **options)
    pool.decode(forks.rows)
    return sum(last - first for _, first, last, *_ in pool.backend._schedule.pieces.tolist())


def test_nested_forks_are_read_once_at_every_level(monkeypatch):
    forks = FORKS["nested"]
    alone, once = sum(map(len, forks.rows)), len({slot for row in forks.rows for slot in row})
    assert once < read(forks) < once + MIN_SHARED_SLOTS * len(forks.rows)
    assert read(forks, share=False) == alone
    monkeypatch.setenv("SGLANG_APR_SHARED_PREFIX", "0")
    assert read(forks) == alone
    monkeypatch.setenv("SGLANG_APR_SHARED_PREFIX", "1")
    assert read(forks) < alone


def test_without_a_compiler_torch_decodes(monkeypatch, caplog):
    from sgl_apr.server.cpu import kernel

    monkeypatch.setattr(kernel, "SOURCE", kernel.SOURCE.with_name("attention.py"))  # no C
    monkeypatch.setattr(kernel, "decode_kernel", kernel.decode_kernel.__wrapped__)
    assert kernel.decode_kernel() is None
    assert "needs a C compiler with OpenMP" in caplog.text
