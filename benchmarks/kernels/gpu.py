"""Times on a GPU: training rows of 28,000 tokens, steps of the recipe, and forks and joins in the shape of an 8B Llama.

python -m benchmarks.kernels.gpu [--json] [--check] [--reps 5] [--parts attention model sft forks joins]

`attention` times one layer under FlexAttention and under a dense mask. `model` compares a step of a 1B Llama on a prefix
tree with its sequences one by one. The server of `forks` and `joins` has random weights, which take as long as any others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from benchmarks.training.tree_build import reply, tree_and_mask
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.collate import Collator, log_probabilities, to_device
from sgl_apr.training.config import SftConfig, load_config
from sgl_apr.training.models import random_llama
from sgl_apr.training.sft import train

PARTS = ("attention", "model", "sft", "forks", "joins")
HEADS, KV_HEADS, DIM = 32, 8, 128
RECIPE = Path(__file__).parents[2] / "configs" / "countdown-short.toml"
BODY = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
SMALL = BODY | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "vocab_size": 32000}
LARGE = BODY | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
PREFIX, NEW, WIDTHS = 2000, 256, (1, 2, 4, 8, 16, 32)


def timed(work: Callable[[], object], reps: int) -> dict[str, float]:
    """Median seconds, and peak memory above the memory before; the first run is not counted."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(reps):
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": statistics.median(seconds), "peak_mb": peak / 2**20}


