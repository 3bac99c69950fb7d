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

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode.c")
# -ffast-math only while compiling: a linker that sees it makes the whole process flush denormals.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
TIMEOUT = 60.0  # seconds; it takes a fraction of one


class DecodeKernel:
    """Attention of single query tokens over cached keys and values, in float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._decode, self._threads = library.apr_decode, library.apr_threads
        self._decode.restype = None
        self._decode.argtypes = [
            *[pointer] * 5, number, pointer, pointer, *[number] * 5, ctypes.c_float, pointer, number
        ]  # fmt: skip
        self._scratch = torch.empty(0)

    def __call__(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        requests: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Fills `output` [rows, heads, v_dim]; `query` [rows, heads, dim], caches [slots, kv_heads, ...].

        `slots` [requests, n] int32 says where the tokens of a request lie, `requests` and `lengths`
        [rows] int64 which request a row belongs to and how many tokens it sees.
        """
        rows, heads, dim = query.shape
        kv_heads, longest = k_cache.shape[1], int(lengths.max())
        size = self._threads() * (heads // kv_heads) * longest
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size)
        self._decode(
            query.data_ptr(), output.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(),
            slots.stride(0), requests.data_ptr(), lengths.data_ptr(), rows, kv_heads, heads // kv_heads, dim,
            v_cache.shape[2], scale, self._scratch.data_ptr(), longest,
        )  # fmt: skip
        return output

    @staticmethod
    def takes(*tensors: torch.Tensor, slots: torch.Tensor) -> bool:
        """Whether these can be read as they lie."""
        flat = all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
        return flat and slots.dtype == torch.int32 and slots.stride(1) == 1


@lru_cache(maxsize=1)
def decode_kernel() -> DecodeKernel | None:
    """The kernel, or None (and a warning) where no C compiler with OpenMP makes it."""
    try:
        return DecodeKernel(ctypes.CDLL(str(_built())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("attention runs without its C kernel, which needs a C compiler with OpenMP: %s", error)
        return None


def _built() -> Path:
    """The shared library in the user's cache, one for each source and processor."""
    compiler = os.environ.get("CC", "cc")
    processor = platform.machine() + _processor_flags()
    key = hashlib.sha256(
        SOURCE.read_bytes() + " ".join([compiler, processor, *COMPILE]).encode()
    ).hexdigest()[:16]
    library = Path(user_cache_dir("sgl_apr")) / "kernels" / f"decode-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            part, whole = Path(scratch) / "decode.o", Path(scratch) / "decode.so"
            _run(compiler, *COMPILE, str(SOURCE), "-o", str(part))
            _run(compiler, "-shared", "-fopenmp", str(part), "-o", str(whole), "-lm")
            whole.replace(library)  # whole or not at all, also when two servers start at once
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip().splitlines()[-1:]}")


def _processor_flags() -> str:
    """What the processor can do, where Linux says it: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
