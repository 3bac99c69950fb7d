"""The first minutes on a GPU: what goes wrong in one part stops no other, and every part can fail."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_acceptance
from benchmarks.acceptance import driver, process
from benchmarks.acceptance.configurations import TREE_CORE_ENV, Configuration
from benchmarks.acceptance.driver import AcceptanceRun, Report

# Stands for the worker: each part does what its name says, and the name of the configuration what its start does.
FAKE_WORKER = """
import json, os, sys, time
name, device, parts, noise, folder = json.loads(sys.argv[1])
def report(**line): print(json.dumps(line), flush=True)
print("SGLang prints this"); report(ready=True)
sys.stdin.readline()
report(begins="start")
if name == "does not start":
    sys.exit("no such card")
report(part="start", ok=None if name == "refused" else True, attention_backends=["fa3", "fa3"])
for part in parts:
    report(begins=part)
    if part == "hangs": time.sleep(60)
    if part == "crashes": print("illegal address", file=sys.stderr, flush=True); os.abort()
    if part == "raises": report(part=part, ok=False, failed="RuntimeError"); sys.exit(1)
    if part == "refused": report(part=part, ok=None, **{"not supported": "why"}); continue
    report(part=part, ok=part != "wrong", error=[1.0, 3.0], noise=noise)
"""


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKER", FAKE_WORKER)
    monkeypatch.setattr(process, "PART_LIMIT_S", 1.0)
    monkeypatch.setattr(driver, "MIN_START_S", 0.05)


def run(tmp_path: Path, *configurations: Configuration, seconds: float = 60.0) -> Report:
    report = Report(show=lambda line: None)
    AcceptanceRun(configurations, "cuda", seconds, report, capability=9).run(tmp_path)
    return report


def results(report: Report) -> dict[str, Any]:
    return {f"{line['configuration']}: {line['part']}": line["ok"] for line in report.lines}


def test_a_part_that_hangs_crashes_or_raises_does_not_stop_the_others(fake_worker, tmp_path: Path):
    parts = ("start", "ordinary", "hangs", "crashes", "raises", "refused", "wrong", "last")
    report = run(tmp_path, Configuration("one", parts=parts), Configuration("two", parts=("start", "last")))
    expected = [True, True, False, False, False, None, False, True]
    assert [line["part"] for line in report.lines] == [*parts, "start", "last"]
    assert [line["ok"] for line in report.lines] == [*expected, True, True]
    lines = {line["part"]: line for line in report.lines[: len(parts)]}
    assert lines["hangs"]["failed"] == "no result after 1 s"
    assert lines["crashes"]["failed"] == "the process ended with signal SIGABRT"
    assert "illegal address" in lines["crashes"]["last_lines"]
    assert lines["last"]["noise"] == 2.0, "the error of ordinary requests, from a process before"
    verdict = report.verdict("cuda")
    assert (verdict["verdict"], verdict["ok"]) == ("failed", False)
    assert verdict["failed"] == ["one: hangs", "one: crashes", "one: raises", "one: wrong"]
    assert verdict["not_supported"] == ["one: refused"]
    assert verdict["parts"] == 5


def test_a_configuration_that_does_not_start_is_named_and_the_next_one_runs(fake_worker, tmp_path: Path):
    both = ("start", "last")
    report = run(tmp_path, Configuration("does not start", parts=both), Configuration("next", parts=both))
    assert results(report) == {
        "does not start: start": False, "does not start: last": False, "next: start": True, "next: last": True,
    }  # fmt: skip
    assert report.lines[0]["last_lines"] == ["no such card"]
    assert report.verdict("cuda")["not_reached"] == ["does not start: last"]
    report = run(tmp_path, Configuration("does not start", parts=both))
    assert report.verdict("cuda")["verdict"] == "could not run"
    report = run(tmp_path, Configuration("refused", parts=both), Configuration("next", parts=both))
    assert list(results(report).values()) == [None, None, True, True]
    assert report.verdict("cuda")["ok"]


def test_what_says_nothing_on_a_card_is_skipped(fake_worker, tmp_path: Path):
    both = ("start", "last")
    report = run(
        tmp_path,
        Configuration("default", parts=both),
        Configuration("fa3", {"attention_backend": "fa3"}, parts=both, same_as="default"),
        Configuration("triton", {"attention_backend": "triton"}, parts=both, same_as="default"),
        Configuration("other card", parts=both, capabilities=frozenset({10})),
    )
    skipped = {line["configuration"]: line["skipped"] for line in report.lines if "skipped" in line}
    assert skipped == {
        "fa3": "the same as default",
        "other card": "not for cards of compute capability 9",
    }
    assert report.verdict("cuda")["verdict"] == "ok"


def test_when_the_time_is_over_the_verdict_is_incomplete(fake_worker, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(process, "PART_LIMIT_S", 60.0)
    started = time.monotonic()
    report = run(
        tmp_path,
        Configuration("one", parts=("start", "good", "hangs", "later")),
        Configuration("two"),
        seconds=1.0,
    )
    assert time.monotonic() - started < 5
    assert [line["ok"] for line in report.lines[:4]] == [True, True, False, False]
    assert {line["skipped"] for line in report.lines[2:]} == {"no time left"}
    verdict = report.verdict("cuda")
    assert (verdict["verdict"], verdict["ok"]) == ("incomplete", False)
    assert verdict["not_reached"][:3] == ["one: hangs", "one: later", "two: start"]


def test_the_exit_status_says_what_happened(fake_worker, monkeypatch: pytest.MonkeyPatch, capsys):
    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    for parts, status in ((("start", "good"), 0), (("start", "wrong"), 1)):
        monkeypatch.setattr(
            gpu_acceptance, "configurations", lambda _, p=parts: {"a": Configuration("a", parts=p)}
        )
        assert gpu_acceptance.main(["--device", "cpu"]) == status
        *_, verdict = lines()
        assert verdict["ok"] is (status == 0)
    assert gpu_acceptance.main(["--device", "cpu", "--json"]) == 1
    (complete,) = lines()
    assert [row["part"] for row in complete["rows"]] == ["start", "wrong"]
    assert complete["missed"] == ["failed: a: wrong"]
    monkeypatch.setattr(gpu_acceptance, "version", lambda _: "0.5.1")
    assert gpu_acceptance.main(["--device", "cpu"]) == 2
    (verdict,) = lines()
    assert verdict["why"] == "sglang 0.5.1 is installed, expected 0.5.23"


def test_the_core_in_python_is_chosen_where_torch_is_not_the_one_of_sglang(monkeypatch: pytest.MonkeyPatch):
    from benchmarks.acceptance import configurations

    monkeypatch.delenv(TREE_CORE_ENV, raising=False)
    assert configurations.tree_core_environment() == {}
    monkeypatch.setattr(configurations, "version", lambda _: "2.11.0+cu130")
    assert configurations.tree_core_environment() == {TREE_CORE_ENV: "python"}
    monkeypatch.setenv(TREE_CORE_ENV, "rust")
    assert configurations.tree_core_environment() == {}
