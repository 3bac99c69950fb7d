"""A radix cache that joins branches which were decoded in parallel, without a second prefill.

A request is joined if its layout (`sgl_apr.trajectory.join_layout`) is in `custom_params["apr_layout"]`, as JSON. Its
prompt is flat: the prefix, the branches and what follows them. Launch the server with `--radix-cache-backend apr`.

With pages of one token, the cache builds the prefix of the request from the slots of the branches. It copies nothing,
every slot keeps its one owner, and all nodes are locked together.

With larger pages, slots cannot be shared like that: the request copies branches to pages of its own (`copying_cache`).

The branches have to be in the cache already (a client commits them), or the request fails with `CACHE_MISS_STATUS`.
It can also fail in the middle of its output, if it was retracted to make room for others and its branches were
evicted meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey

from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.server.kv_join.cache_keys import ResolvedPrompt, resolve
from sgl_apr.server.kv_join.cache_secret import cache_secret
from sgl_apr.server.kv_join.copying_cache import CacheMiss, CopyingRadixCache
from sgl_apr.server.kv_join.joined_prefix import JoinedPrefix, PathSlice
from sgl_apr.server.kv_join.slot_copy import uncopyable
from sgl_apr.server.kv_join.validation import has_layout, layout_of_request
from sgl_apr.trajectory.join_layout import LayoutError


class KvJoinRadixCache(CopyingRadixCache):
    """SGLang's radix cache, which also serves joined requests (see the module)."""

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        if req is None or not has_layout(req):
            return super().match_prefix(params)
        if req.to_finish is not None:  # rejected before, or aborted while it was retracted
            return self._empty_match(req, params.key)
        try:
            match_joined = self._match_joined if self.page_size == 1 else self._match_joined_pages
            return match_joined(req, params.key)
        except LayoutError as error:
            return self._reject(req, params.key, str(error), HTTPStatus.BAD_REQUEST)
        except CacheMiss as error:
            return self._reject(req, params.key, str(error), HTTPStatus(CACHE_MISS_STATUS))

    def _match_joined(self, req: Any, key: RadixKey) -> MatchResult:
        """Match every segment of the prompt in its tree, and the tokens after the last join in theirs."""
        ids, resolved = key.token_ids, _resolve_request(req, key.extra_key)
        parts: list[PathSlice] = []
        for segment in resolved.parts:
            segment_key = segment.key(ids)
            last = len(segment_key)
            node = self._match_complete(segment_key, segment.namespace, key)
            parts.append((node, last - segment.size, last))
        start = len(req.origin_input_ids) - resolved.tail
        limit = len(ids) if key.limit is None else min(key.limit, len(ids))
        tail = self._match_segment(ids[start : max(limit, start)], resolved.namespace, key)
        node = JoinedPrefix(
            tuple(parts), tail.last_device_node, str(resolved.namespace), start, resolved.offset
        )
        return MatchResult(
            device_prefix_len=start + tail.device_prefix_len,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    def _reject(self, req: Any, key: RadixKey, why: str, status: HTTPStatus) -> MatchResult:
        """Let the request end with an error. An exception here would end the server."""
        req.set_finish_with_abort(f"KV join: {why}", status, "AprJoin")
        req.refresh_fill_ids()  # now a single token, which SGLang computes before the request ends
        return self._empty_match(req, key)

    def _empty_match(self, req: Any, key: RadixKey) -> MatchResult:
        """Return an empty match for a request that only has to end, and cache nothing of it."""
        req.skip_radix_cache_insert = True
        return self._match_segment(array("q"), key.extra_key, key)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        node = req.last_node
        if not isinstance(node, JoinedPrefix):
            return super().prefix_device_indices(req)
        slots = [self.path_device_indices(n)[first:last] for n, first, last in node.parts]
        slots.append(self.path_device_indices(node.tail))
        if node.copies is not None:
            slots.append(node.copies)
        return torch.cat(slots)[: req.prefix_len]

    def dfs_weight_order(self, node_handles: Sequence[Any]) -> list[int]:
        return list(
            super().dfs_weight_order([n.tail if isinstance(n, JoinedPrefix) else n for n in node_handles])
        )

    def lock(self, node: Any, skip_lock_components: Sequence[Any] = ()) -> TreeLock | None:
        if not isinstance(node, JoinedPrefix):
            return super().lock(node, skip_lock_components)
        return TreeLock(
            node, [super(KvJoinRadixCache, self).lock(n, skip_lock_components) for n in node.nodes]
        )

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None or not isinstance(lock.node, JoinedPrefix):
            super().unlock(lock)
            return
        for node_lock in lock.receipt:
            super().unlock(node_lock)

    def checkpoint(self, req: Any, *, up_to: int, **options: Any) -> None:
        """Insert what a request has computed, and copied, into its tree."""
        if isinstance(req.last_node, JoinedPrefix):
            self._checkpoint_joined(req, up_to)
        else:
            super().checkpoint(req, up_to=up_to, **options)
        if self.page_size > 1 and req.finished() and req.sampling_params.max_new_tokens == 0:
            self._insert_last_page(req, up_to)

    def _checkpoint_joined(self, req: Any, up_to: int) -> None:
        """Insert the tokens of the request's own tree. The tokens before it are cached already."""
        node = req.last_node
        ids = req.full_untruncated_fill_ids[node.start : up_to]
        key = RadixKey(ids, node.namespace, cache_salt=req.cache_salt).page_aligned(self.page_size)
        if not len(key):
            return
        kv, row = req.kv, self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        end, protected = node.start + len(key), kv.cache_protected_len
        inserted = self.insert(
            InsertParams(
                key=key,
                value=row[node.start : end].to(torch.int64, copy=True),
                prev_prefix_len=protected - node.start,
                inserted_len=max(0, kv.cache_inserted_len - node.start),
                priority=req.priority or 0,
            )
        )
        slots = self.path_device_indices(inserted.last_device_node)
        assert len(slots) == len(key), "the insert ends at the end of the key"
        self.req_to_token_pool.write(
            (kv.req_pool_idx, slice(protected, end)), slots[protected - node.start :].to(torch.int32)
        )
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)
        self.unlock(req.lock)
        req.last_node = replace(node, tail=inserted.last_device_node, sources=(), copies=None)
        req.lock = self.lock(req.last_node)
        kv.cache_protected_len = end


