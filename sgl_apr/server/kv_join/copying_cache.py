"""What a radix cache that joins branches adds if pages have several tokens: it copies the branches (`paged_keys`).

A request shares the complete pages of its first branch and copies the keys and values of the other branches to pages of
its own. The copies are allocated when the request is admitted, like keys and values that SGLang loads back from the
host: this is its interface for cached tokens that need slots of the request, and it reserves their memory. The copies
belong to the request. They are freed with it, or enter the tree with what it computes. A request that is retracted
copies anew, unless its copies are in the tree. The branches are locked until the copies are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefResult,
    IncLockRefResult,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sgl_apr.server.kv_join.cache_secret import cache_secret
from sgl_apr.server.kv_join.joined_prefix import JoinedPrefix, PathSlice
from sgl_apr.server.kv_join.paged_keys import PagedPrompt, RowSlice, fill_page, resolve_pages
from sgl_apr.server.kv_join.slot_copy import PENDING_COPY
from sgl_apr.server.kv_join.validation import layout_of_request


class CacheMiss(Exception):
    """Tokens that a joined request needs are not cached, or cannot be copied."""


class CopyingRadixCache(UnifiedRadixCache):  # type: ignore[misc]  # SGLang has no types
    """SGLang's radix cache, which also finds, allocates and enters what a joined request copies (see the module)."""

    def _match_joined_pages(self, req: Any, key: RadixKey) -> MatchResult:
        """Match the pages that the prompt shares, and find what it has to copy."""
        ids, prompt = key.token_ids, _resolve_pages(req, key.extra_key, self.page_size)
        shared = RowSlice(prompt.branches[0], 0, prompt.shared)
        parts = tuple(self._find_slots(shared, key))
        limit = len(ids) if key.limit is None else min(key.limit, len(ids))
        tail = self._match_segment(ids[prompt.shared : max(limit, prompt.shared)], prompt.namespace, key)
        cached = prompt.shared + tail.device_prefix_len
        sources = tuple(
            found for piece in prompt.slices_from(cached) for found in self._find_slots(piece, key)
        )
        node = JoinedPrefix(
            parts, tail.last_device_node, prompt.namespace, prompt.shared, prompt.offset, sources
        )
        if sources:
            self._check_fits(req, node, len(ids) - cached)
        return MatchResult(
            device_prefix_len=cached,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
            host_hit_length=sum(last - first for _, first, last in sources),
        )

    def _find_slots(self, piece: RowSlice, key: RadixKey) -> Iterator[PathSlice]:
        """Yield the nodes that have the tokens of a slice.

        Raises:
            CacheMiss: Some are not cached.
        """
        row, first, last = piece.row, piece.first, piece.last
        # In a page that is filled in part, the tokens are found by all tokens of the row.
        for part in row.parts(None if last % self.page_size else last):
            begin, end = max(first, part.first), min(last, part.last)
            if begin < end:
                part_key = fill_page(row.ids(key.token_ids, part.first, part.last), self.page_size)
                node = self._match_complete(part_key, part.namespace, key)
                yield node, begin - part.first, end - part.first

    def _check_fits(self, req: Any, node: JoinedPrefix, tokens: int) -> None:
        """Check that a request would be admitted if nothing else ran: it would wait forever otherwise.

        Args:
            req: The request.
            node: Its prefix. Both the branches and their copies are in memory for a time.
            tokens: How many tokens it copies and computes.

        Raises:
            CacheMiss: It would not.
        """
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        allocator = self.token_to_kv_pool_allocator
        if allocator.available_size() + self.evictable_size() < allocator.size:
            return  # something else runs, which hides how much this request locks
        lock = self.lock(node)
        locked = self.protected_size()
        self.unlock(lock)
        tokens += min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS)
        if tokens + self.page_size >= allocator.size - locked:
            raise CacheMiss(
                f"the branches ({locked} tokens) and what is copied and decoded ({tokens}) do not fit into the "
                f"{allocator.size} tokens of the cache"
            )

    def _match_complete(self, ids: array[int], namespace: str | None, key: RadixKey) -> Any:
        """Return the node at the end of some ids.

        Raises:
            CacheMiss: Not all of them are cached.
        """
        match = self._match_segment(ids, namespace, key)
        if match.device_prefix_len < len(ids):
            raise CacheMiss(
                f"{match.device_prefix_len} of the {len(ids)} tokens of a segment are cached, expected all"
            )
        return match.last_device_node

    def _match_segment(self, ids: array[int], namespace: str | None, key: RadixKey) -> MatchResult:
        return self._match_tree(MatchPrefixParams(key=RadixKey(ids, namespace, cache_salt=key.cache_salt)))

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        """Allocate the pages of a request that is being admitted for what it copies.

        Returns:
            How many tokens are copied, and the prefix with their slots. None if there is no memory for them now.
        """
        node, req = params.best_match_node, params.req
        if not isinstance(node, JoinedPrefix):
            return super().init_load_back(params)  # type: ignore[no-any-return]
        sources = [self.path_device_indices(n)[first:last] for n, first, last in node.sources]
        tokens = sum(map(len, sources))
        size = -(-tokens // self.page_size) * self.page_size
        evict_from_tree_cache(self, size)  # not the sources: `node` is locked
        slots = self.token_to_kv_pool_allocator.alloc(size)
        if slots is None:
            return None
        setattr(req, PENDING_COPY, (slots[:tokens], torch.cat(sources)))
        req.host_hit_length = 0  # for the metrics: nothing came from the host
        return tokens, replace(node, copies=slots[:tokens])

    def load_back_is_cache_owned(self) -> bool:
        return False

    def inc_host_lock_ref(self, node_id: Any) -> IncLockRefResult:
        # SGLang locks the host's copy of what it loads back. Copies are on the device, where they are locked already.
        return IncLockRefResult() if isinstance(node_id, JoinedPrefix) else super().inc_host_lock_ref(node_id)

    def dec_host_lock_ref(self, node_id: Any, params: Any) -> DecLockRefResult:
        if isinstance(node_id, JoinedPrefix):
            return DecLockRefResult()
        return super().dec_host_lock_ref(node_id, params)

    def _insert_last_page(self, req: Any, up_to: int) -> None:
        """Insert the last page of a commit, which is filled in part, under a key that is filled up."""
        node, kv = req.last_node, req.kv
        start, namespace = (
            (node.start, node.namespace) if isinstance(node, JoinedPrefix) else (0, req.extra_key)
        )
        complete = up_to // self.page_size * self.page_size
        if complete == up_to or kv.cache_protected_len != complete:
            return
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        first = row[complete].to(torch.int64)
        page = first + torch.arange(self.page_size, device=row.device)
        ids = fill_page(req.full_untruncated_fill_ids[start:up_to], self.page_size)
        self.insert(
            InsertParams(
                key=RadixKey(ids, namespace, cache_salt=req.cache_salt),
                value=torch.cat([row[start:complete].to(torch.int64), page]),
                prev_prefix_len=complete - start,
                inserted_len=complete - start,
                priority=req.priority or 0,
            )
        )
        kv.cache_protected_len = complete + self.page_size  # the page is the tree's, or freed


def _resolve_pages(req: Any, root: str | None, page_size: int) -> PagedPrompt:
    """Like `_resolve_request`, for pages of several tokens."""
    resolved: PagedPrompt | None = getattr(req, "apr_resolved", None)
    if resolved is None:
        ids = req.origin_input_ids
        layout = layout_of_request(req, len(ids), page_size)
        resolved = req.apr_resolved = resolve_pages(layout, ids, root, cache_secret(), page_size)
    return resolved
