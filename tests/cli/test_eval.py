"""`sgl-apr eval` from its arguments to its files, on a scripted server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.cli.main import main
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
