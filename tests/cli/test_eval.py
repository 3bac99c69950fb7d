"""`sgl-apr eval` from its arguments to its files, on a scripted server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.cli.eval_arguments import parse_seeds
from sgl_apr.cli.main import main
from sgl_apr.evaluation.benchmarks.registry import benchmark
from sgl_apr.evaluation.cost_model import EngineCost
from sgl_apr.evaluation.store import RUN_FILE, SUMMARY_FILE
from sgl_apr.evaluation.tasks.mathematics import FORMULA_WORKER
from tests.support.fake_sglang_server import TOKENIZER, SglangServer

PRESENT = {"method", "accuracy", "ci95", "total_tokens", "critical_path", "fork_rate", "wall_s", "by_numbers"}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("sgl_apr.engine.http.load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr("sgl_apr.evaluation.timing.SWEEP_LIMIT_S", 0.5)
    with SglangServer().in_thread() as url:
        yield url
    FORMULA_WORKER.close()


def problems(path: Path, count: int) -> str:
    lines = [
        {"problem": f"Half of {k}?", "answer": f"{k}/2", "level": f"Level {k % 2}"} for k in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_one_task(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [
        "eval",
        problems(tmp_path / "halves.jsonl", 4),
        "--url",
        url,
        "--methods",
        "threadweaver",
        "--limit",
        "3",
    ]
    argv += ["-o", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary) == {"task", "rows"}
    (row,) = summary["rows"]
    assert summary["task"] == "halves"
    assert set(row) >= PRESENT
    assert (row["method"], row["problems"], row["accuracy"], row["fork_rate"]) == (
        "threadweaver",
        3,
        0.0,
        1.0,
    )
    assert set(row["by_size"]) == {"0", "1"}
    assert row["by_size"]["1"]["width"] == 2
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text()) == summary
    head, *lines = map(json.loads, (tmp_path / "out" / RUN_FILE).read_text().splitlines())
    assert (head["task"], head["limit"], head["budget"]["tokens"]) == ("halves", 3, 4096)
    assert {line["number"] for line in lines} == {0, 1, 2}
    for line in lines:
        made = apr.Trajectory.from_json(json.dumps(line["trajectory"]))
        assert made.text.endswith("Done.")
        assert f"Half of {line['number']}?" in made.prompt
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) == summary, "all is there already"


def test_several_tasks_with_predicted_speedups(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, files = tmp_path / "out", [problems(tmp_path / f"{name}.jsonl", 2) for name in ("a", "b")]
    argv = [
        "eval",
        *files,
        "--url",
        url,
        "--methods",
        "threadweaver,recursive",
        "-o",
        str(out),
        "--cost-model",
    ]
    assert main([*argv, "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    cost = EngineCost.from_json((out / "cost.json").read_text())
    for name, task in zip("ab", tasks, strict=True):
        assert task["task"] == name
        assert EngineCost.from_json(json.dumps(task["cost"])) == cost
        assert json.loads((out / name / SUMMARY_FILE).read_text()) == task
        forks, none = task["rows"]
        assert forks["predicted_sequential_s"] > 0
        assert forks["predicted_parallel_s"] > 0
        assert forks["took_s"] > 0
        assert forks["one_by_one_s"] > 0
        assert "allow_code=True" in none["reason"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "s predicted without forks" in shown
    assert "recursive: recursive runs Python that the model writes" in shown
    assert EngineCost.from_json((out / "cost.json").read_text()) == cost, "it is read where it is"
    assert main(["eval", "--compare", str(out / "a"), f"{out / 'a'}:threadweaver", "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert (pair["problems"], pair["difference"], pair["p"]) == (2, 0.0, 1.0)


def test_no_attempt_at_all_is_status_1(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["eval", problems(tmp_path / "a.jsonl", 2), "countdown", "--limit", "2", "--url", url]
    assert main([*argv, "--methods", "recursive", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["tasks"]
    assert "allow_code=True" in first["rows"][0]["reason"]
    assert "needs a model trained on it" in second["rows"][0]["reason"]


def test_a_run_is_extended(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Another limit, more methods: what is there is kept, what is new is run."""
    out = tmp_path / "out"

    def run(limit: int, methods: str, *more: str) -> dict[str, int]:
        argv = ["eval", problems(tmp_path / "halves.jsonl", 5), "--url", url, "-o", str(out), "--json"]
        assert main([*argv, "--limit", str(limit), "--methods", methods, *more]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        return {row["method"]: row["problems"] for row in rows}

    def lines() -> list[str]:
        return (out / RUN_FILE).read_text().splitlines()

    assert run(2, "threadweaver") == {"threadweaver": 2}
    first = lines()
    assert run(4, "threadweaver", "--at-once", "3") == {"threadweaver": 4}
    assert lines()[:3] == first, "nothing is run again"
    assert len(lines()) == 5
    assert run(3, "multiverse") == {"multiverse": 3}
    assert len(lines()) == 8
    assert {r["method"]: r["problems"] for r in json.loads((out / SUMMARY_FILE).read_text())["rows"]} == {
        "multiverse": 3,
        "threadweaver": 3,
    }, "the summary has all methods, on the problems of this run"
    assert run(1, "threadweaver") == {"threadweaver": 1}
    assert len(lines()) == 8
    assert run(4, "threadweaver") == {"threadweaver": 4}
    summary = json.loads((out / SUMMARY_FILE).read_text())
    assert {r["method"]: r["problems"] for r in summary["rows"]} == {"threadweaver": 3, "multiverse": 3}
    assert summary["left_out"] == 1, "the methods are compared on the same problems"
    argv = ["eval", str(tmp_path / "halves.jsonl"), "--url", url, "-o", str(out), "--methods", "threadweaver"]
    for option, message in {
        ("--temperature", "0.5"): "--temperature is not set there and 0.5 here",
        ("--budget", "tokens=50"): "--budget tokens is 4096 there and 50 here",
    }.items():
        assert main([*argv, *option]) == 1
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1


def test_seeds_are_added(tmp_path: Path):
    one, more = benchmark("countdown", 3, seed=0), benchmark("countdown", 5, seed=[0, 7])
    assert list(more.keyed_cases) == [*((0, k) for k in range(5)), *((7, k) for k in range(5))]
    assert [case.name for case in more.cases[:3]] == [case.name for case in one.cases]
    assert {case.name for case in benchmark("countdown", 5, seed=7).cases} == {c.name for c in more.cases[5:]}
    assert len(benchmark("game24", 3, seed=[1, 1]).cases) == 3
    assert parse_seeds("4") == 4
    assert parse_seeds("4,5") == [4, 5]
    with pytest.raises(SystemExit):
        main(["eval", "countdown", "--url", "http://127.0.0.1:9", "--seed", "one"])


@pytest.mark.parametrize("name", ["countdown", "game24"])
def test_a_higher_limit_adds_problems(name: str):
    few, many = benchmark(name, 5, seed=3), benchmark(name, 25, seed=3)
    assert [case.name for case in many.cases[:5]] == [case.name for case in few.cases]


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / RUN_FILE).mkdir(parents=True)
    for out in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        tmp_path / "taken",
        Path("/proc/none"),
        tmp_path / "a\0b",
    ):
        argv = ["eval", problems(tmp_path / "a.jsonl", 2), "--url", "http://127.0.0.1:9", "-o", str(out)]
        assert main(argv) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("sgl-apr: error: cannot write to ")
        assert shown.count("\n") == 1


