"""Compiles the C decode kernel for this processor when it is first needed. It is optional."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from sgl_apr.server.cpu.compiler import load_library
from sgl_apr.server.cpu.decode_schedule import PIECE_SLOTS, DecodeSchedule

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode.c")


class DecodeKernel:
    """Attention of single query tokens over cached keys and values, in float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._decode = library.apr_decode
        self._decode.restype = None
        self._decode.argtypes = [*[pointer] * 10, *[number] * 7, ctypes.c_float]
        self._parts = torch.empty(0)

    def __call__(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        work: DecodeSchedule,
        scale: float,
    ) -> torch.Tensor:
        """Compute attention.

        Args:
            query: [queries, heads, dim]. Those of the rows, in general; turned ones of workers come after them.
            output: [rows, heads, v_dim], where the result is written.
            k_cache: [slots, kv_heads, dim].
            v_cache: [slots, kv_heads, v_dim].
            slots: [requests, n] int32, the slots of each request's tokens.
            work: Which slots each row attends to.
            scale: The factor for the scores.

        Returns:
            `output`.
        """
        heads, dim = query.shape[1:]
        kv_heads, v_dim = v_cache.shape[1:]
        size = work.part_indices.numel() * heads * (v_dim + 2)
        if self._parts.numel() < size:
            self._parts = torch.empty(size)
        tensors = (
            query, output, k_cache, v_cache, slots, self._parts, work.pieces, work.members, work.part_indices, work.begin
        )  # fmt: skip
        sizes = (slots.stride(0), len(work.pieces), len(output), kv_heads, heads // kv_heads, dim, v_dim)
        self._decode(*(tensor.data_ptr() for tensor in tensors), *sizes, scale)
        return output

    @staticmethod
    def supports(*tensors: torch.Tensor, slots: torch.Tensor) -> bool:
        """Return whether the kernel can read these tensors: contiguous, in float32, with int32 slots."""
        readable = all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
        return readable and slots.dtype == torch.int32 and slots.stride(1) == 1


@lru_cache(maxsize=1)
def decode_kernel() -> DecodeKernel | None:
    """Return the kernel, or None (with a warning) if there is no C compiler with OpenMP."""
    try:
        return DecodeKernel(load_library(SOURCE, [f"-DPIECE={PIECE_SLOTS}"]))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("attention runs without its C kernel, which needs a C compiler with OpenMP: %s", error)
        return None
