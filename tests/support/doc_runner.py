"""Pages of Markdown as programs: their blocks, and what runs them and compares what they print; it says nothing of their prose.

- `python` blocks run in order in one namespace per page, `await` and all, as in a notebook.
- `bash` blocks run line by line through the command line; options are checked of what is `not run`.
- A `text` block behind one of these is what it prints; "..." stands for any text.
- A block with a title is written to that file.
- `<!-- not run: REASON -->` before a block: it needs what a test has not. It has to be whole all the same.
- `<!-- server: FIXTURE -->` anywhere: http://127.0.0.1:30000 is that server, and so is `--model builtin`.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import doctest
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sgl_apr.cli import main as cli
from sgl_apr.formats.grammar import Grammar
from sgl_apr.server.api.apr_routes import APR_PATHS
from sgl_apr.server.api.config import parse_api_arguments
from sgl_apr.server.launch.secret_options import SECRET_OPTIONS
from sgl_apr.training.models import locate_model
from tests.support.paths import DOCS, ROOT

PAGES = sorted(DOCS.rglob("*.md"))
URL = "http://127.0.0.1:30000"
FENCE = re.compile(
    r'^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
SERVER = re.compile(r"<!-- server: (\w+) -->")
LINKED = ("examples", "benchmarks", "configs", "grammars")  # where commands look for them
PRINTS = ("python", "bash")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. prints: what follows it as its output. why: why it is not run."""

    page: str
    line: int
    language: str
    text: str
    file: str | None
    why: str | None
    prints: str | None

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(path: Path) -> list[Block]:
    """Those of a page, in order."""
    page, found = path.read_text(encoding="utf-8"), list[Block]()
    fences = [*FENCE.finditer(page)]
    for fence, behind in zip(fences, [*fences[1:], None], strict=False):
        output = behind and behind["language"] == "text" and not page[fence.end() : behind.start()].strip()
        prints = behind["text"] if behind and output and fence["language"] in PRINTS else None
        line = page.count("\n", 0, fence.start()) + 1
        found.append(
            Block(path.name, line, fence["language"], fence["text"], fence["file"], fence["why"], prints)
        )
    assert len(fences) == len(re.findall(r"^\s*```\w", page, re.MULTILINE)), (
        f"{path.name}: a fence that is not read"
    )
    return found


def name(page: Path) -> str:
    """As a test is called by it."""
    return str(page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT))


def server_of(path: Path) -> str | None:
    """The fixture that a page talks to."""
    found = SERVER.search(path.read_text(encoding="utf-8"))
    return found[1] if found else None


