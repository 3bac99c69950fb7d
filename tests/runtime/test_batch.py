"""Many trajectories into a file: nothing twice, nothing lost, whatever ends the run."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
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
        (
            json.dumps({"id": "q", "trajectory": {"spans": [{"text": "Q1: ", "token_ids": list(b"Q1: ")}]}})
            + "\n",
            "none of the problems",
        ),
        (
            json.dumps({"id": "p1", "trajectory": {"spans": [{"text": "Q9: ", "token_ids": list(b"Q9: ")}]}})
            + "\n",
            "another problem",
        ),
        (
            2
            * (
                json.dumps(
                    {"id": "p1", "trajectory": {"spans": [{"text": "Q1: ", "token_ids": list(b"Q1: ")}]}}
                )
                + "\n"
            ),
            "twice",
        ),
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


class Normalizing(apr.ByteTokenizer):
    """Decodes a prompt to another text than was encoded, as tokenizers with a normalizer or a BOS token do."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return super().encode(text.lower(), add_special_tokens=add_special_tokens)


def test_a_prompt_whose_text_changes_is_found_again(tmp_path: Path):
    engine = apr.ScriptedEngine(lambda request, prompt: "Done.", Normalizing())
    path, problems = tmp_path / "out.jsonl", {"a": "WHY?", "b": "How?"}
    assert asyncio.run(apr.arun_many(engine, problems, path)).finished == ("a", "b")
    assert asyncio.run(apr.arun_many(engine, problems, path)).skipped == ("a", "b")


def test_a_line_that_does_not_fit_on_the_disk_leaves_a_file_that_can_be_continued(tmp_path: Path):
    engine, path = apr.ScriptedEngine(lambda request, prompt: "Done."), tmp_path / "out.jsonl"
    problems = {f"p{k}": f"Q{k}: " for k in range(8)}
    asyncio.run(apr.arun_many(engine, {"p0": problems["p0"]}, path))
    with file_size_limit(int(2.5 * path.stat().st_size)), pytest.raises(apr.AprError, match="File too large"):
        asyncio.run(apr.arun_many(engine, problems, path, concurrency=1))
    assert [name for name, _ in apr.read_many(path)] == ["p0", "p1"]
    assert len(asyncio.run(apr.arun_many(engine, problems, path)).finished) == 6


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
