"""Joins with pages of several tokens in SGLang's cache and allocator, with made-up keys and values instead of a model."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sgl_apr.server.kv_join.radix_cache import KvJoinRadixCache
from sgl_apr.server.kv_join.slot_copy import copy_pending, copy_slots, uncopyable
from sgl_apr.trajectory.join_layout import commit_prompts, layout_positions, token_count
from tests.server.kv_join.test_cache_keys import EXAMPLE, random_layout
from tests.support.dense_mask import dense_mask

PAGE, PAGES = 4, 512
LAYERS = 2


class Cache:
    """A cache that joins, and pools. It computes keys and values that show what a token attends to."""

    def __init__(self, core: str = "python", pages: int = PAGES) -> None:
        self.pool = MHATokenToKVPool(
            pages * PAGE, PAGE, torch.float64, 1, 1, LAYERS, "cpu", enable_memory_saver=False
        )
        self.allocator = PagedTokenToKVPoolAllocator(
            pages * PAGE, PAGE, torch.float64, "cpu", self.pool, need_sort=False
        )
        self.rows = ReqToTokenPool(8, 512, "cpu", enable_memory_saver=False)
        self.tree = KvJoinRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )

    def free_tokens(self) -> int:
        return int(self.allocator.available_size())

    def total(self) -> int:
        return self.free_tokens() + int(self.tree.evictable_size()) + int(self.tree.protected_size())

    def request(self, ids: Sequence[int], layout: Any = None, new_tokens: int = 0) -> Any:
        params = {"apr_layout": json.dumps(layout)} if layout else None
        req = SimpleNamespace(
            rid="r", origin_input_ids=array("q", ids), full_untruncated_fill_ids=array("q", ids), extra_key=None,
            cache_salt=None, to_finish=None, priority=None, session_id=None, session=None, kv_rotation_base=None, output_ids=[],
            kv=ReqKvInfo(), return_logprob=False, host_hit_length=0, refused=None, skip_radix_cache_insert=False,
            sampling_params=SimpleNamespace(custom_params=params, beam_width=None, max_new_tokens=new_tokens),
            refresh_fill_ids=lambda: None, finished=lambda: True,
        )  # fmt: skip
        req.set_finish_with_abort = lambda message, status, kind: setattr(
            req, "refused", (int(status), message)
        )
        return req

    def admit(self, req: Any) -> bool:
        """Match a request and allocate what it copies, as SGLang's `PrefillAdder` does. False if it is refused."""
        key = RadixKey(req.full_untruncated_fill_ids, None, limit=len(req.full_untruncated_fill_ids) - 1)
        match = self.tree.match_prefix(MatchPrefixParams(key=key, req=req))
        req.prefix_len, req.last_node = match.device_prefix_len, match.last_device_node
        req.kv.cache_protected_len, req.host_hit_length = match.device_prefix_len, match.host_hit_length
        if req.refused:
            return False
        lock = self.tree.lock(req.last_node)
        if req.host_hit_length:
            host_lock = self.tree.inc_host_lock_ref(match.best_match_node).to_dec_params()
            loaded = self.tree.init_load_back(
                InitLoadBackParams(match.best_match_node, req.host_hit_length, req=req)
            )
            self.tree.dec_host_lock_ref(match.best_match_node, host_lock)
            assert loaded is not None
            tokens, req.last_node = loaded
            assert tokens == match.host_hit_length
            req.prefix_len += tokens
        req.lock = self.tree.lock(req.last_node)
        self.tree.unlock(lock)
        return True

    def compute(self, req: Any, layout: Any) -> None:
        """Allocate the rest of a request, copy, and compute all layers, as a forward pass does."""
        ids, prefix = req.full_untruncated_fill_ids, req.prefix_len
        cached = self.tree.prefix_device_indices(req)
        assert len(cached) == prefix
        lengths = [torch.tensor([n]) for n in (prefix, prefix, len(ids), len(ids))]
        last = cached[-1:] if prefix else torch.tensor([-1])
        slots = self.allocator.alloc_extend(*lengths, last, len(ids) - prefix)
        assert slots is not None
        self.rows.alloc([req])
        self.rows.write((req.kv.req_pool_idx, slice(0, len(ids))), torch.cat([cached, slots]).to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = len(ids)
        batch = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: False))
        runner = SimpleNamespace(token_to_kv_pool=self.pool)
        copy_pending(batch, type, SimpleNamespace(reqs=[req]), model_runner=runner)
        want = expected(ids, layout)
        for buffers, sign in ((self.pool.k_buffer, 1), (self.pool.v_buffer, -1)):
            for layer, buffer in enumerate(buffers):
                buffer[slots, 0, 0] = sign * (want[prefix:] + layer)
                row = self.rows.req_to_token[req.kv.req_pool_idx, : len(ids)].long()
                assert torch.equal(buffer[row, 0, 0], sign * (want + layer)), "what a token attends to"
        assert len(set(row.tolist())) == len(ids)
        assert all(row[k] % PAGE == k % PAGE for k in range(len(ids))), "pages are complete"

    def release(self, req: Any, *, checkpoint: bool = True) -> None:
        end = req.kv.kv_committed_len
        if checkpoint:
            self.tree.checkpoint(req, up_to=end)
        self.tree.free_kv_row(req.kv, [(req.kv.cache_protected_len, end)])
        self.tree.unlock(req.lock)
        self.rows.free(req)

    def serve(self, ids: Sequence[int], layout: Any = None, new_tokens: int = 0) -> Any:
        req = self.request(ids, layout, new_tokens)
        if self.admit(req):
            self.compute(req, layout)
            self.release(req)
        return req

    def commit(self, layout: Any, ids: Sequence[int]) -> None:
        for ranges, own in commit_prompts(layout):
            self.serve([t for first, last in ranges for t in ids[first:last]], own)


