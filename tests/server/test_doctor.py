"""The doctor on this installation and a real server, and divergences and verdicts that are computed by hand."""

from __future__ import annotations

import json
import urllib.request
from math import log
from pathlib import Path

import pytest

from sgl_apr.cli.main import main
from sgl_apr.errors import AprError
from sgl_apr.server import doctor, hooks
from sgl_apr.server.doctor import Finding, check_installation, is_healthy
from sgl_apr.server.kv_join.drift import (
    DistributionShift,
    DriftMeasurement,
    divergence,
    judge_drift,
    measure_drift,
    pool_measurements,
    sample_from_model,
)
from sgl_apr.server.kv_join.drift_samples import BUILTIN_SAMPLES, JoinSample, read_samples
from sgl_apr.server.kv_join.probe import make_client
from sgl_apr.tokenizer import load_tokenizer
from tests.support.fake_sglang_server import SglangServer


def by_name(findings) -> dict[str, Finding]:
    return {f.name: f for f in findings}


def test_this_installation_is_healthy():
    findings = list(check_installation())
    assert is_healthy(findings), [f for f in findings if f.state == "failed"]
    assert {"sglang", "sglang.srt.plugins", "decode kernel", "memory"} <= by_name(findings).keys()


def test_what_is_missing_is_named(monkeypatch):
    """Another SGLang, a plugin that SGLang does not load, no compiler, no memory."""
    monkeypatch.setattr(hooks, "SUPPORTED_SGLANG", "0")
    monkeypatch.setenv("SGLANG_PLUGINS", "others")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor, "MIN_FREE_MEMORY", 1 << 60)
    findings = by_name(check_installation())
    for name in ("sglang", "sglang.srt.plugins", "C++ compiler", "memory"):
        assert findings[name].state == "failed"
        assert findings[name].hint
    assert not is_healthy(findings.values())


def test_what_is_missing_is_optional():
    assert is_healthy([Finding("a", "ok", ""), Finding("b", "missing", "")])
    assert not is_healthy([Finding("a", "ok", ""), Finding("b", "failed", "")])


def test_no_server_is_a_failure(capsys):
    assert main(["doctor", "--url", "http://127.0.0.1:9", "--json"]) == 1
    last = json.loads(capsys.readouterr().out)["findings"][-1]
    assert (last["name"], last["state"]) == ("server", "failed")


def test_a_model_that_cannot_be_served_is_a_failure(capsys):
    assert main(["doctor", "--model", "./nowhere", "--json"]) == 1
    assert "there is no model directory" in json.loads(capsys.readouterr().out)["findings"][-1]["found"]


def test_the_join_needs_a_server(capsys):
    assert main(["doctor", "join"]) == 1
    assert "give --url URL, or --model MODEL" in capsys.readouterr().err


