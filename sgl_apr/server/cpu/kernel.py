"""Compiles the C decode kernel for this processor when it is first needed. It is optional."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from platformdirs import user_cache_dir

from sgl_apr.server.cpu.decode_schedule import PIECE_SLOTS, DecodeSchedule

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode.c")
# -ffast-math only for compiling: a linker that sees it makes the whole process flush denormals.
COMPILE_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", f"-DPIECE={PIECE_SLOTS}", "-c")
COMPILE_TIMEOUT_S = 60.0  # compiling takes a fraction of a second


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
            query: [rows, heads, dim].
            output: [rows, heads, v_dim], where the result is written.
            k_cache: [slots, kv_heads, dim].
            v_cache: [slots, kv_heads, v_dim].
            slots: [requests, n] int32, the slots of each request's tokens.
            work: Which slots each row attends to.
            scale: The factor for the scores.

        Returns:
            `output`.
        """
        rows, heads, dim = query.shape
        kv_heads, v_dim = v_cache.shape[1:]
        size = work.part_indices.numel() * heads * (v_dim + 2)
        if self._parts.numel() < size:
            self._parts = torch.empty(size)
        tensors = (
            query, output, k_cache, v_cache, slots, self._parts, work.pieces, work.members, work.part_indices, work.begin
        )  # fmt: skip
        sizes = (slots.stride(0), len(work.pieces), rows, kv_heads, heads // kv_heads, dim, v_dim)
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
        return DecodeKernel(ctypes.CDLL(str(_compiled_library())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("attention runs without its C kernel, which needs a C compiler with OpenMP: %s", error)
        return None


def _compiled_library() -> Path:
    """Return the shared library in the user's cache, one for each source and processor. Compile it if needed."""
    compiler = os.environ.get("CC", "cc")
    processor = platform.machine() + _processor_flags()
    key = hashlib.sha256(
        SOURCE.read_bytes() + " ".join([compiler, processor, *COMPILE_FLAGS]).encode()
    ).hexdigest()[:16]
    library = Path(user_cache_dir("sgl_apr")) / "kernels" / f"decode-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = Path(scratch) / "decode.o", Path(scratch) / "decode.so"
            _run(compiler, *COMPILE_FLAGS, str(SOURCE), "-o", str(compiled))
            _run(compiler, "-shared", "-fopenmp", str(compiled), "-o", str(linked), "-lm")
            linked.replace(library)  # atomic, for two servers that start at once
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip().splitlines()[-1:]}")


def _processor_flags() -> str:
    """Return the processor's features, which Linux lists. Several machines may share one cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