@pytest.mark.parametrize("how", ["option", "environment"])
def test_every_connection_sends_the_key_of_the_server(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The attempts, the timing of a method alone, and the cost model each connect to the server."""
    monkeypatch.setattr("sgl_apr.engine.http.load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr("sgl_apr.evaluation.timing.SWEEP_LIMIT_S", 0.1)
    key = ["--api-key", "k1"] if how == "option" else []
    if how == "environment":
        monkeypatch.setenv("SGL_APR_API_KEY", "k1")
    server = SglangServer()
    with server.in_thread() as url:
        argv = ["eval", problems(tmp_path / "halves.jsonl", 1), "--url", url, "--json", "--cost-model", *key]
        assert main([*argv, "--methods", "threadweaver,multiverse"]) == 0
    FORMULA_WORKER.close()
    assert len(server.headers) >= 5
    assert set(server.headers) == {"Bearer k1"}


def test_a_sweep_evaluates_under_each_limit(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    task, out = problems(tmp_path / "halves.jsonl", 3), tmp_path / "out"
    argv = [
        "eval",
        task,
        "--url",
        url,
        "--methods",
        "threadweaver,sequential",
        "--sweep",
        "tokens=128,512",
        "--sweep",
        "seconds=20",
    ]
    assert main([*argv, "-o", str(out), "--json"]) == 0
    summaries = json.loads(capsys.readouterr().out)["tasks"]
    assert [(each["limit"], each["value"]) for each in summaries] == [
        ("tokens", 128),
        ("tokens", 512),
        ("seconds", 20),
    ]
    for each in summaries:
        assert [row["problems"] for row in each["rows"]] == [3, 3]
        assert [c["method"] for c in each["compared_with_best"]] == ["threadweaver", "sequential"]
    assert summaries[0]["rows"][0]["total_tokens"] <= 128
    heads = {path.name: json.loads((path / RUN_FILE).read_text().splitlines()[0]) for path in out.iterdir()}
    assert {name: (head["budget"]["tokens"], head["budget"]["seconds"], head["at_once"]) for name, head in heads.items()} == {
        "tokens-128": (128, None, 512),
        "tokens-512": (512, None, 512),
        "seconds-20": (4096, 20.0, 1),
    }  # fmt: skip
    assert main(["plot", str(out), "-o", str(tmp_path / "curves.svg")]) == 0
    assert main(["report", str(out), "-o", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["trajectories"] == 18
    assert main([*argv, "-o", str(out), "--json"]) == 0  # continues, with nothing left to do
    again = json.loads(capsys.readouterr().out)["tasks"]
    assert [e["rows"][0]["total_tokens"] for e in again] == [e["rows"][0]["total_tokens"] for e in summaries]
    assert main(["eval", task, "--url", url, "--sweep", "width=1,2"]) == 1
    assert "expected one of tokens, critical_tokens, calls, seconds" in capsys.readouterr().err


def test_options_of_methods(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = problems(tmp_path / "halves.jsonl", 2)
    argv = [
        "eval",
        task,
        "--url",
        url,
        "--methods",
        "self_consistency,sequential",
        "--json",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--option", "self_consistency.n=3", "--option", "self_consistency.stop=beta"]) == 0
    several, one = json.loads(capsys.readouterr().out)["rows"]
    assert several["engine_calls"] >= 3
    assert one["engine_calls"] == 1
    head = json.loads((tmp_path / "out" / RUN_FILE).read_text().splitlines()[0])
    assert [(o["method"], o["name"], o["value"]) for o in head["options"]] == [
        ("self_consistency", "n", 3),
        ("self_consistency", "stop", "beta"),
    ]
    assert main(argv) == 1, "another evaluation"
    assert "options" in capsys.readouterr().err
    for wrong, message in (
        ("self_consistency.m=3", "m"),
        ("n=3", "'n'"),  # sequential has none
        ("mcts.width=3", "expected an option of self_consistency, sequential"),
        ("self_consistency.n=many", "n='many'"),
    ):
        assert main([*argv[:-2], "--option", wrong]) == 1
        assert message in capsys.readouterr().err
    for wrong in ("n", "budget=3", ".=1", "x.temperature=1"):
        with pytest.raises(SystemExit):
            main([*argv, "--option", wrong])
        assert "--option" in capsys.readouterr().err
