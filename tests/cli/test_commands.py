"""All commands: help with examples, completion, missing packages, Ctrl-C, and what they do not import."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgl_apr.cli.main import SUBCOMMANDS, main
from sgl_apr.server.launch.preflight import free_port

WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from sgl_apr.cli.main import main
for argv in COMMANDS:
    print(main(argv), file=sys.stderr)
"""
IMPORTS = """
import sys, time
from sgl_apr.cli.main import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "sglang", "llguidance"} & sys.modules.keys())
print(status, heavy, time.process_time(), file=sys.stderr)
"""

ATEXIT = """
import atexit, sys
HEAVY = {"torch", "transformers", "sglang", "llguidance"}
atexit.register(lambda: print(sorted(HEAVY & sys.modules.keys()), file=sys.stderr))
"""


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", [c for c in SUBCOMMANDS if c != "dialect"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"sgl-apr {command} " in text.partition("example")[2]


@pytest.mark.parametrize(
    ("blocked", "commands", "requirement"),
    [
        ("sglang torch transformers", [["serve", "--model", "x"]], "sglang"),
        ("lark", [["--help"], ["serve", "--model", "x"], ["run", "hi"], ["parse", "x"]], "lark"),
        ("aiohttp", [["serve", "--model", "x"], ["run", "hi"]], "aiohttp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_package_is_one_line(blocked: str, commands: list[list[str]], requirement: str):
    done = run_python(f"BLOCKED = {blocked.split()}\nCOMMANDS = {commands}\n{WITHOUT}")
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(commands), done.stderr
    for error, status in zip(lines[::2], lines[1::2], strict=True):
        package = blocked.split()[0]
        assert error.startswith(
            f"sgl-apr: error: the package {package} is not installed: pip install '{requirement}"
        )
        assert status == "1"
    assert done.stdout == ""


def test_what_needs_no_sglang_works_without_it():
    blocked = ["sglang", "torch", "transformers", "llguidance"]
    commands = [["run", "hi", "--url", "http://127.0.0.1:9"]]
    done = run_python(f"BLOCKED = {blocked}\nCOMMANDS = {commands}\n{WITHOUT}")
    assert done.stderr.startswith("sgl-apr: error: no server at http://127.0.0.1:9: ")
    assert len(done.stderr.splitlines()) == 2


def test_a_server_that_is_not_there_is_noticed_at_once():
    done = run_python(IMPORTS, "run", "hi", "--url", "http://127.0.0.1:9")
    error, report = done.stderr.splitlines()
    assert error.startswith("sgl-apr: error: no server at http://127.0.0.1:9: ")
    status, heavy, seconds = report.split(" ")
    assert (status, heavy) == ("1", "[]")
    assert float(seconds) < 2


def test_the_launcher_imports_neither_torch_nor_sglang(tmp_path: Path):
    """The process that watches a server needs no CUDA context, no gigabyte of memory and no 10 s to start."""
    stopped = "import subprocess; subprocess.Popen = lambda command, **options: exit('started')\n"
    (tmp_path / "config.json").write_text("{}")
    argv = ["serve", "--model", str(tmp_path), "--port", str(free_port())]
    done = run_python(ATEXIT + stopped + IMPORTS, *argv)
    assert done.stderr.splitlines() == ["started", "[]"]


@pytest.mark.server
def test_an_answer_takes_little_processor_time(server):
    argv = ["run", "Why?", "--url", server.url, "--budget", "tokens=60", "--mode", "sequential", "--json"]
    done = run_python(IMPORTS, *argv)
    status, heavy, seconds = done.stderr.splitlines()[-1].split(" ")
    assert (status, heavy) == ("0", "[]"), done.stderr
    assert float(seconds) < 2.5


def test_completion_knows_commands_flags_values_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "trace.txt").touch()

    def complete(*words: str) -> set[str]:
        function = "_shtab_sgl_apr"
        quoted = " ".join(f"'{word}'" for word in words)
        code = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; {function}; "
        done = subprocess.run(
            ["bash", "-c", code + 'printf "%s\\n" "${COMPREPLY[@]}"'],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        return set(done.stdout.split())

    assert complete("sgl-apr", "ru") == {"run"}
    assert complete("sgl-apr", "serve", "--context-l") == {"--context-length"}
    assert complete("sgl-apr", "serve", "--apr-max-wi") == {"--apr-max-width"}
    assert complete("sgl-apr", "run", "--mode", "") == {"auto", "sequential", "parallel"}
    assert complete("sgl-apr", "parse", f"{tmp_path}/tr") == {f"{tmp_path}/trace.txt"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "context-length" in text
    if (program := shutil.which(shell)) is not None:
        script = tmp_path / "script"
        script.write_text(text)
        subprocess.run([program, "-n", str(script)], check=True, timeout=20)


def test_ctrl_c_is_status_130_without_a_traceback(tmp_path: Path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # a file that nobody writes, so the command waits
    with subprocess.Popen(
        [sys.executable, "-m", "sgl_apr.cli.main", "parse", str(fifo)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, such as this test run may be one of, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        writer = os.open(fifo, os.O_WRONLY)  # returns when the command has opened it
        try:
            time.sleep(0.1)
            command.send_signal(signal.SIGINT)
            _, err = command.communicate(timeout=30)
        finally:
            os.close(writer)
            command.kill()
    assert (command.returncode, err) == (130, "")


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"text": "plain text"}\n' * 1000)
    with subprocess.Popen(
        [sys.executable, "-m", "sgl_apr.cli.main", "parse", str(path), "--json", "--jobs", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert command.stdout is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr is not None
        err = command.stderr.read()
        assert command.wait(30) == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
