"""The command line: output for people and machines, exit codes, one-line errors, and the quickstart."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.cli.eval_arguments import parse_methods
from sgl_apr.cli.main import main
from tests.support.paths import EXAMPLES
from tests.support.threadweaver_traces import TRACE


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.txt"
    path.write_text(TRACE)
    return path


def test_parse_shows_the_tree(trace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parse", str(trace)]) == 0
    shown = capsys.readouterr().out
    for piece in ("fork into 2", "1: x < y", "2: and <b>", "both", "The answer is 4."):
        assert piece in shown


def test_parse_prints_json_that_reads_back(trace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parse", str(trace), "--json"]) == 0
    assert apr.Trajectory.from_json(capsys.readouterr().out).text == TRACE


def test_parse_locates_defects(trace: Path, capsys: pytest.CaptureFixture[str]):
    trace.write_text(TRACE.replace("2: and", "3: and"))
    assert main(["parse", str(trace)]) == 1
    out, err = capsys.readouterr()
    assert "fork into 2" in out
    assert err.startswith(f"{trace}: line 5, column 10: missing number: found '3', expected \"2\"\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["parse", "/nowhere/at.all"], "cannot read /nowhere/at.all"),
        (["parse", "-", "--dialect", "nope"], "no dialect 'nope'"),
        (["run", "hi", "--url", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
        (["run", "hi", "--url", "http://127.0.0.1:9", "--policy", "some"], "policy='some', expected"),
        (["model", "smollm2", "--tags", "nope"], "no dialect 'nope'"),
    ],
)
def test_errors_are_one_line_and_status_1(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("text"))
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("sgl-apr: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["nope"],
        ["run"],
        ["run", "hi", "--mode", "both"],
        ["run", "hi", "--budget", "tokens=0"],
        ["run", "hi", "--budget", "size=1"],
    ],
)
def test_wrong_usage_is_status_2(argv):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2


@pytest.mark.parametrize("command", ["run", "model", "parse", "validate", "convert"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"example: sgl-apr {command} " in capsys.readouterr().out


def test_serve_help(capsys):
    assert main(["serve", "--help"]) == 0
    assert "sgl-apr serve --model" in capsys.readouterr().out


@pytest.mark.server
def test_run_on_a_server(server, capsys):
    argv = ["run", "What?", "--url", server.url, "--mode", "parallel", "--budget", "width=3,tokens=300"]
    assert main([*argv, "--json"]) == 0
    trajectory = apr.Trajectory.from_json(capsys.readouterr().out)
    apr.dialect("threadweaver").validate(trajectory.text)
    assert main(argv) == 0
    assert "Metrics" in capsys.readouterr().out
    assert main([*argv, "--live", "--policy", "first", "--json"]) == 0
    out, err = capsys.readouterr()
    assert apr.Trajectory.from_json(out).blocks
    assert "What?" in err


@pytest.mark.server
@pytest.mark.slow
def test_the_quickstart_runs_unchanged(server):
    """On a random model: nothing sensible, but every step, and the figures on the last line."""
    script = EXAMPLES / "quickstart.py"
    done = subprocess.run(
        [sys.executable, str(script), "--url", server.url],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ok"] is True
    assert figures["questions"] == figures["valid"] == 3
    assert figures["branches"] >= 3 * figures["forks"] >= 9
    assert figures["critical_path"] < figures["total_tokens"]
    assert figures["min_cached_share"] >= 0.99
    assert figures["serial_wall_s"] > 0


@pytest.fixture
def replies(tmp_path: Path) -> Path:
    """100 JSON lines, enough for more than one process; every tenth is broken."""
    path = tmp_path / "replies.jsonl"
    texts = [TRACE.replace("2: and", "1: and") if i % 10 == 0 else TRACE for i in range(100)]
    path.write_text("".join(json.dumps({"id": i, "response": t}) + "\n" for i, t in enumerate(texts)))
    return path


def test_validate_counts_defects(replies: Path, trace: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["validate", str(replies), str(trace), "--json"]) == 1
    counts = json.loads(capsys.readouterr().out)
    assert counts == {
        "traces": 101,
        "valid": 91,
        "dialects": {"threadweaver": 101},
        "defects": {"duplicate number": 10, "missing number": 10},
    }
    assert main(["validate", str(trace)]) == 0
    assert "threadweaver" in capsys.readouterr().out


def test_text_that_is_no_trace_is_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Unless --dialect says that it is a reply of that dialect, which need not fork."""
    plain, empty, none = tmp_path / "plain.md", tmp_path / "empty.txt", tmp_path / "none.jsonl"
    plain.write_text("# A page\n\nwithout <b>a block</b>\n")
    empty.write_text(" \n")
    none.write_text("\n")

    def counted(*argv: str) -> tuple[int, dict]:
        status = main(["validate", "--json", *argv])
        return status, json.loads(capsys.readouterr().out)

    assert counted(str(plain))[0] == 1
    assert counted(str(plain))[1]["defects"] == {"no block": 1}
    assert counted(str(plain), "--dialect", "threadweaver")[0] == 0
    for more in ((), ("--dialect", "threadweaver")):
        status, counts = counted(str(empty), *more)
        assert (status, counts["traces"], counts["valid"], counts["defects"]) == (1, 1, 0, {"empty text": 1})
    assert main(["parse", str(empty)]) == 1
    assert f"{empty}: the text is empty" in capsys.readouterr().err
    for command in (["validate"], ["parse"], ["convert", "--to", "npr"]):
        assert main([*command, str(none)]) == 1
        assert "none.jsonl has no line, expected a JSON object in each line" in capsys.readouterr().err