def run(page: Path, directory: Path, url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in a directory of its own."""
    monkeypatch.chdir(directory)
    running = Run(directory, url)
    try:
        for block in blocks(page):
            running.block(block)
    finally:
        running.loop.close()


class Run:
    """A page that is run, in a directory of its own."""

    def __init__(self, directory: Path, url: str | None) -> None:
        self.directory, self.url, self.loop = directory, url, asyncio.new_event_loop()
        self.names: dict[str, Any] = {"__name__": "__main__"}
        for name in LINKED:
            (directory / name).symlink_to(ROOT / name)
        (directory / "my-model").symlink_to(locate_model("builtin"))

    def block(self, block: Block) -> None:
        """Run or check one, and compare what it prints; an AssertionError says where."""
        if block.file:
            (self.directory / block.file).write_text(block.text)
        check = getattr(self, f"_{block.language}", None)
        assert check, f"{block}: nobody knows how to check {block.language}"
        printed = check(block)
        if block.prints is not None and not block.why:
            compared(printed.rstrip(), block.prints.rstrip(), block)

    def _python(self, block: Block) -> str:
        text = "\n" * block.line + self._here(block.text)
        code = compile(text, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if block.why:
            return ""
        with redirect_stdout(io.StringIO()) as printed:
            if code.co_flags & inspect.CO_COROUTINE:
                self.loop.run_until_complete(eval(code, self.names))
            else:
                exec(code, self.names)
        return printed.getvalue()

    def _bash(self, block: Block) -> str:
        return "".join(
            checked(words, block) if block.why else self._command(words, block)
            for words in commands(block.text)
        )

    def _command(self, words: list[str], block: Block) -> str:
        checked(words, block)
        if words[:2] == ["sgl-apr", "serve"]:  # it runs: see `server_of`
            assert self.url, f"{block}: no server, expected <!-- server: FIXTURE -->"
            return ""
        words = [self._here(word) for word in words]
        words, out = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
        if "--model" in words and words[words.index("--model") + 1] == "builtin" and self.url:
            at = words.index("--model")
            words[at : at + 2] = ["--url", self.url]
        if words[0] == "sgl-apr":
            with redirect_stdout(io.StringIO()) as said:
                status = cli.main(words[1:])
            printed = said.getvalue()
        else:
            assert words[0] == "python", f"{block}: nobody knows how to run {words[0]}"
            done = subprocess.run(
                [sys.executable, *words[1:]], capture_output=True, text=True, timeout=200, check=False
            )
            printed, status = done.stdout, done.returncode
        assert status == 0, f"{block}: {shlex.join(words)}: status {status}"
        if out:
            (self.directory / out).write_text(printed)
        return "" if out else printed

    def _here(self, text: str) -> str:
        """With the address of the server that a test has."""
        return text.replace(URL, self.url) if self.url else text

    def _text(self, block: Block) -> str:
        return ""

    def _lark(self, block: Block) -> str:
        Grammar(block.text, str(block))
        return ""

    def _json(self, block: Block) -> str:
        json.loads(block.text)
        return ""

    def _toml(self, block: Block) -> str:
        tomllib.loads(block.text)
        return ""


def compared(found: str, expected: str, block: Block) -> None:
    """With "..." for any text, and lines without spaces at their ends."""
    found, expected = (
        "\n".join(line.rstrip() for line in text.splitlines()) + "\n" for text in (found, expected)
    )
    same = doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS)
    assert same, f"{block} prints\n{found}\nand not\n{expected}"


def commands(text: str) -> list[list[str]]:
    """The commands of a block as words, without comments, loops and what is in the background."""
    found = list[list[str]]()
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\s*for .*; do$|^\s*done$", "", line.strip())
        line = re.sub(r"\$\(sgl-apr model builtin\)", locate_model("builtin"), line)
        words = shlex.split(re.sub(r"\$\(sgl-apr model (\w+)\)", r"\1", line), comments=True)
        while words and "=" in words[0]:  # of the environment
            words = words[1:]
        if words:
            found.append(words[:-1] if words[-1] == "&" else words)
    return found


def checked(words: list[str], block: Block) -> str:
    """That a command and its options exist; it is not run."""
    words = words[: words.index(">")] if ">" in words else words
    flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    match words:
        case ["sgl-apr", "serve", *rest]:
            _, left = parse_api_arguments(rest)
            known_flags = sglang_flags() | {option.file_flag for option in SECRET_OPTIONS}
            unknown = {w.partition("=")[0] for w in left if w.startswith("--")} - known_flags
        case ["sgl-apr", *rest]:
            try:
                cli.build_parser().parse_args(rest)
            except SystemExit:
                raise AssertionError(f"{block}: {shlex.join(words)} is not what the command takes") from None
            return ""
        case ["python", "-m", "sglang_router.launch_router", *_]:
            unknown = flags - router_flags()
        case ["python" | "accelerate" | "torchrun" | ".venv-trl/bin/python", *rest]:
            if rest[0] == "-m" and rest[1].startswith(("benchmarks.", "sgl_apr.")):
                module = rest[1].replace(".", "/")
                rest = [f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py", *rest[2:]]
            script = next(word for word in rest if word.endswith(".py"))
            text = (ROOT / script).read_text()
            unknown = {f for f in flags if f'"{f}"' not in text and f" {f}" not in text}
        case ["python3", "-m", "venv", ".venv", "&&", "source", ".venv/bin/activate"]:
            unknown = set()
        case ["mkdir", _, "&&", "tar", *_]:
            unknown = set()
        case ["bash", script, *_]:  # further arguments are for verl, whose configuration is not here
            unknown = set() if (ROOT / script).is_file() else {script}
        case ["export", assignment]:
            name = assignment.partition("=")[0]
            constants = (ROOT / "sgl_apr/server/constants.py").read_text()
            unknown = set() if f'"{name}"' in constants else {name}
        case ["sh", "bundle/run.sh", *_]:  # of benchmarks.gpu_bundle
            script = (ROOT / "benchmarks/gpu_acceptance.py").read_text()
            unknown = {f for f in flags if f'"{f}"' not in script}
        case ["curl", url, *_]:
            routes = (ROOT / "sgl_apr/server/api/install.py").read_text()
            unknown = {
                path for path in [urlsplit(url).path] if f'"{path}"' not in routes and path not in APR_PATHS
            }
            unknown |= flags
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown = {t for t in targets if "=" not in t} - set(known)
        case ["pip", "install", *what]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = {extra for word in what for extra in re.findall(r"(?:sgl-apr|\.)\[(\w+)\]", word)}
            unknown = extras - set(project["optional-dependencies"])
        case _:
            raise AssertionError(f"{block}: nobody knows how to check {words[0]}")
    assert not unknown, f"{block}: {shlex.join(words)}: there is no {', '.join(sorted(unknown))}"
    return ""


@cache
def sglang_flags() -> set[str]:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return set(parser._option_string_actions)


@cache
def router_flags() -> set[str]:
    from sglang_router.router_args import RouterArgs

    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return set(parser._option_string_actions) | {"--host", "--port"}
