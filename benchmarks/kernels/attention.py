"""Time of one attention layer on the same tensors, without a model or a server.

It compares apr_cpu with SGLang's torch_native, and with an apr_cpu that reads the shared prefix of a fork for each branch.

python -m benchmarks.kernels.attention [--json] [--check] [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import hardware
from sgl_apr.server.launch.defaults import SERVER_ENVIRONMENT

os.environ |= SERVER_ENVIRONMENT | dict(os.environ)  # as in the server; torch reads it when it is loaded

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sgl_apr.server.cpu.attention import AprCpuAttention

RUNNER = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
FORK_BAR = 2.0  # minimal speed-up for 8 branches after 1,024 tokens
SHAPES = {"smollm2": (9, 3, 64, 30), "tiny": (4, 2, 32, 3)}  # query heads, key heads, head dim, layers


@dataclass(frozen=True, slots=True)
class Case:
    """A batch to time.

    Attributes:
        name: The name of the case.
        shape: A key of `SHAPES`.
        requests: Number of requests.
        context: Tokens of the longest context.
        new: New tokens of each request; 0 means decoding.
        shared: Tokens that all contexts have in common.
        spread: By which share of `context` the shortest context is shorter.
        runs: Whether cache slots are contiguous, as for a prefill into free space, instead of random.
        bar: The minimal speed-up, None without one.
    """

    name: str
    shape: str
    requests: int
    context: int
    new: int = 0
    shared: int = 0
    spread: float = 0.2
    runs: bool = False
    bar: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Median milliseconds per layer, and the largest difference between the two outputs."""

    case: Case
    torch_native_ms: float
    apr_cpu_ms: float
    speedup: float
    max_difference: float

    @property
    def passed(self) -> bool:
        return self.max_difference <= 1e-5 and (self.case.bar is None or self.speedup >= self.case.bar)


def cases() -> list[Case]:
    found = []
    for shape in SHAPES:
        for requests, bar in ((1, None), (4, None), (8, 4.0), (16, 4.0), (32, None), (64, 2.0)):
            for context in (128, 300, 600):
                found.append(Case("decode", shape, requests, context, bar=bar))
        found += [
            Case("decode, lengths 30-600", shape, 64, 600, spread=0.95, bar=2.0),
            Case("decode, lengths 100-2000", shape, 16, 2000, spread=0.95),
            Case("decode, fork of 8", shape, 8, 600, shared=500, bar=4.0),
            Case("decode, fork of 16", shape, 16, 600, shared=500, bar=4.0),
            Case("decode, fork of 64", shape, 64, 600, shared=500, bar=2.0),
            Case("decode, fork of 8, prefix in a run", shape, 8, 600, shared=500, runs=True),
            Case("decode, fork of 16, prefix in a run", shape, 16, 600, shared=500, runs=True),
            Case("extend", shape, 1, 2306, new=2, spread=0, bar=20.0),
            Case("extend, prefix in a run", shape, 1, 2306, new=2, spread=0, runs=True),
            Case("extend, fork of 8", shape, 8, 510, new=10, shared=500, spread=0),
            Case("extend", shape, 1, 600, new=100, spread=0),
            Case("extend", shape, 1, 2000, new=1000, spread=0),
            Case("prefill", shape, 1, 1000, new=1000, spread=0),
        ]
    return found


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of a case.

    Attributes:
        case: The case.
        query: Queries [tokens, heads, dim].
        caches: Pairs of keys and values [slots, kv_heads, dim], which the layers use in turn.
        indices: The remaining tensor arguments: the table of slots, request indices, lengths and so on.
    """

    case: Case
    query: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    indices: tuple[torch.Tensor, ...]

    def forward(self, backend: Any) -> torch.Tensor:
        """Run all layers, including planning, as in the server; returns the last layer's output."""
        _, _, dim, layers = SHAPES[self.case.shape]
        options = {"scaling": dim**-0.5, "enable_gqa": True, "causal": bool(self.case.new)}
        run = getattr(backend, f"_run_sdpa_forward_{'extend' if self.case.new else 'decode'}")
        output = torch.empty_like(self.query)
        backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
        for layer in range(layers):
            keys, values = self.caches[layer % len(self.caches)]
            run(self.query, output, keys, values, *self.indices, **options)
        return output


def batch_of(case: Case, caches: int = 1) -> Batch:
    """The tensors of a case. With a single cache for all layers, it stays in the cache of the processor."""
    heads, kv_heads, dim, _ = SHAPES[case.shape]
    torch.manual_seed(0)
    lengths = torch.linspace(case.context * (1 - case.spread), case.context, case.requests).long()
    lengths[-1] = case.context
    size = int(lengths.sum()) + 1
    slots = (torch.arange(size - 1) if case.runs else torch.randperm(size - 1)) + 1
    table = torch.zeros(case.requests, case.context, dtype=torch.int32)
    for i, part in enumerate(slots.split(lengths.tolist())):
        table[i, : len(part)] = part
    shared = min(case.shared, int(lengths.min()) - 1)
    table[:, :shared] = table[0, :shared].clone()
    pairs = [(torch.randn(size, kv_heads, dim), torch.randn(size, kv_heads, dim)) for _ in range(caches)]
    query = torch.randn(case.requests * max(case.new, 1), heads, dim)
    indices: tuple[torch.Tensor, ...] = (table, torch.arange(case.requests), lengths)
    if case.new:
        indices += (lengths - case.new, torch.full_like(lengths, case.new))
    return Batch(case, query, pairs, indices)


