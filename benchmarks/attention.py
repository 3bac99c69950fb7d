"""Times one attention layer, SGLang's torch_native against apr_cpu, on the same tensors; no model, no server.

python benchmarks/attention.py [--json] [--check] [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from sgl_apr.server.flags import ENVIRONMENT

os.environ |= ENVIRONMENT | dict(os.environ)  # as the server has it; read when torch is loaded

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sgl_apr.server.attention import AprCpuAttention

SHAPES = {"smollm2": (9, 3, 64, 30), "tiny": (4, 2, 32, 3)}  # query heads, key heads, head dim, layers


@dataclass(frozen=True, slots=True)
class Case:
    """`requests` contexts of about `context` tokens; `new` tokens each (0: decode), `shared` in common.

    Slots are scattered over the cache at random, unless `runs`: a prefill that finds free space gets one run.
    `spread` is how far lengths fall below `context`. `bar` is the speed-up asked for, None if none is.
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
    """Medians over the repeats, in milliseconds a layer; `max_difference` is between the two outputs."""

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


def measure(case: Case, repeats: int) -> Timing:
    """Each repeat is one forward pass of all layers, planning included, as in the server."""
    heads, kv_heads, dim, layers = SHAPES[case.shape]
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
    keys, values = (torch.randn(size, kv_heads, dim) for _ in "kv")
    query = torch.randn(case.requests * max(case.new, 1), heads, dim)
    where: tuple[torch.Tensor, ...] = (table, torch.arange(case.requests), lengths)
    if case.new:
        where += (lengths - case.new, torch.full_like(lengths, case.new))
    options = {"scaling": dim**-0.5, "enable_gqa": True, "causal": bool(case.new)}
    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)

    def forward(backend: Any) -> torch.Tensor:
        kind = "extend" if case.new else "decode"
        output = torch.empty_like(query)
        backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
        for _ in range(layers):
            getattr(backend, f"_run_sdpa_forward_{kind}")(query, output, keys, values, *where, **options)
        return output

    both = TorchNativeAttnBackend(runner), AprCpuAttention(runner)
    reference, ours = (forward(backend) for backend in both)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):  # in turn, so that a busy moment of the machine hits both
        for backend, taken in zip(both, seconds, strict=True):
            taken.append(timed(partial(forward, backend)) / layers)
    native, apr = (1000 * statistics.median(taken) for taken in seconds)
    return Timing(case, native, apr, native / apr, float((reference - ours).abs().max()))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def hardware() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    timings = [measure(case, options.repeats) for case in cases()]
    if options.json:
        rows = [asdict(t) | {"passed": t.passed} for t in timings]
        print(json.dumps({"hardware": hardware(), "repeats": options.repeats, "timings": rows}, indent=1))
    else:
        console = Console()
        console.print(table_of(timings))
        console.print(", ".join(f"{key} {value}" for key, value in hardware().items()))
    return int(options.check and not all(t.passed for t in timings))


if __name__ == "__main__":
    sys.exit(main())