def expected(ids: Sequence[int], layout: Any) -> torch.Tensor:
    """For each token a number that depends on its position, and on all tokens that it attends to and their positions."""
    layout = layout or [len(ids)]
    places = list(layout_positions(layout))
    own = [(t * 1009 + p * 31) % 65537 for t, p in zip(ids, places, strict=True)]
    return torch.tensor(
        [float(sum(v for v, seen in zip(own, sees, strict=False) if seen)) for sees in dense_mask(layout)],
        dtype=torch.float64,
    )


@pytest.fixture(params=["python", "rust"])
def cache(request: pytest.FixtureRequest) -> Iterator[Cache]:
    made = Cache(request.param)
    total = made.total()
    yield made
    assert made.tree.protected_size() == 0
    assert made.total() == total, "every page is free or in the tree"
    made.tree.evict(EvictParams(num_tokens=total))
    assert made.free_tokens() == total
    assert len(made.rows.free_slots) == 8


def prompt(layout: Any, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(token_count(layout))]


def test_a_join_shares_the_pages_of_its_first_branch_and_copies_the_others(cache: Cache):
    ids = prompt(EXAMPLE, 0)
    cache.commit(EXAMPLE, ids)
    before = cache.free_tokens()
    req = cache.request(ids, EXAMPLE, new_tokens=1)
    assert cache.admit(req)
    assert (req.kv.cache_protected_len, req.prefix_len) == (16, 30), "the first branch ends at token 17"
    assert before - cache.free_tokens() == 16, "14 tokens are copied to 4 pages"
    assert req.host_hit_length == 0, "the metrics count them as cached on the device"
    cache.compute(req, EXAMPLE)
    cache.release(req)


def test_the_copies_serve_later_requests_of_the_trajectory(cache: Cache):
    ids = prompt(EXAMPLE, 1)
    cache.commit(EXAMPLE, ids)
    cache.serve(ids, EXAMPLE, 1)
    longer = [*EXAMPLE[:-1], 9]
    req = cache.request([*ids, *range(6)], longer, 1)
    assert cache.admit(req)
    assert (req.prefix_len, req.host_hit_length) == (32, 0), "the complete pages of the request before"
    cache.compute(req, longer)
    cache.release(req)
    block = [*EXAMPLE[:-1], 9, [[5], [2]], 1]
    more = [*ids, *range(6), *range(8)]
    cache.commit(block, more)
    assert cache.serve(more, block, 1).prefix_len >= len(more) - 1


def test_random_layouts_see_what_they_have_to_see(cache: Cache):
    rng = random.Random(5)
    for seed in range(12):
        layout = random_layout(rng)
        ids = prompt(layout, seed)
        cache.commit(layout, ids)
        req = cache.serve(ids, layout if len(layout) > 1 else None, 1)
        assert req.refused is None
        assert cache.serve(ids).refused is None, "as text, which never sees what is joined"
        cache.tree.evict(EvictParams(num_tokens=PAGES * PAGE))