@pytest.mark.server
def test_a_correct_server_is_healthy(server, capsys):
    assert main(["doctor", "--url", server.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {f["name"]: f["state"] for f in found["findings"]}
    assert found["ok"]
    (attention,) = [f["found"] for f in found["findings"] if f["name"] == "attention"]
    assert attention == "apr_cpu", "without a reason: on a CPU there is no choice"
    assert all(
        states[name] == "ok"
        for name in (
            "server",
            "attention",
            "tokenizer",
            "tags",
            "grammar",
            "fork",
            "KV join",
            "worker groups",
        )
    )


@pytest.mark.server
def test_the_findings_are_printed_as_a_table(server, capsys):
    assert main(["doctor", "--url", server.url]) == 0
    assert "KV join" in capsys.readouterr().out


def test_a_server_of_sglang_has_no_reason_for_its_attention():
    with SglangServer().in_thread() as url:
        assert doctor._attention(url, None) == ""


def test_a_divergence_computed_by_hand():
    """Over tokens 1 and 2, and all others as one: (0.5, 0.25, 0.25) against (0.25, 0.25, 0.5)."""
    reference, other = {1: log(0.5), 2: log(0.25)}, {1: log(0.25), 2: log(0.25)}
    assert divergence(reference, other) == pytest.approx(0.5 * log(2) + 0.25 * log(0.5))
    assert divergence(reference, reference) == 0
    assert divergence({1: 0.0}, {1: log(0.5)}) == pytest.approx(log(2)), (
        "no probability is left for the other tokens"
    )
    assert divergence({1: log(0.5)}, {1: 0.0}) > 10, "the other tokens have no probability there"


@pytest.mark.parametrize(
    ("kv", "turned", "expected"),
    [
        (DistributionShift(0.15, 0.85), DistributionShift(0.1, 0.9), "tolerates"),
        (
            DistributionShift(0.09, 1.0),
            DistributionShift(0.0, 1.0),
            "tolerates",
        ),  # a small divergence, whatever reversed text changes
        (DistributionShift(0.15, 0.7), DistributionShift(0.1, 0.9), "is disturbed by"),  # other tokens
        (DistributionShift(0.5, 0.9), DistributionShift(0.1, 0.9), "is disturbed by"),
        (DistributionShift(1.5, 0.9), DistributionShift(0.1, 0.9), "breaks under"),
        (DistributionShift(0.5, 0.4), DistributionShift(0.1, 0.9), "breaks under"),
    ],
)
def test_verdicts(kv: DistributionShift, turned: DistributionShift, expected: str):
    assert judge_drift(kv, turned) == expected


def test_every_token_counts_once():
    pooled = pool_measurements(
        [
            DriftMeasurement("a", 1, DistributionShift(4.0, 0.0), DistributionShift(0.0, 1.0)),
            DriftMeasurement("b", 3, DistributionShift(0.0, 1.0), DistributionShift(4.0, 0.0)),
        ]
    )
    assert (pooled.steps, pooled.kv, pooled.reversed) == (
        4,
        DistributionShift(1.0, 0.75),
        DistributionShift(3.0, 0.25),
    )


def test_samples_of_a_file(tmp_path: Path):
    path = tmp_path / "samples"
    path.write_text('{"prefix": "p", "branches": ["a", "b"], "header": "h"}\n\n Why is the sky blue? \n')
    assert read_samples(path) == [JoinSample("p", ("a", "b"), "h"), "Why is the sky blue?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "is empty"),
        ('question\n{"prefix": "p"}', 'line 2: expected "prefix"'),
        ("{", "line 1: expected"),
        ('{"prefix": "p", "branches": ["a"], "header": "h"}', "at least two branches"),
        ('{"prefix": "p", "branches": "ab", "header": "h"}', "at least two branches"),
        ('{"prefix": "p", "branches": ["a", ""], "header": "h"}', "that are not empty"),
        ('{"prefix": "p", "branches": ["a", 3], "header": "h"}', "expected texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "samples"
    path.write_text(text)
    with pytest.raises(AprError, match=message):
        read_samples(path)
    with pytest.raises(AprError, match="cannot read"):
        read_samples(tmp_path / "nowhere")


@pytest.mark.server
def test_drift_is_measured(server, capsys):
    assert main(["doctor", "join", "--url", server.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["samples"]) == len(BUILTIN_SAMPLES)
    assert found["verdict"] == judge_drift(
        DistributionShift(**found["overall"]["kv"]), DistributionShift(**found["overall"]["reversed"])
    )
    assert all(m["kv"]["kl"] > 0 and m["steps"] > 0 for m in found["samples"])


@pytest.mark.server
def test_a_single_branch_has_no_drift(server):
    """With one branch, the text join and the KV join are the same prompt."""
    tokenizer = load_tokenizer(server_model(server))
    measurement = measure_drift(
        make_client(server.url), tokenizer, JoinSample("The numbers: ", ("one two three",), " end")
    )
    assert measurement.kv.kl < 1e-6
    assert measurement.kv.agreement == measurement.reversed.agreement == 1


@pytest.mark.server
def test_the_model_writes_the_branches(server, tmp_path: Path, capsys):
    path = tmp_path / "questions"
    path.write_text("What is y?\n")
    assert main(["doctor", "join", "--url", server.url, "--prompts", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "What is y?" in shown
    assert shown.count("%") == 4, "two rows, two shares in each"
    sample = sample_from_model(make_client(server.url), load_tokenizer(server_model(server)), "What?")
    assert [b.split(":")[0] for b in sample.branches] == ["Idea 1", "Idea 2", "Idea 3"]
    assert all(b.endswith("\n") for b in sample.branches)


def server_model(server) -> str:
    """Return the path of the model, which has the tokenizer."""
    with urllib.request.urlopen(f"{server.url}/model_info") as answer:
        return json.load(answer)["tokenizer_path"]
