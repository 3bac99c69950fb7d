"""Time of the attention of Hogwild! workers on a CPU, compared with independent requests, without a server.

Both have SmolLM2-135M's shapes in float32, scattered slots, separate keys and values for every layer, and one prompt
that is read once. A step is the attention of all layers, including its plan, and the model's products of 4 rows with
weights, which are measured once.

python -m benchmarks.kernels.worker_attention [--json] [--check] [--repeats 40]
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
from types import SimpleNamespace

from benchmarks.common.machine import hardware
from sgl_apr.server.launch.defaults import SERVER_ENVIRONMENT

os.environ |= SERVER_ENVIRONMENT | dict(os.environ)  # as in the server; torch reads it when it is loaded

import torch
from sglang.srt.layers.rotary_embedding import get_rope

from sgl_apr.server.cpu.attention import AprCpuAttention
from sgl_apr.server.shared_cache.rotary import Rotation
from sgl_apr.server.shared_cache.views import BlockView, WorkerView

HEADS, KV_HEADS, DIM, LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = (
    9,
    3,
    64,
    30,
    576,
    1536,
    49152,
)  # SmolLM2-135M
BAR = 1.35  # maximal time of a step in steps of independent requests


@dataclass(frozen=True, slots=True)
class Result:
    """Median milliseconds of a step.

    Attributes:
        workers: Workers of the group.
        prompt: Tokens of the prompt.
        block: Tokens that each worker has written.
        independent_ms: The attention of independent requests.
        hogwild_ms: The attention of workers.
        products_ms: Everything else of a step: the products with weights.
        step_ratio: (products + Hogwild!) / (products + independent).
    """

    workers: int
    prompt: int
    block: int
    independent_ms: float
    hogwild_ms: float
    products_ms: float
    step_ratio: float

    @property
    def passed(self) -> bool:
        return self.step_ratio <= BAR


class Step:
    """One decode step of all layers, for workers or for independent requests over the same keys."""

    def __init__(self, workers: int, prompt: int, block: int) -> None:
        torch.manual_seed(0)
        size = prompt + workers * block
        slots = (torch.randperm(size) + 1).int()
        self.table = torch.zeros(workers + 1, prompt + block, dtype=torch.int32)
        self.table[:, :prompt] = slots[:prompt]
        self.table[:workers, prompt:] = slots[prompt:].view(workers, block)
        self.caches = [
            (torch.randn(size + 1, KV_HEADS, DIM), torch.randn(size + 1, KV_HEADS, DIM))
            for _ in range(LAYERS)
        ]
        self.query = torch.randn(workers, HEADS, DIM)
        self.requests, self.lengths = torch.arange(workers), torch.full((workers,), prompt + block)
        self.backend = AprCpuAttention(
            SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
        )
        rotary = get_rope(DIM, DIM, 8192, 10000.0, True, None, torch.float32)
        self.backend.rotation = Rotation.from_rotary_embedding(rotary)
        ahead = (workers - 1) * block
        self.views = [
            WorkerView(
                worker,
                (
                    BlockView(workers, 0, prompt, ahead),
                    *(
                        BlockView(other, prompt, prompt + block, ahead - block * place)
                        for place, other in enumerate([o for o in range(workers) if o != worker])
                    ),
                    BlockView(worker, prompt, prompt + block, 0),
                ),
            )
            for worker in range(workers)
        ]

    def run(self, *, hogwild: bool) -> None:
        self.backend.worker_views = self.views if hogwild else []
        self.backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None, batch_size=len(self.query)))
        output = torch.empty_like(self.query)
        for keys, values in self.caches:
            self.backend._run_sdpa_forward_decode(
                self.query, output, keys, values, self.table, self.requests, self.lengths, scaling=DIM**-0.5
            )


def products(rows: int) -> Callable[[], None]:
    """The products with weights of one step. The weights of every layer are separate, as in a model."""
    shapes = [(HIDDEN + 2 * KV_HEADS * DIM, HIDDEN), (HIDDEN, HIDDEN)]
    shapes += [(2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in shapes] + [
        torch.randn(VOCABULARY, HIDDEN)
    ]
    inputs = {size: torch.randn(rows, size) for size in (HIDDEN, INTERMEDIATE)}

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(workers: int, prompt: int, block: int, repeats: int) -> Result:
    step, rest = Step(workers, prompt, block), products(workers)
    calls: tuple[Callable[[], object], ...] = (
        lambda: step.run(hogwild=False),
        lambda: step.run(hogwild=True),
        rest,
    )
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):  # interleaved, so that other load on the machine affects all
        for taken, call in zip(times, calls, strict=True):
            taken.append(timed_ms(call))
    independent, hogwild, other = map(statistics.median, times)
    ratio = (other + hogwild) / (other + independent)
    return Result(workers, prompt, block, independent, hogwild, other, ratio)


def main() -> int:
    """Print a line for each case, or JSON; with --check, status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of lines")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=40, help="per case (default: %(default)s)")
    options = parser.parse_args()
    results = [measure(4, prompt, 64, options.repeats) for prompt in (256, 2048)]
    if options.json:
        rows = [asdict(result) | {"passed": result.passed} for result in results]
        print(json.dumps({"hardware": hardware(), "bar": BAR, "results": rows}, indent=1))
    else:
        for r in results:
            print(
                f"{r.workers} workers, {r.block} tokens each after {r.prompt}: attention of a step "
                f"{r.hogwild_ms:.1f} ms, of independent requests {r.independent_ms:.1f} ms; with "
                f"{r.products_ms:.1f} ms of products {r.step_ratio:.2f} of a step (bar {BAR})"
            )
    return int(options.check and not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
