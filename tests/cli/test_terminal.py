"""Text of models, files and servers never controls the terminal: no escape sequence, no control character, no bidi override."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgl_apr.cli.main import main
from tests.support.threadweaver_traces import TRACE

HOSTILE = "\x1b]52;c;cHduZWQ=\x1b\\ \x1b[2J \x9b2J \x07\x08 \u202ecod.exe\u202c \u2066x\u2069 \x85"
CONTROLS = {c for c in HOSTILE if not c.isprintable()}


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert not CONTROLS & set(out + err), "the terminal obeys these"
    return out


@pytest.fixture(params=["plain", "with branches"])
def trace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "trace.txt"
    text = f"a {HOSTILE} b" if request.param == "plain" else f"{HOSTILE}\n{TRACE}{HOSTILE}"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_trace_is_shown(trace: Path, capsys: pytest.CaptureFixture[str]):
    main(["parse", str(trace)])
    assert "cod.exe" in shown(capsys)


def test_json_means_the_same(trace: Path, capsys: pytest.CaptureFixture[str]):
    main(["parse", str(trace), "--json"])
    data = json.loads(shown(capsys))
    assert HOSTILE in "".join(span["text"] for span in data["spans"])


def test_errors_that_quote_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parse", f"{tmp_path}/{HOSTILE}".replace("\x85", "")]) == 1
    shown(capsys)
    broken = tmp_path / "broken.txt"
    broken.write_text(f"<Parallel>{HOSTILE}", encoding="utf-8")
    main(["convert", str(broken), "--to", "multiverse"])
    shown(capsys)


def test_a_converted_text_is_shown_on_a_terminal_and_complete_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "trace.txt"
    path.write_text(f"{HOSTILE}{TRACE}", encoding="utf-8")
    assert main(["convert", str(path), "--to", "multiverse"]) == 0
    assert HOSTILE in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["convert", str(path), "--to", "multiverse"]) == 0
    shown(capsys)