def _resolve_request(req: Any, root: str | None) -> ResolvedPrompt:
    """Resolve the prompt of a request once, and keep the result: a request is matched each time it is scheduled."""
    resolved: ResolvedPrompt | None = getattr(req, "apr_resolved", None)
    if resolved is None:
        ids = req.origin_input_ids
        resolved = req.apr_resolved = resolve(layout_of_request(req, len(ids)), ids, root, cache_secret())
    return resolved


def make_cache(context: Any) -> Any:
    """Make the cache of `--radix-cache-backend apr`.

    Args:
        context: SGLang's context of the cache.

    Raises:
        ValueError: This server cannot join in its cache.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    from sgl_apr.server.kv_join.compatibility import incompatibility

    what = incompatibility(resolving_view(context.server_args), context.model_config)
    if context.is_hybrid_ssm:
        what = "a model with recurrent state"
    elif context.is_hybrid_swa or context.tp_worker.model_runner.sliding_window_size:
        what = "a model with a sliding window"
    elif context.disable_radix_cache:
        what = "a disabled radix cache"
    elif (size := context.params.page_size) > 1 and (
        why := uncopyable(context.params.token_to_kv_pool_allocator.get_kvcache())
    ):
        what = f"--page-size {size} and {why}"
    if what:
        raise ValueError(f"--radix-cache-backend apr does not work with {what}, expected stock")
    return create_unified_radix_cache(context, cache_class=KvJoinRadixCache)
