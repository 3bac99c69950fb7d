"""A radix cache whose requests may see branches that were written side by side, joined without a second prefill.

A joined request is an ordinary one whose prompt is prefix, branches and what follows, flat, with its layout
(`sgl_apr.trajectory.join_layout`) as JSON in `custom_params["apr_layout"]`. Its prefix is joined from the slots of the branches:
nothing is copied, every slot keeps its one owner, all nodes are locked as one. Launch with
`--radix-cache-backend apr`. It joins nothing by itself: branches have to be in the cache, or the answer is 409,
also in the middle of an answer, if the request had to make room for others and the branches went meanwhile.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sgl_apr.server.constants import CACHE_SECRET_ENV
from sgl_apr.server.kv_join.cache_keys import ResolvedPrompt, resolve
from sgl_apr.server.kv_join.validation import has_layout, layout_of_request
from sgl_apr.trajectory.join_layout import LayoutError

SECRET = bytes.fromhex(os.environ[CACHE_SECRET_ENV])  # names the trees of joined prompts


@dataclass(frozen=True, slots=True)
class JoinedPrefix:
    """In place of a tree node: slices of the paths to `parts` (node, first, last), then the path to `tail`.

    `tail` is in the tree `namespace` of what follows the join, which begins `start` tokens into the prompt;
    the positions from there on are `offset` (0 or less) off their places in the prompt.
    """

    parts: tuple[tuple[Any, int, int], ...]
    tail: Any
    namespace: str
    start: int
    offset: int

    @property
    def nodes(self) -> list[Any]:
        return [*(node for node, _, _ in self.parts), self.tail]


class KvJoinRadixCache(UnifiedRadixCache):  # type: ignore[misc]  # SGLang has no types
    """SGLang's radix cache for ordinary requests; for joined ones see above."""

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        if req is None or not has_layout(req):
            return super().match_prefix(params)
        if req.to_finish is not None:  # refused before, or aborted while it had to make room for others
            return self._empty_match(req, params.key)
        try:
            return self._match_joined(req, params.key)
        except LayoutError as error:
            return self._reject(req, params.key, str(error), HTTPStatus.BAD_REQUEST)

    def _match_joined(self, req: Any, key: RadixKey) -> MatchResult:
        ids, found = key.token_ids, _resolve_request(req, key.extra_key)
        parts: list[tuple[Any, int, int]] = []
        for part in found.parts:
            wanted = part.key(ids)
            match, last = self._match_segment(wanted, part.namespace, key), len(wanted)
            if match.device_prefix_len < last:
                where = f"of {last} tokens up to a part of the prompt {match.device_prefix_len} are cached"
                return self._reject(req, key, where, HTTPStatus.CONFLICT)
            parts.append((match.last_device_node, last - part.size, last))
        start = len(req.origin_input_ids) - found.tail
        limit = len(ids) if key.limit is None else min(key.limit, len(ids))
        tail = self._match_segment(ids[start : max(limit, start)], found.namespace, key)
        node = JoinedPrefix(tuple(parts), tail.last_device_node, str(found.namespace), start, found.offset)
        return MatchResult(
            device_prefix_len=start + tail.device_prefix_len,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    def _match_segment(self, ids: array[int], namespace: str | None, key: RadixKey) -> MatchResult:
        return self._match_tree(MatchPrefixParams(key=RadixKey(ids, namespace, cache_salt=key.cache_salt)))

    def _reject(self, req: Any, key: RadixKey, why: str, status: HTTPStatus) -> MatchResult:
        """Let the request end with an error: an exception here would end the server."""
        req.set_finish_with_abort(f"KV join: {why}", status, "AprJoin")
        req.refresh_fill_ids()  # now one token: what is left to compute before it ends
        return self._empty_match(req, key)

    def _empty_match(self, req: Any, key: RadixKey) -> MatchResult:
        """For a request that only has to end: it finds nothing, and leaves nothing."""
        req.skip_radix_cache_insert = True
        return self._match_segment(array("q"), key.extra_key, key)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        node = req.last_node
        if not isinstance(node, JoinedPrefix):
            return super().prefix_device_indices(req)
        slots = [self.path_device_indices(n)[first:last] for n, first, last in node.parts]
        return torch.cat([*slots, self.path_device_indices(node.tail)])[: req.prefix_len]

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
        for one in lock.receipt:
            super().unlock(one)

    def checkpoint(self, req: Any, *, up_to: int, **options: Any) -> None:
        """What was computed behind the join goes into its own tree; the rest is there already."""
        node = req.last_node
        if not isinstance(node, JoinedPrefix):
            super().checkpoint(req, up_to=up_to, **options)
            return
        ids = req.full_untruncated_fill_ids[node.start : up_to]
        if not len(ids):
            return
        kv, row = req.kv, self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        inserted = self.insert(
            InsertParams(
                key=RadixKey(ids, node.namespace, cache_salt=req.cache_salt),
                value=row[node.start : up_to].to(torch.int64, copy=True),
                prev_prefix_len=kv.cache_protected_len - node.start,
                inserted_len=max(0, kv.cache_inserted_len - node.start),
                priority=req.priority or 0,
            )
        )
        slots = self.path_device_indices(inserted.last_device_node)
        assert len(slots) == len(ids), "page size 1"
        end, known = node.start + len(slots), kv.cache_protected_len
        self.req_to_token_pool.write(
            (kv.req_pool_idx, slice(known, end)), slots[known - node.start :].to(torch.int32)
        )
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)
        self.unlock(req.lock)
        req.last_node = JoinedPrefix(
            node.parts, inserted.last_device_node, node.namespace, node.start, node.offset
        )
        req.lock = self.lock(req.last_node)
        kv.cache_protected_len = end


def _resolve_request(req: Any, root: str | None) -> ResolvedPrompt:
    """Where the parts of a request are, looked up once: it is matched anew whenever it is scheduled."""
    found: ResolvedPrompt | None = getattr(req, "apr_resolved", None)
    if found is None:
        ids = req.origin_input_ids
        found = req.apr_resolved = resolve(layout_of_request(req, len(ids)), ids, root, SECRET)
    return found


def make_cache(context: Any) -> Any:
    """The factory behind `--radix-cache-backend apr`; raises ValueError where it cannot join."""
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
    if what:
        raise ValueError(f"--radix-cache-backend apr does not work with {what}: stock does")
    return create_unified_radix_cache(context, cache_class=KvJoinRadixCache)


def shift_positions(batch: Any, *arguments: Any, **options: Any) -> None:
    """After `ForwardBatch.init_new`: a joined request goes on behind its longest branch."""
    reqs = (arguments[1] if len(arguments) > 1 else options["batch"]).reqs
    offsets = [req.last_node.offset if isinstance(req.last_node, JoinedPrefix) else 0 for req in reqs]
    if not any(offsets):
        return
    positions = batch.positions
    shift = torch.tensor(offsets, dtype=positions.dtype, device=positions.device)
    if not batch.forward_mode.is_decode():
        shift = torch.repeat_interleave(shift, torch.tensor(batch.extend_seq_lens_cpu, device=shift.device))
    # Rows behind those of the requests belong to beams, and no joined request has any.
    batch.positions = positions + torch.nn.functional.pad(shift, (0, len(positions) - len(shift)))
