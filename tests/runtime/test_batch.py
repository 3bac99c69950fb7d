"""Many trajectories into a file: nothing twice, nothing lost, whatever ends the run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import sgl_apr as apr
from tests.support.threadweaver_traces import TAGS

PROBLEMS = {f"p{i}": f"Q{i}: " for i in range(40)}


def engine(fails: str = "") -> apr.ScriptedEngine:
    def script(request: apr.Request, prompt: str) -> apr.Reply:
        error = apr.EngineError("boom", 400) if prompt == fails else None
        return apr.Reply(f"the answer to {prompt}", error=error)

    return apr.ScriptedEngine(script, apr.ByteTokenizer(TAGS))


def run(path: Path, problems=PROBLEMS, engine=None, **options) -> apr.Outcomes:
    return asyncio.run(apr.arun_many(engine or globals()["engine"](), problems, path, **options))


def test_each_problem_has_one_line(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    outcomes = run(path, concurrency=7)
    assert sorted(outcomes.finished) == sorted(PROBLEMS)
    found = dict(apr.read_many(path))
    assert {name: t.answer for name, t in found.items()} == {
        n: f"the answer to {p}" for n, p in PROBLEMS.items()
    }


@pytest.mark.parametrize("torn", [b"", b'{"id": "p7", "traj', b'{"id": "p7"', b"\xff"])
def test_an_interrupted_run_goes_on(tmp_path: Path, torn: bytes):
    path, half = tmp_path / "out.jsonl", dict(list(PROBLEMS.items())[:20])
    run(path, half)
    before = path.read_bytes()
    path.write_bytes(before + torn)
    assert sorted(name for name, _ in apr.read_many(path)) == sorted(half)
    second = engine()
    outcomes = run(path, engine=second)
    assert path.read_bytes().startswith(before)
    assert sorted(outcomes.skipped) == sorted(half)
    assert len(second.requests) == 20, "nothing is done again"
    assert sorted(name for name, _ in apr.read_many(path)) == sorted(PROBLEMS)


def test_what_fails_is_named_and_tried_again(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    outcomes = run(path, engine=engine(fails="Q3: "))
    assert list(outcomes.failed) == ["p3"]
    assert str(outcomes.failed["p3"]) == "boom"
    assert len(outcomes.finished) == 39
    again = run(path)
    assert again.finished == ("p3",)


def test_a_seed_gives_every_problem_its_own(tmp_path: Path):
    run(tmp_path / "a.jsonl", seed=5)
    run(tmp_path / "b.jsonl", seed=5, concurrency=1)
    seeds = [{n: t.seed for n, t in apr.read_many(tmp_path / f)} for f in ("a.jsonl", "b.jsonl")]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == len(PROBLEMS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "p1"}\n', r"out\.jsonl, line 1: expected"),
        ("nonsense\n", r"line 1: expected"),
        (json.dumps({"id": "p1", "trajectory": {"spans": []}}) + "\n", "none of the problems"),
        (json.dumps({"id": "q", "trajectory": {"spans": [{"text": "Q1: "}]}}) + "\n", "none of the problems"),
        (json.dumps({"id": "p1", "trajectory": {"spans": [{"text": "Q9: "}]}}) + "\n", "another problem"),
        (2 * (json.dumps({"id": "p1", "trajectory": {"spans": [{"text": "Q1: "}]}}) + "\n"), "twice"),
    ],
)
def test_the_file_of_another_run_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(apr.AprError, match=message):
        run(path)
    assert path.read_text() == content


def test_two_runs_never_write_to_one_file(tmp_path: Path):
    async def both() -> None:
        first = asyncio.create_task(apr.arun_many(engine(), PROBLEMS, tmp_path / "out.jsonl"))
        await asyncio.sleep(0)
        with pytest.raises(apr.AprError, match="another run writes to"):
            await apr.arun_many(engine(), PROBLEMS, tmp_path / "out.jsonl")
        await first

    asyncio.run(both())


def test_what_cannot_be_is_refused_at_once(tmp_path: Path):
    for options in ({"concurrency": 0}, {"mode": "both"}, {"budget": apr.Budget(depth=2)}):
        with pytest.raises(apr.AprError):
            run(tmp_path / "out.jsonl", **options)
