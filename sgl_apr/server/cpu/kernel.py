"""The C decode kernel, compiled for this processor when first wanted; what cannot be compiled is done without."""

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
# -ffast-math only while compiling: a linker that sees it makes the whole process flush denormals.
COMPILE_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", f"-DPIECE={PIECE_SLOTS}", "-c")
COMPILE_TIMEOUT_S = 60.0  # seconds; it takes a fraction of one


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
        """Fills `output` [rows, heads, v_dim]; `query` [rows, heads, dim], caches [slots, kv_heads, ...].

        `slots` [requests, n] int32 says where the tokens of a request lie, and `work` what each row sees.
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
        """Whether these can be read as they lie."""
        flat = all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
        return flat and slots.dtype == torch.int32 and slots.stride(1) == 1


@lru_cache(maxsize=1)
def decode_kernel() -> DecodeKernel | None:
    """The kernel, or None (and a warning) where no C compiler with OpenMP makes it."""
    try:
        return DecodeKernel(ctypes.CDLL(str(_compiled_library())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("attention runs without its C kernel, which needs a C compiler with OpenMP: %s", error)
        return None


def _compiled_library() -> Path:
    """The shared library in the user's cache, one for each source and processor."""
    compiler = os.environ.get("CC", "cc")
    processor = platform.machine() + _processor_flags()
    key = hashlib.sha256(
        SOURCE.read_bytes() + " ".join([compiler, processor, *COMPILE_FLAGS]).encode()
    ).hexdigest()[:16]
    library = Path(user_cache_dir("sgl_apr")) / "kernels" / f"decode-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            part, whole = Path(scratch) / "decode.o", Path(scratch) / "decode.so"
            _run(compiler, *COMPILE_FLAGS, str(SOURCE), "-o", str(part))
            _run(compiler, "-shared", "-fopenmp", str(part), "-o", str(whole), "-lm")
            whole.replace(library)  # whole or not at all, also when two servers start at once
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip().splitlines()[-1:]}")


def _processor_flags() -> str:
    """What the processor can do, where Linux says it: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
