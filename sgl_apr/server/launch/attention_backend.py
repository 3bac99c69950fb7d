"""Chooses the attention backend of a server on an NVIDIA GPU.

SGLang's own choice comes first: it is the fastest one for the model and the GPU, and some models run on no other. Other
backends are tried only where the model cannot run on SGLang's choice, or loses the radix cache or joins with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.server.kv_join.compatibility import attention_backends, incompatibility, is_sparse

FALLBACK_BACKENDS = ("fa3", "triton", "flashinfer")  # in the order in which they are tried
# The prefill of flashinfer is compiled for multiples of this head dimension only. That of Triton supports any.
FLASHINFER_HEAD_DIM_MULTIPLE = 64
SGLANGS_CHOICE = "SGLang's choice"
MAX_ERROR_CHARS = 160
BEST_RANK = 3


@dataclass(frozen=True, slots=True)
class ResolvedAttention:
    """What SGLang makes of the flags of a server, as far as attention is concerned.

    Attributes:
        backend: The attention backend, or those of prefill and decode.
        failure: Why the model cannot run on it, or None.
        keeps_prefixes: Whether SGLang's radix cache is on, so that a fork does not compute its prefix again.
        incompatibility: What keeps the server from joining branches in its KV cache, or None.
    """

    backend: str
    failure: str | None = None
    keeps_prefixes: bool = True
    incompatibility: str | None = None

    @property
    def rank(self) -> int:
        """How much works: 3 if all does, 2 without joins, 1 without the radix cache, 0 if nothing does."""
        if self.failure is not None:
            return 0
        if not self.keeps_prefixes:
            return 1
        return 2 if self.incompatibility else 3

    @property
    def problem(self) -> str:
        """What does not work, if it does not all work."""
        if self.failure is not None:
            return self.failure
        if not self.keeps_prefixes:
            return "SGLang turns its radix cache off there"
        return f"joins do not work with {self.incompatibility}"


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The attention backend of a server.

    Attributes:
        flags: The flags that select it, in addition to those of the server. None for SGLang's own choice.
        reason: Why it is this one.
        rejected: If branches cannot be joined with any backend, why not with each of those that were tried.
    """

    flags: tuple[str, ...] = ()
    reason: str = ""
    rejected: tuple[str, ...] = ()


Resolver = Callable[[Sequence[str]], ResolvedAttention]


def choose_attention(resolve: Resolver, *, page_size_is_set: bool = False) -> AttentionChoice:
    """Choose the attention backend of a server whose user has set none.

    Args:
        resolve: Resolves the flags of the server together with others. It may raise any exception of SGLang.
        page_size_is_set: Whether the user has set the page size. Otherwise other backends than SGLang's choice are
            tried with pages of one token.

    Returns:
        SGLang's own choice, unless more works with another backend. Then the first with which most works.
    """
    own = _try(resolve, (), SGLANGS_CHOICE)
    if own.rank == BEST_RANK:
        return AttentionChoice(reason=SGLANGS_CHOICE)
    others: dict[tuple[str, ...], ResolvedAttention] = {}
    for backend in FALLBACK_BACKENDS:
        flags = ("--attention-backend", backend, *(() if page_size_is_set else ("--page-size", "1")))
        others[flags] = _try(resolve, flags, backend)
    best = max(others, key=lambda flags: others[flags].rank)
    if others[best].rank > own.rank:
        chosen = AttentionChoice(best, f"in place of {own.backend}: {own.problem}")
    else:
        chosen = AttentionChoice(reason=SGLANGS_CHOICE)
    # If the same obstacle stays with another backend, it is the model or a flag, and no backend is the reason.
    if others[best].rank == BEST_RANK or own.incompatibility in [o.incompatibility for o in others.values()]:
        return chosen
    return replace(chosen, rejected=tuple(f"{other.backend}: {other.problem}" for other in others.values()))


def _try(resolve: Resolver, flags: Sequence[str], backend: str) -> ResolvedAttention:
    try:
        return resolve(flags)
    except Exception as error:  # SGLang has no common type for the combinations that it refuses
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return ResolvedAttention(backend, f"SGLang refuses it: {lines[0][:MAX_ERROR_CHARS]}")


def resolved_attention(args: Any, *, joins: bool = True) -> ResolvedAttention:
    """Describe the attention of resolved server arguments.

    Args:
        args: SGLang's `ServerArgs`, resolved.
        joins: Whether the server is to join branches in its KV cache.
    """
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.runtime_context import get_platform

    view, model = resolving_view(args), model_config_of(args)
    prefill, decode = attention_backends(view)
    return ResolvedAttention(
        describe_backends(prefill, decode),
        attention_failure(prefill, decode, model, get_platform().device_sm // 10),
        not view.disable_radix_cache,
        incompatibility(view, model) if joins else None,
    )


def describe_backends(prefill: str, decode: str) -> str:
    """Return the names of the attention backends of a server as one text."""
    return prefill if prefill == decode else f"{prefill} for prefill and {decode} for decode"


def attention_failure(prefill: str, decode: str, model: Any, capability: int) -> str | None:
    """Return why a model cannot run on attention backends. SGLang finds that out when it is too late, or not at all.

    Args:
        prefill: The attention backend of prefill.
        decode: The attention backend of decode.
        model: SGLang's `ModelConfig`.
        capability: The major number of the GPU's compute capability.
    """
    if is_sparse(model) and set(FALLBACK_BACKENDS) & {prefill, decode}:
        return "the model's sparse attention would be dense"
    is_mla = model.attention_arch.name == "MLA"
    # As in SGLang's create_flashattention_v3_backend.
    if "fa3" in (prefill, decode) and capability not in ((9,) if is_mla else (8, 9)):
        needs = "9 for a model with MLA" if is_mla else "8 or 9"
        return f"fa3 needs a GPU of compute capability {needs}, this one has {capability}"
    dim = model.qk_nope_head_dim + model.qk_rope_head_dim if is_mla else model.head_dim
    if prefill == "flashinfer" and dim % FLASHINFER_HEAD_DIM_MULTIPLE:
        return f"flashinfer needs heads of a multiple of {FLASHINFER_HEAD_DIM_MULTIPLE} dimensions, this model has {dim}"
    return None


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Inside the block, SGLang resolves arguments without a line in the log. Environment variables are then restored."""
    environment, disabled = dict(os.environ), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        os.environ.clear()
        os.environ.update(environment)
