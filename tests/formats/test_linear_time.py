"""Readers and what is computed from a trajectory take time in proportion to the document, whatever it holds."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.formats.lenient_parser import read
from tests.support.threadweaver_traces import TAGS, TRACE

TOKENIZER = apr.ByteTokenizer(TAGS)
MAX_RATIO = 10  # of the times for 4 n and n: 4 if the time is linear, 16 if it is quadratic


def threads(n: int, number: str = "{}") -> str:
    """One block of n branches; `number` is what their headers have in place of their number."""
    outlines = "".join(f"<Outline>{k}: a</Outline>\n" for k in range(1, n + 1))
    branches = "".join(f"<Thread>\n{number.format(k)}: x</Thread>" for k in range(1, n + 1))
    return f"a<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{branches}\n</Parallel>z"


def spawned(n: int) -> str:
    calls = "".join(f"<FORK-{k}>a</FORK-{k}>" for k in range(1, n + 1))
    return calls + "".join(f"<JOIN-{k}>b</JOIN-{k}>" for k in range(n, 0, -1))


def promised(n: int) -> str:
    return '<promise topic="a"/>' * n + "<sync/>" + "<async>b</async>" * n


def parsed(text: str, tokenizer: Any = None) -> apr.Trajectory:
    return read(text, "threadweaver", tokenizer=tokenizer).trajectory


def refuse(text: str) -> None:
    with pytest.raises(apr.TraceError):
        apr.Trajectory.from_json(text)


# For each case: makes the input of a size, what is timed, and the size.
QUICK: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any], int]] = {
    "encode text": (lambda n: "word " * n, TOKENIZER.encode, 30_000),
    "encode tags": (lambda n: "<Thread>" * n, TOKENIZER.encode, 10_000),
    "read with token ids": (lambda n: TRACE * n, lambda text: parsed(text, TOKENIZER), 12),
    "blocks": (lambda n: parsed(TRACE * n), lambda t: replace(t).blocks, 60),
    "metrics": (lambda n: parsed(TRACE * n, TOKENIZER), lambda t: t.metrics(), 25),
    "metrics of branches": (lambda n: parsed(threads(n), TOKENIZER), lambda t: t.metrics(), 120),
    "convert": (lambda n: parsed(TRACE * n), lambda t: apr.convert(t, "multiverse"), 12),
    "from_json": (lambda n: parsed(TRACE * n).to_json(), apr.Trajectory.from_json, 30),
}
LONG: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any], int]] = {
    "read blocks": (lambda n: TRACE * n, parsed, 200),
    "read branches": (threads, parsed, 2000),
    "read branches of other numbers": (partial(threads, number="0"), parsed, 2000),
    "read branches without numbers": (partial(threads, number=""), parsed, 2000),
    "read forks and joins": (spawned, lambda text: read(text, "asyncthink"), 2000),
    "read promises": (promised, lambda text: read(text, "pasta"), 2000),
    "text and answer": (lambda n: parsed(TRACE * n), lambda t: (t.text, t.answer), 600),
    "to_json": (lambda n: parsed(TRACE * n), lambda t: t.to_json(), 200),
    "other JSON": (lambda n: json.dumps([0] * n), refuse, 200_000),
    "causality": (lambda n: parsed(TRACE * n, TOKENIZER), lambda t: apr.causality(t, "kv").positions, 100),
}
CASES = QUICK | LONG


def seconds(work: Callable[[Any], Any], data: Any) -> float:
    """Processor time, so that other work of the machine does not count."""
    gc.disable()  # a collection visits the heap of the whole test run
    try:
        began = time.thread_time()
        work(data)
        return time.thread_time() - began
    finally:
        gc.enable()


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)])
def test_time_is_linear(case: str):
    make, work, n = CASES[case]
    small, large = make(n), make(4 * n)
    work(make(2))  # what is cached
    ratios: list[float] = []
    for _ in range(4):
        ratios.append(seconds(work, large) / max(seconds(work, small), 1e-4))
        if min(ratios) < MAX_RATIO:
            return
    raise AssertionError(f"four times the size takes {min(ratios):.1f} times as long")
