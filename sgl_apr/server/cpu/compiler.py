"""Compiles C sources for this processor, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_cache_dir

# -ffast-math only for compiling: a linker that sees it makes the whole process flush denormals.
COMPILE_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
COMPILE_TIMEOUT_S = 60.0  # compiling takes a fraction of a second


def load_library(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Load the shared library of a C source. It is compiled once for each source and processor.

    Args:
        source: The file.
        flags: Flags of the compiler, on top of `COMPILE_FLAGS`.

    Raises:
        OSError: There is no C compiler with OpenMP, or it failed.
        subprocess.SubprocessError: It took too long.
    """
    compiler, flags = os.environ.get("CC", "cc"), [*COMPILE_FLAGS, *flags]
    processor = platform.machine() + _processor_flags()
    key = hashlib.sha256(source.read_bytes() + " ".join([compiler, processor, *flags]).encode()).hexdigest()
    library = Path(user_cache_dir("sgl_apr")) / "kernels" / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = Path(scratch) / "compiled.o", Path(scratch) / "linked.so"
            _run(compiler, *flags, str(source), "-o", str(compiled))
            _run(compiler, "-shared", "-fopenmp", str(compiled), "-o", str(linked), "-lm")
            linked.replace(library)  # atomic, for two servers that start at once
    return ctypes.CDLL(str(library))


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
