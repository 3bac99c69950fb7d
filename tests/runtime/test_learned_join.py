"""A join that nobody chose is the one that the model has learned, where the engine can; a width that all branches can run at."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

import sgl_apr as apr
from sgl_apr.runtime.options import make_options


def engine(*declared: str, joins_kv: bool = True, load: apr.Load | None = None) -> apr.ScriptedEngine:
    """An engine whose model declares dialects."""
    scripted = apr.ScriptedEngine(lambda request, prompt: "Done.")
    scripted.joins_kv = joins_kv
    scripted.tokenizer.declared_dialects = declared
    scripted.loads = load
    return scripted


@pytest.mark.parametrize(
    ("declared", "dialect", "join", "joins_kv", "expected"),
    [
        (("multiverse", "spawn"), "multiverse", None, True, "kv"),
        (("multiverse", "spawn"), "npr", None, True, None),  # not one that the model knows
        (("threadweaver",), "threadweaver", None, True, None),  # published with text joins
        (("spawn",), "spawn", None, True, None),
        (("multiverse",), "multiverse", "text", True, "text"),
        (("multiverse",), "multiverse", None, False, None),
        ((), "multiverse", None, True, None),
    ],
)
def test_the_join_that_nobody_chose(declared, dialect, join, joins_kv, expected):
    chosen = {} if join is None else {"join": join}
    options = make_options(dialect, **chosen, temperature=0.5, budget={"tokens": 77})
    learned = options.with_learned_join(engine(*declared, joins_kv=joins_kv))
    assert learned.join == expected
    assert (learned.budget, learned.sampling) == (options.budget, options.sampling)
    assert options.join == join


def test_the_width_that_all_branches_can_run_at():
    def width(load: apr.Load, **options) -> int:
        return asyncio.run(apr.affordable_width(engine(load=load), 8, 100, **options))

    idle = apr.Load(running=0, waiting=0, used_tokens=0, max_tokens=10_000)
    full = apr.Load(running=40, waiting=3, used_tokens=9_900, max_tokens=10_000)
    slow = apr.Load(
        running=2, waiting=0, used_tokens=0, max_tokens=10_000, steps=((1.0, 0.01), (4.0, 0.01), (10.0, 0.2))
    )
    assert width(idle) == 8
    assert width(full) == 3  # 100 free tokens, of which each branch is expected to take 30
    assert width(slow) == 2  # more than four requests take over 20 ms a step
    assert width(replace(slow, running=9)) == 1
    assert width(slow, max_slowdown=30, pacing=lambda demand, load: (8, "all")) == 8
    with pytest.raises(apr.AprError, match="expected at least 1"):
        width(slow, max_slowdown=0.5)
    assert width(idle, pacing=apr.Pacing(max_parallel=5)) == 5
    assert width(idle, pacing=lambda demand, load: (99, "as many as there are")) == 8
    with pytest.raises(apr.AprError, match="expected how many branches run at once"):
        width(idle, pacing=lambda demand, load: "three")
