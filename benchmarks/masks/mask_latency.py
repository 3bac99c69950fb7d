"""Latency of masks in every dialect, and valid replies of a random model with the grammar and without it."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import llguidance.numpy as masks
import numpy as np
import xgrammar
from llguidance import LLMatcher, LLTokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

import sgl_apr as apr
from sgl_apr.formats.masks.llguidance import LLGUIDANCE_SLICES
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.models import random_llama, smollm2

TAGS = tuple(dict.fromkeys(tag for name in apr.dialect_names() for tag in apr.dialect(name).tags))
WALKS, STEPS = 6, 120  # for the latency of a mask: walks through each phase, tokens per walk
TOKENS = 400
TOKENS_WITHOUT_GRAMMAR = 150  # a random model uses all of them


def budget(dialect: apr.Dialect, tokens: int) -> apr.Budget:
    """A budget that is small enough for a hundred replies a minute on two cores, and deep enough to nest."""
    nests = dialect.max_depth > 1
    return apr.Budget(
        tokens=tokens * (2 if nests else 1),
        width=min(3, dialect.max_width),
        depth=2 if nests else 1,
        branch_tokens=240 if nests else 48,
        outline_chars=8,
    )


async def replies(url: str, dialect: apr.Dialect, runs: int, constrain: bool) -> list[apr.Trajectory]:
    """`runs` replies at temperature 1.5, 32 in parallel, each with one fork requested."""
    async with await apr.HttpEngine.connect(url) as engine:
        semaphore = asyncio.Semaphore(32)

        async def one(i: int) -> apr.Trajectory:
            async with semaphore:
                return await apr.areason(
                    engine,
                    f"Question {i}: ",
                    dialect,
                    budget=budget(dialect, TOKENS if constrain else TOKENS_WITHOUT_GRAMMAR),
                    mode="parallel" if constrain else "auto",  # only the grammar can enforce "parallel"
                    constrain=constrain,
                    temperature=1.5,
                )

        return await asyncio.gather(*(one(i) for i in range(runs)))


def validity(url: str, dialect: apr.Dialect, runs: int) -> dict[str, int]:
    """How many replies are valid, with the grammar and without it, and who closed the branches."""
    counts: Counter[str] = Counter(runs=runs)
    for trajectory in asyncio.run(replies(url, dialect, runs, constrain=True)):
        metrics = trajectory.metrics()
        counts["valid"] += dialect.is_valid(trajectory.text)
        counts["forked"] += bool(trajectory.blocks)
        counts["nested"] += any(len(b.path) > 1 for b in trajectory.blocks)
        counts["closers_decoded"] += metrics.closers_decoded
        counts["closers_injected"] += metrics.closers_injected
        counts["over_budget"] += metrics.total > budget(dialect, TOKENS).tokens
    for trajectory in asyncio.run(replies(url, dialect, runs, constrain=False)):
        # Text that never forks is valid in most dialects, but the prompt asked for a fork.
        counts["valid_grammar_off"] += dialect.is_valid(trajectory.text) and bool(trajectory.blocks)
    names = ["runs", "valid", "valid_grammar_off", "forked", "nested", "closers_decoded", "closers_injected"]
    return {name: counts[name] for name in [*names, "over_budget"]}


class Vocabulary:
    """SmolLM2's 49,152 tokens and the tags of all dialects, as tokens or spelled out."""

    def __init__(self, backend: FastTokenizer, tags: bool) -> None:
        self.backend = backend
        if tags:
            backend.add_special_tokens(list(TAGS))
        self.tags = set(TAGS) if tags else set[str]()
        self.size = backend.get_vocab_size()
        eos = backend.token_to_id("<|im_end|>")
        assert eos is not None
        self.eos: int = eos
        self.guide = LLTokenizer(backend.to_str(), eos_token=self.eos, slices=list(LLGUIDANCE_SLICES))

    def special_token_id(self, tag: str) -> int | None:
        return self.backend.token_to_id(tag) if tag in self.tags else None


def phases(dialect: apr.Dialect, vocabulary: Vocabulary, backend: GrammarBackend) -> Iterator[str]:
    """The grammar of each phase, which is what one request decodes."""
    options: dict[str, Any] = {"number": str(dialect.first_number), "width": min(8, dialect.max_width)}
    if dialect.asynchronous:
        options["waiting"] = (str(dialect.first_number),)
    for phase in ("trunk", "after", "branch", "rejoin"):
        if dialect.rule_for_phase(phase) in dialect.grammar.rules:
            yield dialect.lower(phase, cast(Tokenizer, vocabulary), backend, **options)