def test_a_text_of_no_known_dialect_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, message = tmp_path / "reply.txt", "no block of a known dialect, use --dialect"
    path.write_text("It is 42.\n")
    assert main(["convert", str(path), "--to", "npr"]) == 1
    assert capsys.readouterr() == ("", f"sgl-apr: error: {path}: {message}\n")
    assert main(["validate", str(path)]) == 1
    assert f"{message}: 1 of 1 texts" in capsys.readouterr().err
    assert main(["parse", str(path)]) == 0, "parse shows it as plain text"
    out, err = capsys.readouterr()
    assert "It is 42." in out
    assert err == f"{path}: {message}\n"
    assert main(["convert", str(path), "--dialect", "threadweaver", "--to", "npr"]) == 0
    assert capsys.readouterr() == ("It is 42.\n", "")
    path.write_text("\n")
    assert main(["convert", str(path), "--to", "npr"]) == 1
    assert "the text is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "a", "trajectory": {}}, "found a trajectory, which `sgl-apr report` shows"),
        ({"schema": 1, "spans": []}, "found a trajectory, which `apr.Trajectory.from_json` reads"),
        (
            {"task": "t", "model": "m", "split": "test"},
            "found the settings of an evaluation, whose trajectories",
        ),
    ],
)
def test_files_of_trajectories_are_no_texts(tmp_path: Path, capsys, fields: dict, message: str):
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(fields) + "\n")
    for command in (["validate"], ["parse"], ["convert", "--to", "npr"]):
        assert main([*command, str(path)]) == 1
        assert f"run.jsonl, line 1: expected the text of a reply, {message}" in capsys.readouterr().err


def test_odd_files_end_in_one_line_or_in_json(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]):
    """Half a surrogate pair is printed as JSON writes it; what is no JSON is an error of one line."""
    halves = tmp_path / "halves.jsonl"
    halves.write_text('{"text": "a \\ud800"}\n')
    assert main(["parse", str(halves), "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["spans"][0]["text"] == "a \ud800"
    assert main(["convert", str(halves), "--dialect", "multiverse", "--to", "npr"]) == 0
    assert json.loads(capsysbinary.readouterr().out) == {"text": "a \ud800"}
    for name, content in {
        "deep.jsonl": b"[" * 100_000, "long.jsonl": b'{"text": ' + b"9" * 5000 + b"}", "bytes.txt": b"\xff\xfe",
        "bytes.jsonl": b'{"text": "\xff"}', "number.jsonl": b'{"text": 5}', "list.jsonl": b"[]",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        for command in (["validate"], ["parse", "--json"], ["convert", "--to", "npr"]):
            assert main([*command, str(tmp_path / name)]) == 1
            out, err = capsysbinary.readouterr()
            assert out == b""
            assert err.startswith(b"sgl-apr: error: ")
            assert err.count(b"\n") == 1
    for name in ("none.txt", "", "a\0b", "x" * 5000):
        assert main(["validate", str(tmp_path / name)]) == 1
        assert capsysbinary.readouterr().err.startswith(b"sgl-apr: error: cannot read ")


def test_convert_keeps_the_other_fields_and_the_order(replies: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(replies), "--to", "multiverse"]) == 1, "the broken ones are errors"
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in rows] == [i for i in range(100) if i % 10]
    assert all(apr.dialect("multiverse").is_valid(row["response"]) for row in rows)
    assert err.count("sgl-apr: error: ") == 10
    assert f"{replies}:1: threadweaver: line 5, column 10: duplicate number" in err


def test_a_text_passes_through_pipes(trace: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO(TRACE))
    assert main(["convert", "-", "--to", "npr"]) == 0
    converted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO(converted))
    assert main(["convert", "-", "--to", "threadweaver"]) == 0
    assert capsys.readouterr().out == TRACE


