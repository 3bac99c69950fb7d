"""Groups on a server whose model is on two ranks: both schedulers admit, step and end them alike."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.base import GroupRequest, Request, Result
from sgl_apr.server.launch.launcher import Server
from tests.support.group_reference import group_think_rows, hogwild_rows, load_reference

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]
PROMPT = tuple(range(40, 70))
HEADERS = ((71, 90), (72, 90, 91), (73,))
TOKENS = (40, 40, 15)


@pytest.fixture(scope="module")
def two_ranks(
    untagged: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Any:
    cores = sorted(os.sched_getaffinity(0))
    patch = pytest.MonkeyPatch()
    patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    log = tmp_path_factory.mktemp("two") / "log"
    with Server(untagged, log_path=log, tp_size=2, context_length=2048, max_total_tokens=8192) as server:
        yield server
    patch.undo()


@pytest.mark.parametrize("kind", ["group_think", "hogwild"])
def test_tokens_are_those_of_transformers(two_ranks: Server, untagged: Path, kind: Any):
    async def run() -> list[Result]:
        async with await apr.HttpEngine.connect(two_ranks.url) as engine:
            assert kind in engine.groups
            sampling = {"temperature": 0.0, "ignore_eos": True}
            members = tuple(
                Request(f"apr-tp-{kind}-{k}", (*PROMPT, *header), tokens, sampling)
                for k, (header, tokens) in enumerate(zip(HEADERS, TOKENS, strict=True))
            )
            await engine.commit(Request(f"apr-tp-{kind}-c", PROMPT))
            group = GroupRequest(kind, members, len(PROMPT))
            results = await engine.group(group)
            assert all(isinstance(result, Result) for result in results), results
            after = await engine.decode(Request(f"apr-tp-{kind}-after", PROMPT, 4, sampling))
            assert len(after.token_ids) == 4, "the server is alive"
            return [result for result in results if isinstance(result, Result)]

    outputs = [list(result.token_ids) for result in asyncio.run(run())]
    assert [len(output) for output in outputs] == list(TOKENS)
    model = load_reference(untagged)
    if kind == "group_think":
        position_range = 1 + max(len(header) + tokens for header, tokens in zip(HEADERS, TOKENS, strict=True))
        rows = group_think_rows(model, PROMPT, HEADERS, outputs, position_range)
        blind = group_think_rows(model, PROMPT, HEADERS, outputs, position_range, blind=True)
    else:
        rows, blind = (hogwild_rows(model, PROMPT, HEADERS, outputs, blind=each) for each in (False, True))

    def equal(rows: Any) -> int:
        return sum(
            int((row.max() - row[token]) < 1e-4)
            for worker, output in zip(rows, outputs, strict=True)
            for row, token in zip(worker, output, strict=False)
        )

    assert equal(rows) == sum(TOKENS)
    assert equal(blind) < sum(TOKENS), "workers that do not see each other write something else"