def walk(
    fill: Callable[[], np.ndarray], accept: Callable[[int], bool], vocabulary: Vocabulary, rng: random.Random
) -> Iterator[float]:
    """Microseconds for each mask along a random text that the grammar allows."""
    special = [vocabulary.backend.token_to_id(t) for t in vocabulary.tags]
    for _ in range(STEPS):
        started = time.perf_counter()
        bits = fill()
        yield (time.perf_counter() - started) * 1e6
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: vocabulary.size]
        allowed[vocabulary.eos] = 0
        tags = [t for t in special if allowed[t]]
        choices = tags if tags and rng.random() < 0.1 else np.flatnonzero(allowed).tolist()
        if not choices or not accept(rng.choice(choices)):
            return


def llguidance_cost(dialect: apr.Dialect, vocabulary: Vocabulary) -> tuple[list[float], list[float]]:
    """Milliseconds to compile each phase, and microseconds of each mask."""
    compiles: list[float] = []
    costs: list[float] = []
    bits: np.ndarray = masks.allocate_token_bitmask(1, vocabulary.size)
    for text in phases(dialect, vocabulary, "llguidance"):
        for seed in range(WALKS):
            started = time.perf_counter()
            matcher = LLMatcher(vocabulary.guide, text)
            compiles.append((time.perf_counter() - started) * 1e3)
            assert not matcher.is_error(), matcher.get_error()

            def fill(matcher: LLMatcher = matcher) -> np.ndarray:
                masks.fill_next_token_bitmask(matcher, bits)
                return bits

            costs += walk(fill, matcher.consume_token, vocabulary, random.Random(seed))
    return compiles, costs


def xgrammar_cost(dialect: apr.Dialect, vocabulary: Vocabulary, compiler: Any) -> list[float]:
    """Microseconds of each mask by xgrammar."""
    costs: list[float] = []
    bits = xgrammar.allocate_token_bitmask(1, vocabulary.size)
    view: np.ndarray = bits.numpy()
    for text in phases(dialect, vocabulary, "xgrammar"):
        compiled = compiler.compile_grammar(text)
        for seed in range(WALKS):
            matcher = xgrammar.GrammarMatcher(compiled)

            def fill(matcher: Any = matcher) -> np.ndarray:
                matcher.fill_next_token_bitmask(bits)
                return view

            costs += walk(fill, matcher.accept_token, vocabulary, random.Random(seed))
    return costs


def percentile(values: list[float], share: float) -> float:
    return round(float(np.percentile(values, share)), 1)


def costs(console: Console) -> dict[str, dict[str, float]]:
    """The latency of masks in every dialect."""
    directory = smollm2()
    tokens = Vocabulary(FastTokenizer.from_file(str(directory / "tokenizer.json")), tags=True)
    spelled = Vocabulary(FastTokenizer.from_file(str(directory / "tokenizer.json")), tags=False)
    hf_tokenizer = AutoTokenizer.from_pretrained(directory)
    hf_tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    info = xgrammar.TokenizerInfo.from_huggingface(
        hf_tokenizer, vocab_size=tokens.size, stop_token_ids=[tokens.eos]
    )
    compiler = xgrammar.GrammarCompiler(info)
    results = {}
    for name in track(apr.dialect_names(), "masks", console=console):
        dialect = apr.dialect(name)
        compiles, tagged = llguidance_cost(dialect, tokens)
        _, text_mode = llguidance_cost(dialect, spelled)
        by_xgrammar = xgrammar_cost(dialect, tokens, compiler)
        results[name] = {
            "compile_ms": round(statistics.median(compiles), 2),
            "mask_us_p50": percentile(tagged, 50),
            "mask_us_p99": percentile(tagged, 99),
            "xgrammar_mask_us_p50": percentile(by_xgrammar, 50),
            "xgrammar_mask_us_p99": percentile(by_xgrammar, 99),
            "text_mode_mask_us_p50": percentile(text_mode, 50),
            "text_mode_mask_us_p99": percentile(text_mode, 99),
        }
    return results


def main() -> int:
    """Print a table, or JSON; status 1 if a reply under a grammar is not valid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="replies of each dialect (default: %(default)s)")
    parser.add_argument("--backend", default="llguidance", choices=["llguidance", "xgrammar"])
    parser.add_argument("--text", action="store_true", help="use a model whose tags are not tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    options = parser.parse_args()
    console = Console(stderr=True)
    results: dict[str, dict[str, float]] = costs(console)
    with tempfile.TemporaryDirectory() as directory:
        model = random_llama(Path(directory), tags=() if options.text else TAGS, tag_bias=5.0)
        with apr.Server(model, grammar_backend=options.backend) as server:
            for name in track(apr.dialect_names(), "replies", console=console):
                counts = validity(server.url, apr.dialect(name), options.runs)
                results[name] = {**counts, **results[name]}
    if options.json:
        print(json.dumps({"dialects": results}))
    else:
        table = Table("dialect", *next(iter(results.values())), title="Random weights at temperature 1.5")
        for name, row in results.items():
            table.add_row(name, *map(str, row.values()))
        Console(width=200).print(table)
    return int(any(row["valid"] != row["runs"] for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