def test_a_branch_that_was_evicted_is_a_cache_miss(cache: Cache):
    layout = [8, [[5], [6]], 2]
    ids = prompt(layout, 7)
    cache.commit(layout, ids)
    cache.tree.evict(EvictParams(num_tokens=1))
    status, message = cache.serve(ids, layout, 1).refused
    assert status == 409
    assert "are cached" in message
    assert cache.serve(prompt(layout, 8), layout, 1).refused[0] == 409, "never committed"


def test_a_request_that_is_retracted_copies_anew(cache: Cache):
    layout = [6, [[5], [9]], 2]
    ids = prompt(layout, 9)
    cache.commit(layout, ids)
    for _ in range(2):
        req = cache.request(ids, layout, 1)
        assert cache.admit(req)
        assert req.prefix_len == 20
        cache.compute(req, layout)
        cache.release(req, checkpoint=False)
    assert cache.serve(ids, layout, 1).prefix_len == 20


def test_the_last_page_of_a_branch_is_cached_only_by_a_commit(cache: Cache):
    ids = prompt([6], 11)
    cache.serve(ids, None, new_tokens=1)
    assert cache.tree.evictable_size() == PAGE
    cache.serve(ids, None, new_tokens=0)
    assert cache.tree.evictable_size() == 2 * PAGE
    cache.serve(ids, None, new_tokens=0)
    assert cache.tree.evictable_size() == 2 * PAGE, "the same page is cached once"
    req = cache.request([*ids, 1, 2, 3], None, 1)
    assert cache.admit(req)
    assert req.prefix_len == PAGE, "no other prompt finds the filled page"
    cache.tree.unlock(req.lock)


def test_a_join_waits_for_memory(cache: Cache):
    layout = [4, [[3], [8]], 2]
    ids = prompt(layout, 12)
    cache.commit(layout, ids)
    key = RadixKey(array("q", ids), None, limit=len(ids) - 1)
    req = cache.request(ids, layout, 1)
    match = cache.tree.match_prefix(MatchPrefixParams(key=key, req=req))
    lock = cache.tree.lock(match.best_match_node)
    taken = cache.allocator.alloc(cache.free_tokens())
    params = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=req)
    assert cache.tree.init_load_back(params) is None, "the branches are locked, so nothing can be evicted"
    cache.allocator.free(taken)
    cache.tree.unlock(lock)


def test_a_join_that_never_fits_is_a_cache_miss():
    """Its 7 pages of branches, and 17 tokens that are copied, computed and decoded: it would wait for memory forever."""
    layout = [4, [[11], [11]], 2]
    ids = prompt(layout, 13)
    outcomes = []
    for pages in (12, 13):
        cache = Cache(pages=pages)
        cache.commit(layout, ids)
        outcomes.append(cache.serve(ids, layout, 1).refused)
        assert cache.tree.protected_size() == 0
    assert outcomes[0][0] == 409
    assert "do not fit into the 48 tokens of the cache" in outcomes[0][1]
    assert outcomes[1] is None


def test_slots_are_copied_in_every_kind_of_pool(monkeypatch: pytest.MonkeyPatch):
    targets, sources = torch.tensor([8, 9, 13]), torch.tensor([5, 4, 14])
    latent = MLATokenToKVPool(64, PAGE, torch.float32, 4, 2, LAYERS, "cpu", enable_memory_saver=False)
    for buffer in latent.kv_buffer:
        buffer.copy_(torch.randn_like(buffer))
    before = [buffer.clone() for buffer in latent.kv_buffer]
    assert uncopyable(latent) is None
    copy_slots(latent, targets, sources)
    for buffer, old in zip(latent.kv_buffer, before, strict=True):
        assert torch.equal(buffer[targets], old[sources])
        assert torch.equal(buffer[:8], old[:8])

    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    by_head = MHATokenToKVPool(64, PAGE, torch.float32, 3, 2, LAYERS, "cpu", enable_memory_saver=False)
    assert by_head.kv_cache_layout == "hnd"
    assert uncopyable(by_head) is None
    buffer = by_head.k_buffer[1]
    buffer.copy_(torch.randn_like(buffer))
    old = buffer.clone()
    copy_slots(by_head, targets, sources)
    assert torch.equal(buffer[2, :, 0], old[1, :, 1])
    assert torch.equal(buffer[3, :, 1], old[3, :, 2])

    by_head.kv_cache_layout = "vectorized_5d"
    assert uncopyable(by_head) == "the KV cache layout vectorized_5d"
    assert uncopyable(object()) == "a object"
