"""Shortens the import of SGLang, which takes most of the time that a server needs to start.

Two parts of it can be left out. Python's garbage collector looks at all objects again and again while a million of
them are made, and finds next to nothing. And SGLang imports flashinfer, whose kernels run on a GPU only, to look for a
function of it. The environment variables in `constants` switch each of these off.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sgl_apr.server.constants import PAUSE_GC_ENV, SKIP_FLASHINFER_ENV
from sgl_apr.server.hooks import has_accelerator, is_enabled

GPU_PACKAGE = "flashinfer"


@contextmanager
def fast_imports() -> Iterator[None]:
    """Inside the block, SGLang is imported without what has no use for this process."""
    with contextlib.ExitStack() as stack:
        if is_enabled(PAUSE_GC_ENV):
            stack.enter_context(_paused_gc())
        if is_enabled(SKIP_FLASHINFER_ENV) and not has_accelerator():
            stack.enter_context(_hidden(GPU_PACKAGE))
        yield


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Collect no garbage inside the block, and never again look at the objects that were made in it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let a package seem not to be installed inside the block. Does nothing if it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
    try:
        yield
    finally:
        if sys.modules.get(package, ...) is None:
            del sys.modules[package]
