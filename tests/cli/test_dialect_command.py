"""Dialects of one's own on the command line: `--dialect FILE`, `dialect check|list|show`, `serve --apr-dialect FILE`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.formats.dialect_check import check_dialect
from sgl_apr.server.api.config import parse_api_arguments
from sgl_apr.server.api.options import OptionsParser, ReasonRequest
from sgl_apr.server.launch.usage import UsageError
from tests.support.paths import DOCS

PAGE = (DOCS / "dialects.md").read_text()
GRAMMAR = re.search(r'```lark title="debate.lark"\n(.*?)```', PAGE, re.DOTALL)[1]  # type: ignore[index]
REPLY = re.search(r'```text title="reply.txt"\n(.*?)\n```', PAGE, re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture
def debate(tmp_path: Path) -> Path:
    path = tmp_path / "debate.lark"
    path.write_text(GRAMMAR)
    return path


@pytest.fixture
def reply(tmp_path: Path) -> Path:
    path = tmp_path / "reply.txt"
    path.write_text(REPLY)
    return path


def test_parse_validate_and_convert_read_traces_of_a_file(
    debate: Path, reply: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["parse", str(reply), "--dialect", str(debate), "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["dialect"] == "debate"
    assert main(["validate", str(reply), "--dialect", str(debate), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dialects"] == {"debate": 1}
    assert main(["convert", str(reply), "--dialect", str(debate), "--to", "npr"]) == 0
    (converted := reply.with_name("npr.txt")).write_text(capsys.readouterr().out)
    assert main(["convert", str(converted), "--dialect", "npr", "--to", str(debate)]) == 0
    assert capsys.readouterr().out == REPLY


def test_many_traces_in_parallel_processes(debate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps({"text": REPLY}) + "\n" for _ in range(80)))
    assert main(["validate", str(path), "--dialect", str(debate), "--jobs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] == 80


def test_recorded_trajectories_are_reported(debate: Path, reply: Path, capsys: pytest.CaptureFixture[str]):
    trajectory = apr.Dialect.from_file(debate).parse(REPLY, apr.ByteTokenizer())
    recorded = reply.with_name("recorded.jsonl")
    recorded.write_text(json.dumps({"id": "1", "trajectory": json.loads(trajectory.to_json())}) + "\n")
    page = reply.with_name("report.html")
    status = main(["report", str(recorded), "-o", str(page)])
    assert (status, capsys.readouterr().err) == (0, "")
    assert "debate" in page.read_text()


@pytest.mark.parametrize("command", ["parse", "validate", "convert", "run", "model", "train", "check"])
def test_a_wrong_file_is_one_line(
    command: str, tmp_path: Path, reply: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = tmp_path / "wrong.lark"
    wrong.write_text(GRAMMAR.replace("TEXT closer", "TEXT closed"))
    arguments = {
        "parse": ["parse", str(reply), "--dialect", str(wrong)],
        "validate": ["validate", str(reply), "--dialect", str(wrong)],
        "convert": ["convert", str(reply), "--to", str(wrong)],
        "run": ["run", "question", "--dialect", str(wrong)],
        "model": ["model", "smollm2", "--tags", str(wrong)],
        "train": [
            "train",
            "sft",
            str(tmp_path / "config.toml"),
            "-o",
            str(tmp_path),
            "--dialect",
            str(wrong),
        ],
        "check": ["dialect", "check", str(wrong)],
    }[command]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error == f"sgl-apr: error: {wrong}, line 9: rule body: 'closed' used but not defined\n"


@pytest.mark.parametrize("name", ["debate", "nope.lark", "./nope", "/", "x" * 5000, "\0"])
def test_a_name_that_is_no_dialect_and_no_file(name: str, reply: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parse", str(reply), "--dialect", name]) == 1
    error = capsys.readouterr().err
    assert re.match("sgl-apr: error: (no dialect .*, or a .lark file|cannot read the grammar)", error)
    assert error.count("\n") == 1
    assert len(error) < 500


def test_a_name_wins_over_a_file(reply: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "npr").write_text(GRAMMAR)
    (tmp_path / "npr.lark").write_text(GRAMMAR)
    monkeypatch.chdir(tmp_path)
    assert main(["dialect", "check", "npr"]) == 0
    assert main(["dialect", "check", "./npr.lark"]) == 1, "it would take the name of a built-in dialect"


def test_check_prints_a_report(debate: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["dialect", "check", str(debate)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for piece in (
        "debate.lark: is a dialect",
        "joins    text",
        "<Case 1>One.</Case 1>",
        "xgrammar",
        "closer",
        "</Side>",
    ):
        assert piece in shown.out
    assert all(len(line) <= 160 for line in shown.out.splitlines())


def test_check_prints_json(debate: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["dialect", "check", str(debate), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["valid"] is True
    assert report["rules"]["closer"] == 10
    assert report["joins"] == ["text"]
    assert apr.Dialect.from_file(debate).is_valid(report["example"])
    debate.write_text("trace: (")
    assert main(["dialect", "check", str(debate), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "valid": False, "errors": [f"{debate}, line 1: expected Lark syntax, found 'trace: ('"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TEXT closer\n", 'TEXT "</Case>"\n', r"line 10: rule 'closer' is not used"),
        ("trace   :", "mine : TEXT\ntrace   :", r"line 3: rule 'mine' is not used"),
        ("TEXT? (block TEXT?)*", "TEXT", r"line 5: rule 'fork' is not part of 'trace'"),
        (
            "fork case+ tail close",
            "fork tail case+ close",
            r"line 3: a block as the runtime writes it does not",
        ),
        ("fork case+ tail close", "fork case+ close", r"line 11: rule 'tail' is not used"),
    ],
)
def test_check_finds_what_does_not_work(
    debate: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
):
    debate.write_text(GRAMMAR.replace(old, new))
    assert main(["dialect", "check", str(debate)]) == 1
    assert re.search(rf"^error: debate\.lark, {message}", capsys.readouterr().err, re.MULTILINE)


def test_check_warns_of_an_unused_terminal(debate: Path, capsys: pytest.CaptureFixture[str]):
    debate.write_text(GRAMMAR + 'SPACE : " "\n')
    assert main(["dialect", "check", str(debate)]) == 0
    assert re.fullmatch(
        r"warning: debate\.lark, line \d+: terminal SPACE is not used\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("name", apr.dialect_names())
def test_built_in_dialects_pass_their_own_check(name: str):
    report = check_dialect(apr.dialect(name))
    assert (report.errors, report.warnings) == ((), ())
    assert len(report.backends) == 3
    assert apr.dialect(name).parse(report.example).blocks


def test_list_and_show(capsys: pytest.CaptureFixture[str]):
    assert main(["dialect", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == apr.dialect_names()
    assert main(["dialect", "list", "--json"]) == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == apr.dialect_names()
    assert main(["dialect", "show", "npr"]) == 0
    assert capsys.readouterr().out.rstrip() == apr.dialect("npr").source.rstrip()
    assert main(["dialect", "show", "npr", "--json"]) == 0
    assert "<step>" in json.loads(capsys.readouterr().out)["tags"]
    assert main(["dialect", "show", "nope"]) == 1


def test_the_flag_of_the_server_registers_the_file(debate: Path, tmp_path: Path):
    config, rest = parse_api_arguments(["--apr-dialect", str(debate), "--tp", "2"])
    assert rest == ["--tp", "2"]
    assert [d.name for d in config.dialects] == ["debate"]
    assert apr.dialect("debate") == config.dialects[0]
    options = OptionsParser(config.limits, apr.ByteTokenizer(), 2000, 300)
    _, request = options.parse(ReasonRequest([1], {"dialect": "debate"}))
    assert request.dialect is config.dialects[0]
    for name in (str(debate), "debate.lark", "./debate"):
        with pytest.raises(apr.GrammarError, match="no dialect"):
            options.parse(ReasonRequest([1], {"dialect": name}))
    other = tmp_path / "other" / "debate.lark"
    other.parent.mkdir()
    other.write_text(GRAMMAR)
    with pytest.raises(UsageError, match="two files of one name"):
        parse_api_arguments(["--apr-dialect", str(debate), "--apr-dialect", str(other)])


def test_a_server_with_a_wrong_file_does_not_start(debate: Path, capsys: pytest.CaptureFixture[str]):
    debate.write_text(GRAMMAR.replace("TEXT closer", "TEXT ~ 3"))
    assert main(["serve", "--model", "nope", "--apr-dialect", str(debate)]) == 2
    error = capsys.readouterr().err
    assert f"{debate}, line 9" in error
    assert error.count("\n") == 1
    assert main(["serve", "--model", "nope", "--apr-dialect", "missing.lark"]) == 2
    assert "cannot read the grammar missing.lark" in capsys.readouterr().err
