"""Sets the positions of the tokens of joined requests in a forward pass."""

from __future__ import annotations

from typing import Any

import torch

from sgl_apr.server.kv_join.radix_cache import JoinedPrefix


def shift_positions(batch: Any, *arguments: Any, **options: Any) -> None:
    """Shift the positions of a new `ForwardBatch`, so that a joined request continues after its longest branch.

    Args:
        batch: The new batch.
        *arguments: The positional arguments of `ForwardBatch.init_new`.
        **options: Its keyword arguments.
    """
    reqs = (arguments[1] if len(arguments) > 1 else options["batch"]).reqs
    offsets = [req.last_node.offset if isinstance(req.last_node, JoinedPrefix) else 0 for req in reqs]
    if not any(offsets):
        return
    positions = batch.positions
    shift = torch.tensor(offsets, dtype=positions.dtype, device=positions.device)
    if not batch.forward_mode.is_decode():
        shift = torch.repeat_interleave(shift, torch.tensor(batch.extend_seq_lens_cpu, device=shift.device))
    # Rows after those of the requests belong to beams, which no joined request has.
    batch.positions = positions + torch.nn.functional.pad(shift, (0, len(positions) - len(shift)))
