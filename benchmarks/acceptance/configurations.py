"""The configurations of SGLang that are checked, in order of importance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import requires, version
from typing import Any

TREE_CORE_ENV = "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"  # SGLang's; "rust" unless it is set
PARTS = (
    "start", "ordinary", "joined", "mixed", "group_think", "hogwild", "refused", "graphs", "leak"
)  # fmt: skip
PAGED_PARTS = ("start", "ordinary", "joined", "pages", "mixed", "refused", "graphs", "leak")
SPEED_PARTS = ("start", "speed", "group_speed")
SPEED_PARTS_CUDA = (*SPEED_PARTS, "synchronisations")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One scheduler, and what is checked with it.

    Attributes:
        name: Its name in the output.
        flags: Flags of SGLang's server, with underscores.
        parts: What is checked, in this order.
        overlap: Whether the scheduler prepares a step while the one before is computed.
        environment: Environment variables of its process.
        may_refuse: Parts that SGLang or this package may refuse there, without this being a failure.
        separation: A control has to be this many times as far from the reference as the result.
        capabilities: Compute capabilities (major) of the cards for which it is meant; empty for all.
        same_as: It is skipped if this configuration turned out to have the same attention backend.
    """

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[str] = PARTS
    overlap: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    may_refuse: frozenset[str] = frozenset()
    separation: float = 5.0
    capabilities: frozenset[int] = frozenset()
    same_as: str | None = None


# flashinfer and the CPU's attention can turn the queries of Hogwild!, no other backend can.
NO_HOGWILD = frozenset({"hogwild"})
# Blackwell's default backend needs pages of 64 tokens, with which there are no groups.
ANY_BACKEND = frozenset({"start", "group_think", "hogwild"})
_CUDA: dict[str, Any] = {
    "dtype": "bfloat16", "max_total_tokens": 65536, "context_length": 8192, "cuda_graph_max_bs_decode": 32,
    "max_running_requests": 48,
}  # fmt: skip
_TRITON = _CUDA | {"attention_backend": "triton", "page_size": 1}
_FLASHINFER = _CUDA | {"attention_backend": "flashinfer", "page_size": 1}
_NO_GRAPHS = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"}

CUDA = (
    Configuration("SGLang's choice", _CUDA, may_refuse=ANY_BACKEND),
    Configuration("triton", _TRITON, may_refuse=NO_HOGWILD),
    Configuration("flashinfer", _FLASHINFER),
    Configuration(
        "speed", _FLASHINFER | {"load_format": "dummy"}, SPEED_PARTS_CUDA, may_refuse=frozenset({"group_speed"})
    ),
    Configuration(
        "fa3", _CUDA | {"attention_backend": "fa3", "page_size": 1}, may_refuse=NO_HOGWILD,
        capabilities=frozenset({8, 9}), same_as="SGLang's choice",
    ),
    Configuration("triton, pages of 16", _TRITON | {"page_size": 16}, PAGED_PARTS),
    Configuration("triton, no graphs, no overlap", _TRITON | _NO_GRAPHS, overlap=False, may_refuse=NO_HOGWILD),
    # Keys and values have 3 bits of mantissa there.
    Configuration(
        "triton, fp8 cache", _TRITON | {"kv_cache_dtype": "fp8_e4m3"}, may_refuse=NO_HOGWILD, separation=2.0,
        capabilities=frozenset({9, 10, 12}),
    ),
)  # fmt: skip

CPU = (
    Configuration("apr_cpu"),
    Configuration("apr_cpu, pages of 16", {"page_size": 16}, PAGED_PARTS),
    # Half precision, because that is what a GPU computes in.
    Configuration("apr_cpu, Python core, bfloat16", {"dtype": "bfloat16"}, environment={TREE_CORE_ENV: "python"}),
    Configuration("speed", {"load_format": "dummy"}, SPEED_PARTS),
)  # fmt: skip


def configurations(device: str) -> dict[str, Configuration]:
    """The configurations for a device ("cuda" or "cpu") by name, the most important one first."""
    return {c.name: c for c in (CUDA if device == "cuda" else CPU)}


def tree_core_environment() -> dict[str, str]:
    """Choose SGLang's radix core in Python where torch is not the version for which the core in Rust is compiled."""
    pinned = next((line for line in requires("sglang") or () if line.startswith("torch==")), "")
    expected = pinned.partition(";")[0].removeprefix("torch==").strip()
    if TREE_CORE_ENV in os.environ or not expected or version("torch").partition("+")[0] == expected:
        return {}
    return {TREE_CORE_ENV: "python"}
