"""The attention backend "apr_cpu": batched, aware of grouped queries, without padded queries.

Decoding in float32 uses a small C kernel if one can be compiled. Everything else uses torch.

The results are those of SGLang's `torch_native`, which still handles what is rare on a CPU: sliding windows, cross and
encoder attention, and a cache with another type than the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

from sgl_apr.server.constants import SHARED_PREFIX_ENV
from sgl_apr.server.cpu.attention_plan import (
    AttentionPlan,
    QuerySpan,
    RowGroup,
    Slots,
    plan_decode,
    plan_extend,
)
from sgl_apr.server.cpu.decode_schedule import DecodeSchedule, plan_pieces
from sgl_apr.server.cpu.kernel import decode_kernel
from sgl_apr.server.cpu.view_attention import TurnedQueries, attend_views
from sgl_apr.server.hooks import is_enabled
from sgl_apr.server.shared_cache.rotary import Rotation
from sgl_apr.server.shared_cache.view_plan import ViewPlan, plan_views
from sgl_apr.server.shared_cache.views import WorkerView


class AprCpuAttention(TorchNativeAttnBackend):  # type: ignore[misc]  # SGLang has no types
    """Overrides the two methods of `torch_native` that run attention on gathered keys and values.

    Args:
        model_runner: SGLang's model runner.
        share: Whether slots that several decoding requests begin with, as the branches of a fork do, are read once for
            all of them. None reads the environment variable `SHARED_PREFIX_ENV`.

    Attributes:
        worker_views: What the workers of groups attend to in the next forward pass, if it decodes. Set before
            `init_forward_metadata`.
    """

    worker_views: Sequence[WorkerView] = ()

    def __init__(self, model_runner: Any, *, share: bool | None = None) -> None:
        super().__init__(model_runner)
        self._runner = model_runner
        self._share = is_enabled(SHARED_PREFIX_ENV) if share is None else share
        # Valid for the current forward pass only: in the next one a slot may belong to another request.
        self._schedule: DecodeSchedule | None = None
        self._plans: dict[int, AttentionPlan] = {}  # by number of key heads
        self._views: ViewPlan | None = None
        self._turned: TurnedQueries | None = None  # with `_views`
        self._scratch = GatherBuffer()
        decode_kernel()  # compile it now rather than at the first token

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._schedule = None
        self._plans.clear()
        self._views = self._turned = None
        if self.worker_views:
            self._views = plan_views(self.worker_views)
            self._turned = TurnedQueries.from_plan(self._views, forward_batch.batch_size, self.rotation)

    @cached_property
    def rotation(self) -> Rotation:
        """The rotary embedding of the model, which only workers of groups need."""
        return Rotation.from_model(self._runner.model)

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        queries = query if self._turned is None else self._turned.expand(query, self.rotation)
        scaling = options.get("scaling")
        unsupported = encoder_lens is not None or _is_unsupported(query, k_cache, v_cache, options)
        kernel = None if unsupported else decode_kernel()
        if kernel is not None and kernel.supports(queries, output, k_cache, v_cache, slots=req_to_token):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if self._schedule is None:
                self._schedule = plan_pieces(
                    req_to_token, req_pool_indices, seq_lens.tolist(), share=self._share, views=self._views,
                    turned_rows={} if self._turned is None else self._turned.rows,
                )  # fmt: skip
            return kernel(queries, output, k_cache, v_cache, req_to_token, self._schedule, scale)
        if unsupported:
            batch = (req_to_token, req_pool_indices, seq_lens, encoder_lens)
            super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *batch, **options)
        else:
            workers = () if self._views is None else self._views.batch_rows
            plan = self._plan(
                k_cache,
                lambda heads: plan_decode(
                    req_to_token,
                    req_pool_indices,
                    seq_lens.tolist(),
                    heads,
                    share=self._share,
                    workers=workers,
                ),
            )
            attend(plan, query, output, k_cache, v_cache, scaling, self._scratch)
        if self._views is not None and self._turned is not None:
            caches = (k_cache, v_cache, req_to_token)
            attend_views(self._views, self._turned.rows, queries, output, *caches, scaling)
        return output

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        causal = options.get("causal", False)
        if encoder_lens is not None or not causal or _is_unsupported(query, k_cache, v_cache, options):
            batch = (req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens)
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, *batch, encoder_lens, **options
            )
        plan = self._plan(
            k_cache,
            lambda heads: plan_extend(
                req_to_token, req_pool_indices, extend_prefix_lens.tolist(), extend_seq_lens.tolist(), heads
            ),
        )
        return attend(plan, query, output, k_cache, v_cache, options.get("scaling"), self._scratch)

    def _plan(self, k_cache: torch.Tensor, make: Callable[[int], AttentionPlan]) -> AttentionPlan:
        heads = k_cache.shape[1]
        if heads not in self._plans:
            self._plans[heads] = make(heads)
        return self._plans[heads]


class GatherBuffer:
    """Reusable memory for gathered keys or values, because the pages of new memory cost more than the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def gather(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return `rows[slots]` [n, dim] in float32. It is valid until the next call."""
        size = slots.numel() * rows.shape[1]
        if self._memory.numel() < size or self._memory.dtype != rows.dtype:
            self._memory = torch.empty(size, dtype=rows.dtype)
        gathered = self._memory[:size].view(-1, rows.shape[1])
        return torch.index_select(rows, 0, slots, out=gathered).float()


def attend(
    plan: AttentionPlan,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scaling: float | None,
    scratch: GatherBuffer,
) -> torch.Tensor:
    """Compute attention with torch.

    Args:
        plan: Which rows are attended together.
        query: [tokens, heads, dim].
        output: [tokens, heads, v_dim], where the result is written.
        k_cache: [slots, kv_heads, dim].
        v_cache: [slots, kv_heads, v_dim].
        scaling: The factor for the scores, 1 / sqrt(dim) by default.
        scratch: Memory to gather keys and values into.

    Returns:
        `output`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, outputs = (x.unflatten(1, (k_cache.shape[1], -1)) for x in (query, output))
    if plan.groups:
        # Sums are in float32 whatever the model's type, as in the fused kernels.
        rows = (queries if plan.rows is None else queries.index_select(0, plan.rows)).float() * scale
        parts = rows.split([group.size for group in plan.groups])
        results = [
            _attend_group(*pair, k_cache, v_cache, scratch) for pair in zip(plan.groups, parts, strict=True)
        ]
        result = (results[0] if len(results) == 1 else torch.cat(results)).to(output.dtype)
        if plan.rows is None:
            outputs.copy_(result)
        else:
            outputs.index_copy_(0, plan.rows, result)
    for span in plan.spans:
        _attend_span(span, queries, outputs, k_cache, v_cache, scale)
    return output


def _attend_group(
    group: RowGroup, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scratch: GatherBuffer
) -> torch.Tensor:
    """Attend the rows of one group.

    Args:
        group: The rows and their slots.
        query: [rows, kv_heads, group, dim], already scaled.
        k_cache: [slots, kv_heads, dim].
        v_cache: [slots, kv_heads, v_dim].
        scratch: Memory to gather keys and values into.

    Returns:
        [rows, kv_heads, group, v_dim].
    """
    rows, heads, size, _ = query.shape
    shared, own = group.prefix, group.own.shape[2]

    def gather_own(cache: torch.Tensor) -> torch.Tensor:
        return scratch.gather(cache.flatten(0, 1), group.own.flatten()).view(rows * heads, own, -1)

    scores = torch.bmm(query.flatten(0, 1), gather_own(k_cache).transpose(1, 2)).view(rows, heads, size, own)
    if group.padding is not None:
        scores.masked_fill_(group.padding[:, None, None, :], float("-inf"))
    if shared:  # all rows with the same keys: one larger product per head
        stacked = query.transpose(0, 1).reshape(heads, rows * size, -1)
        prefix = torch.bmm(stacked, _read(k_cache, group.shared).float().permute(1, 2, 0))
        scores = torch.cat([prefix.view(heads, rows, size, shared).transpose(0, 1), scores], dim=-1)
    weights = scores.softmax(-1)

    result = torch.bmm(weights[..., shared:].flatten(0, 1), gather_own(v_cache)).view(rows, heads, size, -1)
    if shared:
        stacked = weights[..., :shared].transpose(0, 1).reshape(heads, rows * size, shared)
        prefix = torch.bmm(stacked, _read(v_cache, group.shared).float().transpose(0, 1))
        result += prefix.view(heads, rows, size, -1).transpose(0, 1)
    return result


def _attend_span(
    span: QuerySpan,
    queries: torch.Tensor,
    outputs: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
) -> None:
    """Attend one span with a fused call. The heads of a group share keys by a stride of 0, so nothing is copied."""
    query = queries[span.start : span.stop].permute(1, 2, 0, 3)  # [kv_heads, group, tokens, dim]
    size = query.shape[1]
    keys = _read(k_cache, span.slots).transpose(0, 1)[:, None].expand(-1, size, -1, -1)
    values = _read(v_cache, span.slots).transpose(0, 1)[:, None].expand(-1, size, -1, -1)
    mask = None
    if span.prefix:
        last = torch.arange(
            span.prefix, span.prefix + query.shape[2]
        )  # the last key that each query attends to
        mask = torch.arange(keys.shape[2]) <= last[:, None]
    result = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    outputs[span.start : span.stop] = result.permute(2, 0, 1, 3)


def _read(cache: torch.Tensor, slots: Slots) -> torch.Tensor:
    return cache[slots] if isinstance(slots, slice) else cache.index_select(0, slots)


def _is_unsupported(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, options: Mapping[str, Any]
) -> bool:
    """Return whether `torch_native` has to handle the request."""
    window = options.get("sliding_window_size")
    if options.get("is_cross_attn") or (window is not None and window > -1):
        return True
    contiguous = k_cache.is_contiguous() and v_cache.is_contiguous()
    return not (query.dtype == k_cache.dtype == v_cache.dtype and contiguous)