def test_parse_prints_a_line_for_each_record(replies: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parse", str(replies), "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["valid"] for r in rows[:11]] == [False, *[True] * 9, False]
    assert rows[0]["defects"][0]["name"] == "duplicate number"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl, line 2: expected a JSON object"),
        ('{"prompt": "x"}', "bad.jsonl, line 2: no text, expected a string under text, response"),
        ("[]", "bad.jsonl, line 2: expected a JSON object"),
    ],
)
def test_an_error_names_the_bad_line(tmp_path: Path, capsys, line: str, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": TRACE}) + "\n" + line + "\n")
    assert main(["validate", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sgl-apr {apr.__version__}, sglang {version('sglang')}\n"
    assert apr.__version__ == version("sgl-apr")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert "sgl-apr serve --model" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["parse"], ["validate", "--json"], ["convert", "--to", "npr"]])
def test_a_full_disk_is_one_line(trace: Path, command: list[str]):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sgl_apr.cli.main", *command, str(trace)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "sgl-apr: error: No space left on device\n"


@pytest.mark.parametrize(
    ("argv", "usage", "message"),
    [
        (["rn", "hi"], "usage: sgl-apr [OPTIONS] COMMAND ...", "no choice 'rn', did you mean 'run'?"),
        (
            ["run", "hi", "--tokens", "3"],
            "usage: sgl-apr run [OPTIONS] question",
            "unrecognized arguments: --tokens 3",
        ),
        (["run", "hi", "--mode", "paralel"], "usage: sgl-apr run", "did you mean 'parallel'?"),
        (["eval"], "usage: sgl-apr eval [OPTIONS] [TASK ...]", "no task: expected some of countdown"),
        (["eval", "countdown"], "usage: sgl-apr eval", "no model: expected --model or --url"),
        (["parse", "x", "--jobs", "0"], "usage: sgl-apr parse", "'0', expected a whole number of at least 1"),
        (["eval", "countdown", "--at-once", "0"], "usage: sgl-apr eval", "'0', expected a whole number"),
        (["dialect", "shw"], "usage: sgl-apr dialect", "did you mean 'show'?"),
    ],
)
def test_wrong_usage_is_three_lines(argv: list[str], usage: str, message: str, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(usage)
    assert message in lines[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["eval", "countdwn", "--url", "x"],
            "no task 'countdwn' (did you mean 'countdown'?), expected one of",
        ),
        (["eval", "countdown", "--methods", "apr,sequentail", "--url", "x"], "did you mean 'sequential'?"),
        (["eval", "countdown", "--methods", ",", "--url", "x"], "--methods ',', expected all, or some of"),
        (["parse", "x", "--dialect", "threadweever"], "did you mean 'threadweaver'?"),
        (["run", " "], "the question is empty, expected text"),
    ],
)
def test_a_wrong_name_is_answered_with_the_one_meant(argv: list[str], message: str, capsys):
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_comma_at_the_end_of_methods():
    assert parse_methods("apr, sequential,") == ["apr", "sequential"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apr.read(None), "the reply is of type NoneType, expected text"),
        (lambda: apr.convert("abc", "npr"), "the trajectory is of type str, expected a Trajectory"),
        (lambda: apr.convert(apr.read("a").trajectory, 5), "no dialect 'int', expected one of"),
    ],
)
def test_wrong_types_are_typed_errors(call, message: str):
    with pytest.raises(apr.AprError, match=message):
        call()