def compare(batch: Batch, backends: tuple[Any, Any], repeats: int) -> tuple[list[list[float]], float]:
    """Time two backends alternately, so that other load on the machine affects both.

    Returns:
        Milliseconds per layer of each repetition for both, and the largest difference of their outputs.
    """
    first, second = (batch.forward(backend) for backend in backends)
    taken: list[list[float]] = [[], []]
    layers = SHAPES[batch.case.shape][3]
    for i in range(repeats):
        for which in (i % 2, 1 - i % 2):
            taken[which].append(1000 * timed(partial(batch.forward, backends[which])) / layers)
    return taken, float((first - second).abs().max())


def measure(case: Case, repeats: int) -> Timing:
    taken, difference = compare(
        batch_of(case), (TorchNativeAttnBackend(RUNNER), AprCpuAttention(RUNNER)), repeats
    )
    native, apr = (statistics.median(times) for times in taken)
    return Timing(case, native, apr, native / apr, difference)


def fork_attention_speedup(
    branches: int = 8, prefix: int = 1024, own: int = 32, repeats: int = 60
) -> dict[str, float | int | bool]:
    """The speed-up of decode attention when the prefix of a fork is read once instead of once per branch.

    It uses SmolLM2-135M's shapes in float32, random slots, and separate keys and values for every layer, as in a server.

    Returns:
        The sizes, median milliseconds per layer, `speedup` (the median ratio of `repeats` forward passes), and `low` and
        `high`, its quartiles.
    """
    case = Case("fork", "smollm2", branches, prefix + own, shared=prefix, spread=0)
    backends = (AprCpuAttention(RUNNER, share=False), AprCpuAttention(RUNNER, share=True))
    taken, difference = compare(batch_of(case, caches=SHAPES[case.shape][3]), backends, repeats)
    ratios = [separate / shared for separate, shared in zip(*taken, strict=True)]
    low, speedup, high = statistics.quantiles(ratios, n=4)
    without, with_it = (statistics.median(times) for times in taken)
    return {
        "branches": branches,
        "prefix": prefix,
        "own": own,
        "repeats": repeats,
        "without_ms": without,
        "with_ms": with_it,
        "speedup": speedup,
        "low": low,
        "high": high,
        "max_difference": difference,
        "bar": FORK_BAR,
        "passed": speedup >= FORK_BAR and difference <= 1e-5,
    }


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def environment() -> dict[str, Any]:
    return hardware() | {"torch_threads": torch.get_num_threads(), "torch": torch.__version__}


def table_of(timings: list[Timing]) -> Table:
    table = Table(title="one attention layer, fp32, median ms")
    for column in ("shape", "case", "requests", "context", "new", "shared"):
        table.add_column(column, justify="left" if column in ("shape", "case") else "right")
    for column in ("torch_native", "apr_cpu", "speed-up", "bar", "max difference"):
        table.add_column(column, justify="right")
    for t in timings:
        c = t.case
        bar = "" if c.bar is None else f"[{'green' if t.passed else 'red'}]≥ {c.bar:g}x"
        sizes = (str(n) for n in (c.requests, c.context, c.new, c.shared))
        times = (f"{t.torch_native_ms:.3f}", f"{t.apr_cpu_ms:.3f}", f"{t.speedup:.1f}x")
        table.add_row(c.shape, c.name, *sizes, *times, bar, f"{t.max_difference:.1e}")
    return table


def main() -> int:
    """Print a table, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=9, help="per case (default: %(default)s)")
    options = parser.parse_args()
    fork = fork_attention_speedup()
    timings = [measure(case, options.repeats) for case in cases()]
    if options.json:
        rows = [asdict(t) | {"passed": t.passed} for t in timings]
        result = {
            "hardware": environment(),
            "repeats": options.repeats,
            "fork": fork,
            "timings": rows,
        }
        print(json.dumps(result, indent=1))
    else:
        console = Console()
        console.print(table_of(timings))
        console.print(
            "{branches} branches of {own} tokens after {prefix} tokens: {with_ms:.2f} ms per layer if the prefix is "
            "read once, {without_ms:.2f} ms if each reads it: {speedup:.1f}x (bar {bar:g}x)".format(**fork)
        )
        console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    return int(options.check and not (fork["passed"] and all(t.passed for t in timings)))


if __name__ == "__main__":
    sys.exit(main())
