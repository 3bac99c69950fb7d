"""A radix cache whose requests may see branches that were written side by side, joined without a second prefill.

A joined request is an ordinary one whose prompt is prefix, branches and what follows, flat, with its layout
(`sgl_apr.layout`) as JSON in `custom_params["apr_layout"]`. Its prefix is stitched from the slots of the branches:
nothing is copied, every slot keeps its one owner, all nodes are locked as one. Launch with
`--radix-cache-backend apr`. It joins nothing by itself: branches have to be in the cache, or the answer is 409.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sgl_apr.layout import LayoutError, parse
from sgl_apr.server import plugin
from sgl_apr.server.kv_layout import resolve

LAYOUT = "apr_layout"
SECRET = bytes.fromhex(os.environ[plugin.SECRET])  # names the trees of joined prompts


@dataclass(frozen=True, slots=True)
class Stitched:
    """In place of a tree node: slices of the paths to `parts` (node, first, last), then the path to `tail`.

    `tail` is in the tree `namespace` of what follows the join, which begins `start` tokens into the prompt.
    """

    parts: tuple[tuple[Any, int, int], ...]
    tail: Any
    namespace: str
    start: int

    @property
    def nodes(self) -> list[Any]:
        return [*(node for node, _, _ in self.parts), self.tail]


class JoiningCache(UnifiedRadixCache):  # type: ignore[misc]  # SGLang has no types
    """SGLang's radix cache for ordinary requests; for joined ones see above."""

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        text = _layout(req)
        if text is None:
            return super().match_prefix(params)
        try:
            return self._stitch(req, params.key, text)
        except LayoutError as error:
            return self._refuse(req, params.key, str(error), HTTPStatus.BAD_REQUEST)

    def _stitch(self, req: Any, key: RadixKey, text: str) -> MatchResult:
        if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
            raise LayoutError("a joined prompt is not computed again: expected no log-probabilities of it")
        ids, new = key.token_ids, len(key.token_ids) - len(req.origin_input_ids)
        layout = parse(text, len(ids) - new)
        found = resolve(layout, ids, key.extra_key, SECRET)
        start = len(ids) - new - found.tail
        parts: list[tuple[Any, int, int]] = []
        for part in found.parts:
            match = self._match(part.key, part.namespace, key)
            last = len(part.key)
            if match.device_prefix_len < last:
                where = f"of {last} tokens up to a part of the prompt {match.device_prefix_len} are cached"
                return self._refuse(req, key, where, HTTPStatus.CONFLICT)
            parts.append((match.last_device_node, last - part.size, last))
        limit = len(ids) if key.limit is None else min(key.limit, len(ids))
        tail = self._match(ids[start : max(limit, start)], found.namespace, key)
        req.apr_offset = found.offset
        node = Stitched(tuple(parts), tail.last_device_node, str(found.namespace), start)
        return MatchResult(
            device_prefix_len=start + tail.device_prefix_len,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    def _match(self, ids: Sequence[int], namespace: str | None, key: RadixKey) -> MatchResult:
        found = RadixKey(type(key.token_ids)("q", ids), namespace, cache_salt=key.cache_salt)
        return self._match_tree(MatchPrefixParams(key=found))

    def _refuse(self, req: Any, key: RadixKey, why: str, status: HTTPStatus) -> MatchResult:
        """End the request with an error, and match nothing: an exception here would end the server."""
        req.to_finish = FINISH_ABORT(f"KV join: {why}", status, "AprJoin")
        req.skip_radix_cache_insert = True
        return self._match((), key.extra_key, key)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        node = req.last_node
        if not isinstance(node, Stitched):
            return super().prefix_device_indices(req)
        slots = [self.path_device_indices(n)[first:last] for n, first, last in node.parts]
        return torch.cat([*slots, self.path_device_indices(node.tail)])[: req.prefix_len]

    def lock(self, node: Any, skip_lock_components: Sequence[Any] = ()) -> TreeLock | None:
        if not isinstance(node, Stitched):
            return super().lock(node, skip_lock_components)
        return TreeLock(node, [super(JoiningCache, self).lock(n, skip_lock_components) for n in node.nodes])

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None or not isinstance(lock.node, Stitched):
            super().unlock(lock)
            return
        for one in lock.receipt:
            super().unlock(one)

    def checkpoint(self, req: Any, *, up_to: int, **options: Any) -> None:
        """What was computed behind the join goes into its own tree; the rest is there already."""
        node = req.last_node
        if not isinstance(node, Stitched):
            super().checkpoint(req, up_to=up_to, **options)
            return
        ids = req.full_untruncated_fill_ids[node.start : up_to]
        if self.disable or not len(ids):
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
        req.last_node = Stitched(node.parts, inserted.last_device_node, node.namespace, node.start)
        req.lock = self.lock(req.last_node)
        kv.cache_protected_len = end


def _layout(req: Any) -> str | None:
    """The layout of a request that has one and goes on."""
    if req is None or req.to_finish is not None:
        return None
    params = req.sampling_params.custom_params
    text = params.get(LAYOUT) if isinstance(params, dict) else None
    return text if text is None or isinstance(text, str) else "null"


def make(context: Any) -> Any:
    """The factory behind `--radix-cache-backend apr`; raises ValueError for what it cannot join in."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    page = context.params.page_size
    for what, there in (
        (f"page size {page}", page != 1),
        ("a sliding window", context.is_hybrid_swa),
        ("a state-space model", context.is_hybrid_ssm),
        ("a hierarchical cache", context.enable_hierarchical_cache),
    ):
        if there:
            raise ValueError(f"--radix-cache-backend apr does not work with {what}")
    return create_unified_radix_cache(context, cache_class=JoiningCache)


def shift_positions(batch: Any, *arguments: Any, **options: Any) -> None:
    """After `ForwardBatch.init_new`: a joined request goes on behind its longest branch."""
    schedule = arguments[1] if len(arguments) > 1 else options["batch"]
    offsets = [getattr(req, "apr_offset", 0) for req in schedule.reqs]
    if not any(offsets) or batch.positions is None or not batch.positions.numel():
        return
    shift = torch.tensor(offsets, dtype=batch.positions.dtype, device=batch.positions.device)
    if not batch.forward_mode.is_decode():
        sizes = torch.tensor(batch.extend_seq_lens_cpu, device=shift.device)
        shift = torch.repeat_interleave(shift, sizes)
    batch.positions = batch.positions + shift
