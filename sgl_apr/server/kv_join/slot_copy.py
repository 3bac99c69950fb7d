"""Copies keys and values of branches to the pages of a joined request, on the device, without host synchronization.

The cache decides what is copied when a request is admitted. The copy runs right before the request's first forward pass
and on its stream, because the forward pass before may still be computing some of the keys and values, or may still be
reading what was in the new pages.
"""

from __future__ import annotations

from typing import Any

import torch

PENDING_COPY = "apr_pending_copy"  # the attribute of a request that holds its `(targets, sources)`


def uncopyable(pool: Any) -> str | None:
    """Return what keeps the slots of a KV pool from being copied, or None.

    Returns:
        Text that completes the phrase "does not work with".
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, MLATokenToKVPoolFP4

    layout = getattr(pool, "kv_cache_layout", "nhd")
    if layout not in ("nhd", "hnd"):
        return f"the KV cache layout {layout}"
    if isinstance(pool, MHATokenToKVPool) or type(pool) in (MLATokenToKVPool, MLATokenToKVPoolFP4):
        return None
    return f"a {type(pool).__name__}"


def copy_slots(pool: Any, targets: torch.Tensor, sources: torch.Tensor) -> None:
    """Copy the keys and values of slots in all layers.

    Args:
        pool: SGLang's KV pool, of a kind that `uncopyable` allows.
        targets: [n], the slots to copy to.
        sources: [n], the slots to copy from.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if isinstance(pool, MHATokenToKVPool):
        # SGLang's other way to do this is a kernel that is only prepared for speculative decoding.
        pool.use_native_move_kv_cache = True
        pool.move_kv_cache(targets, sources)
        return
    for buffers in (pool.kv_buffer, pool.kv_scale_buffer or ()):
        for buffer in buffers:
            buffer[targets] = buffer[sources]


def copy_pending(batch: Any, *arguments: Any, **options: Any) -> None:
    """Copy what the requests of a new `ForwardBatch` have to copy before it is computed.

    Args:
        batch: The new batch.
        *arguments: The positional arguments of `ForwardBatch.init_new`.
        **options: Its keyword arguments.
    """
    if batch.forward_mode.is_decode():
        return
    values = {"batch": None, "model_runner": None} | options
    values |= dict(zip(("class", "batch", "model_runner"), arguments, strict=False))
    pairs = []
    for req in values["batch"].reqs:
        if (pair := getattr(req, PENDING_COPY, None)) is not None:
            setattr(req, PENDING_COPY, None)
            pairs.append(pair)
    if not pairs:
        return
    targets, sources = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    for pair in pairs:
        for tensor in pair:
            if tensor.is_cuda:  # it was allocated on the stream of the scheduler
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
    copy_slots(values["model_runner"].token_to_kv_pool, targets, sources)
