"""Sets the positions of joined requests in a forward pass, and those that choose the noise of a seeded sample.

SGLang derives both from the length of a request. A joined request continues after its longest branch, so the positions
of its tokens are lower than their places in the flat prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from sglang.srt.utils.common import async_h2d

from sgl_apr.server.kv_join.joined_prefix import JoinedPrefix

SHIFT = "apr_position_shift"  # an attribute of a ForwardBatch with joined requests: what was added to its positions
_LAST_NODE = attrgetter("last_node")  # this loop runs for every request in every step


def shift_positions(forward_batch: Any, /, *arguments: Any, **options: Any) -> None:
    """Shift the positions of a new `ForwardBatch`, so that a joined request continues after its longest branch.

    The host never waits for the device here. A batch without joined requests is left as it is.

    Args:
        forward_batch: The new batch.
        *arguments: The positional arguments of `ForwardBatch.init_new`.
        **options: Its keyword arguments.
    """
    reqs = (arguments[1] if len(arguments) > 1 else options["batch"]).reqs
    if JoinedPrefix not in set(map(type, map(_LAST_NODE, reqs))):
        return
    offsets = tuple(req.last_node.offset if isinstance(req.last_node, JoinedPrefix) else 0 for req in reqs)
    positions, mrope = forward_batch.positions, forward_batch.mrope_positions
    shift = _offsets_on_device(offsets, positions.dtype, positions.device)
    if not forward_batch.forward_mode.is_decode():
        tokens = sum(forward_batch.extend_seq_lens_cpu[: len(offsets)])
        shift = shift.repeat_interleave(forward_batch.extend_seq_lens[: len(offsets)], output_size=tokens)
    if rest := len(positions) - len(shift):  # rows of beams, which are not joined
        shift = torch.nn.functional.pad(shift, (0, rest))
    forward_batch.positions = positions + shift
    if mrope is not None:  # rows for time, height and width, which are the same for text
        forward_batch.mrope_positions = mrope + shift
    setattr(forward_batch, SHIFT, shift)


@lru_cache(maxsize=16)  # a batch that only decodes has the same offsets in every step
def _offsets_on_device(offsets: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the offsets in a tensor on the device, which nobody changes.

    `torch.tensor(..., device=...)` would copy from pageable memory: the host would wait for all that the device has to
    do, and the overlap of the scheduler with the forward pass would be lost.
    """
    return async_h2d(list(offsets), dtype=dtype, device=device)


def sample_unshifted(sample: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    """Sample with a seed at a position that no other token of the request has, in place of `ModelRunner.sample`.

    The seed and the position choose the noise. SGLang takes the length of the request less one for the first token
    after a prefill, and `ForwardBatch.positions` for a decoded token. The two are the same for ordinary requests. For
    a joined request they are not, and several tokens would get the same noise. Here it is always the length.

    Args:
        sample: SGLang's `ModelRunner.sample`.
        runner: Its `self`.
        logits_output: The logits.
        forward_batch: The batch that they belong to.
    """
    shift = getattr(forward_batch, SHIFT, None)
    seeded = forward_batch.sampling_info.sampling_seed is not None
    if shift is None or not seeded or not forward_batch.forward_mode.is_decode():
        return sample(runner, logits_output, forward_batch)
    positions = forward_batch.positions
    forward_batch.positions = positions - shift
    try:
        return sample(runner, logits_output, forward_batch)
    finally:
        forward_batch.positions = positions