def attention(reps: int) -> dict[str, Any]:
    """Time forward and backward of one layer in bfloat16; `error` compares rows of the output with double precision."""
    torch.manual_seed(0)
    visibility = tree_and_mask(reply(random.Random(0)))[1].to("cuda")
    length = visibility.ends.shape[1]
    heads = [
        torch.randn(1, n, length, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    ]
    blocks, compiled = visibility.block_mask(), torch.compile(flex_attention)

    def flex() -> torch.Tensor:
        out: torch.Tensor = compiled(*heads, block_mask=blocks, enable_gqa=True)
        return out

    def dense() -> torch.Tensor:
        q, k, v = heads
        out: torch.Tensor = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out

    def both(forward: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(forward().sum(), heads)

    result: dict[str, Any] = {"tokens": length, "scores_mb": HEADS * length**2 * 2 / 2**20}
    result["blocks"] = timed(visibility.block_mask, reps)
    result["flex"] = timed(lambda: both(flex), reps)
    result["error"] = _error(flex().detach(), [h.detach() for h in heads], visibility)
    mask = visibility.dense_mask()
    result["dense"] = timed(lambda: both(dense), reps)
    return result


def _error(output: torch.Tensor, heads: list[torch.Tensor], visibility: Visibility) -> float:
    """The relative error, by the norm, of 64 queries spread over the row."""
    at = torch.linspace(0, output.shape[2] - 1, 64, device=output.device).long()
    keys = torch.arange(output.shape[2], device=output.device)
    none = torch.zeros(1, dtype=torch.long, device=output.device)
    mask = visibility.mask_mod(none, none, at.unsqueeze(1), keys.unsqueeze(0))
    query, key, value = (h.double() for h in heads)
    expected = scaled_dot_product_attention(query[:, :, at], key, value, attn_mask=mask, enable_gqa=True)
    return float((output[:, :, at].double() - expected).norm() / expected.norm())


def model(reps: int) -> dict[str, Any]:
    """Time forward and backward of a Llama in bfloat16 with gradient checkpointing, on the tree and on each of its paths."""
    training_tree, _ = tree_and_mask(reply(random.Random(0)))
    tree, rng = training_tree.tree, torch.Generator().manual_seed(0)
    lengths = [int(p) + 1 for k, p in enumerate(tree.positions) if tree.ends[k] == k + 1]
    batch = to_device(Collator(attention="later")([training_tree]), "cuda")
    paths = [torch.randint(1000, (1, n), generator=rng).to("cuda") for n in lengths]

    def new_model(kind: str) -> Any:
        torch.manual_seed(0)
        with torch.device("cuda"):
            config = LlamaConfig(**SMALL, max_position_embeddings=32768)
            llama: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=kind
            )
        llama.gradient_checkpointing_enable()
        return llama.train()

    def step(net: Any, work: Callable[[Any], None]) -> None:
        work(net)
        net.zero_grad(set_to_none=True)

    def as_tree(net: Any) -> None:
        (-log_probabilities(net, batch).mean()).backward()

    def by_path(net: Any) -> None:
        for ids in paths:
            logits = net(ids, logits_to_keep=len(training_tree.sources) // len(paths), use_cache=False).logits
            logits.float().log_softmax(-1)[..., 0].mean().backward()

    net = new_model("flex_attention")
    size = sum(p.numel() for p in net.parameters())
    by_tree = timed(lambda: step(net, as_tree), reps)
    net = new_model("sdpa")
    separately = timed(lambda: step(net, by_path), reps)
    return {
        "parameters": size, "tokens": training_tree.tokens, "paths": len(paths), "path_tokens": sum(lengths), "tree": by_tree,
        "by_path": separately, "speedup": separately["seconds"] / by_tree["seconds"],
    }  # fmt: skip


def sft(tokens: int = 600_000) -> dict[str, Any]:
    """Steps of the recipe for the built-in model of 0.9M parameters, without the time to make examples."""
    recipe = load_config(SftConfig, RECIPE)
    config = replace(recipe, steps=replace(recipe.steps, tokens=tokens))
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        train(config, Path(directory) / "out")
        wall = time.perf_counter() - started
        lines = [
            json.loads(line) for line in (Path(directory) / "out" / "log.jsonl").read_text().splitlines()
        ]
    warm, rest = lines[9], lines[10:]
    seconds = sum(line["seconds"] for line in rest)
    return {
        "steps": len(lines), "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"], "wall_s": wall,
        "tokens_per_s": (lines[-1]["tokens"] - warm["tokens"]) / seconds,
    }  # fmt: skip


@contextmanager
def large_server() -> Iterator[str]:
    """The address of a server with random weights in the shape of an 8B Llama."""
    with tempfile.TemporaryDirectory() as name:
        directory = random_llama(Path(name), layers=1, hidden=64)
        (directory / "model.safetensors").unlink()
        config = json.loads((directory / "config.json").read_text())
        shape = LARGE | {"dtype": "bfloat16", "max_position_embeddings": 32768}
        (directory / "config.json").write_text(json.dumps(config | shape))
        options: dict[str, Any] = {"load_format": "dummy", "skip_server_warmup": True}
        with apr.Server(directory, context_length=16384, max_total_tokens=65536, **options) as server:
            yield server.url


async def forks(url: str, reps: int) -> list[dict[str, Any]]:
    """Seconds from the fork of a cached prefix until the last branch has its tokens, for several widths."""
    rng, rows = random.Random(0), []
    sampling = {"temperature": 0, "ignore_eos": True}

    def request(prompt: tuple[int, ...], new: int) -> apr.Request:
        return apr.Request(f"bench-{rng.getrandbits(48):012x}", prompt, new, sampling)

    async with await apr.HttpEngine.connect(url, timeout=600) as engine:

        async def fork(width: int) -> tuple[float, int]:
            prefix = tuple(rng.randrange(1000, 40000) for _ in range(PREFIX))
            await engine.commit(request(prefix, 0))
            started = time.perf_counter()
            branches = (engine.decode(request((*prefix, 1000 + k), NEW)) for k in range(width))
            results = await asyncio.gather(*branches)
            assert all(len(r.token_ids) == NEW for r in results)
            return time.perf_counter() - started, min(r.cached_tokens or 0 for r in results)

        await fork(2)
        for width in WIDTHS:
            samples = [await fork(width) for _ in range(reps)]
            seconds = statistics.median(s[0] for s in samples)
            rows.append(
                {
                    "branches": width,
                    "seconds": seconds,
                    "cached": min(s[1] for s in samples),
                    "tokens_per_s": width * NEW / seconds,
                }
            )
    for row in rows:
        row["speedup"] = row["branches"] * rows[0]["seconds"] / row["seconds"]
    return rows


async def joins(url: str, reps: int) -> list[dict[str, Any]]:
    """The latency of joins, with the sizes of `benchmarks.kv_join.latency`."""
    from benchmarks.kv_join.latency import measure_joins  # only here, because it imports SGLang

    return [asdict(row) for row in await measure_joins(url, reps)]


def missed(results: dict[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    problems = []
    if (error := results.get("attention", {}).get("error", 0.0)) > 0.01:
        problems.append(f"FlexAttention is {error:.3g} from dense attention, expected 0.01")
    problems += [
        f"{row['branches']} branches: {row['cached']} tokens of the prefix were cached, expected {PREFIX}"
        for row in results.get("forks", ())
        if row["cached"] < PREFIX
    ]
    return problems + [
        f"{row['branches']} x {row['tokens']}: {row['kv_reprefilled']} tokens computed after a KV join, expected only the header"
        for row in results.get("joins", ())
        if row["kv_reprefilled"] > 12
    ]


def show(results: dict[str, Any]) -> None:
    console = Console(width=120)
    for part in ("attention", "model", "sft"):
        if part in results:
            console.print({part: results[part]})
    for part in ("forks", "joins"):
        if part in results:
            table = Table(*results[part][0], title=part)
            for row in results[part]:
                table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
            console.print(table)


def main() -> int:
    """Print tables, or JSON; with --check, status 1 if a bar is missed. Without a GPU it measures nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: everything)")
    add("--reps", type=int, default=5, help="repetitions, whose median counts (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions("sgl-apr", "torch", "transformers"),
    }
    if not torch.cuda.is_available():
        Console(stderr=True).print("no GPU found: nothing was measured")
        print(json.dumps(results | {"skipped": "no GPU"})) if options.json else None
        return 0
    results["hardware"] |= {"gpu": torch.cuda.get_device_name()}

    def record(part: str, value: Any) -> None:
        results[part] = value
        print(json.dumps({part: value}), file=sys.stderr, flush=True)

    for name, measure in (("attention", attention), ("model", model)):
        if name in options.parts:
            record(name, measure(options.reps))
    if "sft" in options.parts:
        record("sft", sft())
    if {"forks", "joins"} & set(options.parts):
        torch.cuda.empty_cache()
        with large_server() as url:
            if "forks" in options.parts:
                record("forks", asyncio.run(forks(url, options.reps)))
            if "joins" in options.parts:
                record("joins", asyncio.run(joins(url, options.reps)))
    return finish(results, missed(results), show, options)


if __name__ == "__main__":
    sys.exit(main())
