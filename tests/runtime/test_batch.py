"""Many trajectories into a file: nothing twice, nothing lost, whatever ends the run."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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


DONE = apr.dialect("threadweaver").parse("Done.", apr.ByteTokenizer())


def line(
    name: object, prompt: str = "Q1: ", trajectory: apr.Trajectory | None = None, **fields: object
) -> str:
    """A line of a file of `run_many`, with some fields of the trajectory changed."""
    made = trajectory or DONE.with_prompt(prompt, tuple(prompt.encode()))
    return json.dumps({"id": name, "trajectory": json.loads(made.to_json()) | fields}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "p1"}\n', r"out\.jsonl, line 1: expected"),
        ("nonsense\n", r"line 1: expected"),
        (line("p1", trajectory=replace(DONE, spans=())), "none of the problems"),
        (line("q", "Q1: "), "none of the problems"),
        (line("p1", "Q9: "), "another problem"),
        (2 * line("p1", "Q1: "), "twice"),
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


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            line("p2", "Q2: ", schema="sgl_apr.trajectory/5"),
            "line 2: schema: expected .* found 'sgl_apr.trajectory/5'",
        ),
        (line("p2", "Q2: ", schema=None), "line 2: schema: expected 'sgl_apr.trajectory/"),
        (line("p2", "Q2: ", wall_s="1"), "line 2: wall_s: expected a finite number, found '1'"),
        (line("p2", "Q2: ", calls=None), "line 2: calls: expected a list, found null"),
        (line("p2", "Q2: ", mood=1), "line 2: expected no field but"),
        (line(2, "Q2: "), "line 2: id: expected text, found 2"),
        ('{"id": "p2", "trajectory": [1]}\n', "line 2: expected an object, found a list of 1"),
    ],
)
def test_a_line_that_cannot_be_read_is_the_same_error_for_both(tmp_path: Path, last: str, message: str):
    path = tmp_path / "out.jsonl"
    path.write_text(line("p1") + last)
    with pytest.raises(apr.AprError, match=rf"out\.jsonl, {message}") as of_reading:
        list(apr.read_many(path))
    with pytest.raises(apr.AprError) as of_running:
        run(path)
    assert str(of_running.value) == str(of_reading.value)
    assert path.read_text() == line("p1") + last


def test_an_exception_of_ones_own_code_does_not_lose_the_others(tmp_path: Path):
    def script(request: apr.Request, prompt: str) -> apr.Reply:
        error = {"Q3: ": ConnectionResetError("gone"), "Q5: ": KeyError("key")}.get(prompt)
        return apr.Reply(f"the answer to {prompt}", error=error)

    path = tmp_path / "out.jsonl"
    outcomes = run(path, engine=apr.ScriptedEngine(script, apr.ByteTokenizer(TAGS)), retry=apr.Retry(wait=0))
    assert {"p5"} <= set(outcomes.failed) <= {"p3", "p5"}
    assert isinstance(outcomes.failed["p5"], KeyError)
    assert sorted(name for name, _ in apr.read_many(path)) == sorted(outcomes.finished)
    assert len(outcomes.finished) == len(PROBLEMS) - len(outcomes.failed)


def test_prompts_of_every_kind_and_wrong_ones(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    problems = {"text": "Q: ", "ids": [81, 58, 32], "half": "\ud800", "none": None, "real": [1.5]}
    outcomes = run(path, problems)
    assert sorted(outcomes.finished) == ["ids", "text"]
    assert {name: type(error) for name, error in outcomes.failed.items()} == dict.fromkeys(
        ("half", "none", "real"), apr.AprError
    )
    with pytest.raises(apr.AprError, match="the id of a problem is 7, expected text"):
        run(tmp_path / "b.jsonl", {7: "Q: "})


@pytest.mark.parametrize(
    "where", ["folder", "folder/none/a.jsonl", "a\0b", "/dev/full", "/proc/none/a", "x" * 5000]
)
def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, where: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(apr.AprError, match="cannot write to") as raised:
        run(tmp_path / where)
    assert "\n" not in str(raised.value)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("problems", [["a", "b"], "a", None, {1, 2}])
def test_problems_are_a_mapping(tmp_path: Path, problems: object):
    message = "expected a dictionary of prompts by id"
    with pytest.raises(apr.AprError, match=message):
        run(tmp_path / "out.jsonl", problems)
    with pytest.raises(apr.AprError, match=message):  # before a server is contacted
        apr.run_many("http://127.0.0.1:9", problems, tmp_path / "out.jsonl")  # type: ignore[arg-type]
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_another_dialect_is_refused(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    run(path, {"a": "Q: "})
    before = path.read_bytes()
    with pytest.raises(apr.AprError, match="'a' in dialect threadweaver, this run has dialect multiverse"):
        run(path, {"a": "Q: ", "b": "R: "}, dialect="multiverse")
    assert path.read_bytes() == before


def test_a_missing_folder_is_noticed_before_a_server_is_contacted(tmp_path: Path):
    path = tmp_path / "none" / "out.jsonl"
    for call in (lambda: run(path), lambda: apr.run_many("http://127.0.0.1:9", PROBLEMS, path)):
        with pytest.raises(apr.AprError, match=r"cannot write to .*out.jsonl: No such file or directory"):
            call()
