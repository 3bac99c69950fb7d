"""Applies llguidance's token masks on a CPU with a C kernel, in place of one that torch compiles at the first request.

Torch compiles its kernel again in each server, and three times: for one row, for several, and for more. That takes two
to three seconds of each start. The results are the same.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sgl_apr.errors import LaunchError
from sgl_apr.server.cpu.compiler import load_library
from sgl_apr.server.hooks import hook_around

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("mask.c")


class MaskKernel:
    """Sets the logits of forbidden tokens to minus infinity, in place."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._apply = library.apr_apply_mask
        self._apply.restype = None
        self._apply.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 5]

    def __call__(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        """Apply a mask.

        Args:
            logits: [rows, vocabulary], float32.
            mask: [rows, words], int32. Bit `i` of word `w` allows token `32 * w + i`; the mask allows no token that it
                has no bit for.
        """
        (rows, vocab), words = logits.shape, mask.shape[1]
        self._apply(logits.data_ptr(), mask.data_ptr(), rows, vocab, words, logits.stride(0), mask.stride(0))

    @staticmethod
    def supports(logits: torch.Tensor, mask: torch.Tensor) -> bool:
        """Return whether the kernel can read these tensors."""
        return (
            (logits.dtype, mask.dtype) == (torch.float32, torch.int32)
            and logits.device.type == mask.device.type == "cpu"
            and logits.dim() == mask.dim() == 2
            and len(logits) == len(mask)
            and logits.stride(1) == mask.stride(1) == 1
        )


@lru_cache(maxsize=1)
def mask_kernel() -> MaskKernel | None:
    """Return the kernel, or None (with a warning) if there is no C compiler with OpenMP."""
    try:
        return MaskKernel(load_library(SOURCE))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "torch compiles the kernel for token masks: there is no C compiler for ours: %s", error
        )
        return None


def register_hooks() -> None:
    """Let llguidance's grammars apply their masks with the kernel, if SGLang is as expected."""
    path = "sglang.srt.constrained.llguidance_backend:GuidanceGrammar.apply_vocab_mask"
    try:
        hook_around(path, ["logits", "vocab_mask"], apply_vocab_mask)
    except LaunchError as error:
        logger.warning("torch compiles the kernel for token masks: %s", error)


def apply_vocab_mask(original: Callable[..., Any], logits: torch.Tensor, vocab_mask: torch.Tensor) -> Any:
    """Take the place of `GuidanceGrammar.apply_vocab_mask`. What the kernel cannot read is left to SGLang."""
    kernel = mask_kernel()
    if kernel is None or not kernel.supports(logits, vocab_mask):
        return original(logits, vocab_mask)
    return kernel(logits, vocab_mask)
