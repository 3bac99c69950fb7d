"""A sandbox from outside: it is started, asked, and ended in time; nothing that comes out of it is trusted."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sgl_apr.errors import SandboxUnavailable

LINE = 8 << 20  # bytes of the longest message that is read
START_S, END_S = 20.0, 10.0
MOST = 10_000  # texts that a program asks about at once
Answer = Callable[[list[str], bool], Awaitable[list[str]]]  # whether each is for one that writes programs


@dataclass(frozen=True, slots=True)
class Limits:
    """What programs may take.

    seconds: of one block, without those that a model takes to answer it. cpu: of all blocks together. memory: bytes,
    the interpreter's own included. output: characters of what a block prints that are kept (20,000: published code of
    RLM).
    """

    seconds: float = 10.0
    cpu: int = 120
    memory: int = 1 << 29
    output: int = 20_000


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a block came to: what it printed, and the answer that it gave, if any."""

    output: str
    final: str | None = None


class SandboxDied(Exception):
    """The sandbox has ended, with all of its variables; the message says why."""


class Sandbox:
    """An interpreter for blocks of Python, which hold `variables` and share what they make. Use it with `async with`.

    A program may ask for what a model says, which `answer` finds. Where a block takes too long, too much, or breaks
    the interpreter, that is ended; the next block finds a new one. Raises `SandboxUnavailable` where programs cannot
    be shut in: they never run otherwise.
    """

    def __init__(self, variables: dict[str, str], answer: Answer, limits: Limits | None = None) -> None:
        self.variables, self.answer, self.limits = variables, answer, limits or Limits()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Sandbox:
        try:
            await self._started()
        except BaseException:
            await asyncio.shield(self.end())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self.end())

    async def run(self, code: str) -> RunResult:
        """Run one block."""
        try:
            said = await self._exchange({"run": code})
        except SandboxDied as lost:
            return RunResult(f"{lost}; its variables are lost")
        output, chars, final = said.get("output", ""), said.get("chars"), said.get("final")
        text = _clean(output)[: self.limits.output]
        if isinstance(chars, int) and chars > len(text):
            text += f"... + [{chars - len(text)} chars...]"
        return RunResult(text, None if final is None else _clean(final))

    async def value(self, name: str) -> str | None:
        """A variable as text; None if there is none of that name."""
        try:
            value = (await self._exchange({"value": name})).get("value")
        except SandboxDied:
            return None
        return None if value is None else _clean(value)

    async def end(self) -> None:
        """End it, with all that runs in it."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        try:
            async with asyncio.timeout(END_S):
                while await process.stdout.read(LINE):  # its end: nobody is left who could write
                    pass
        except TimeoutError:
            pass
        await process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process and self._process.returncode is None:
            return self._process
        await self.end()
        if sys.platform != "linux":
            raise SandboxUnavailable(f"programs are shut in by Linux's namespaces, found {sys.platform}")
        walls = {name: value for name, value in asdict(self.limits).items() if name != "seconds"}
        start = (
            "import sys; sys.path.append(sys.argv[1]); from sandbox.jail import ResourceLimits, main; "
            f"main({os.getpid()}, ResourceLimits(**{walls}))"
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", start, str(Path(__file__).parents[1]),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={}, cwd="/", limit=LINE, start_new_session=True,
        )  # fmt: skip
        try:
            said = await self._said(self._process, START_S)
            error = None if said.get("ready") else said.get("error")
        except SandboxDied as lost:
            said, error = {}, f"{lost}"
        if not said.get("ready"):
            await self.end()
            raise SandboxUnavailable(f"programs cannot be shut in here: {_clean(error)}")
        try:
            await self._exchange({"set": self.variables})
        except SandboxDied as lost:
            raise SandboxUnavailable(
                f"the text does not fit into a sandbox of {self.limits.memory} bytes: {lost}"
            ) from None
        return self._process

    async def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """What it says to a message in the end; until then it may ask. Raises `Lost`, and it is over."""
        process, left = await self._started(), self.limits.seconds
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            try:
                said = await self._said(process, left, message)
                texts = _texts(said)
            except SandboxDied:
                await self.end()
                raise
            left -= clock() - began
            if texts is None:
                return said
            message = {"answers": await self.answer(texts, bool(said.get("deep")))}

    async def _said(
        self, process: asyncio.subprocess.Process, seconds: float, message: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert process.stdin
        assert process.stdout
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                if message is not None:
                    process.stdin.write(json.dumps(message).encode() + b"\n")
                    await process.stdin.drain()
                line = await process.stdout.readline()
            said = json.loads(line) if line else None
        except TimeoutError:
            raise SandboxDied(f"stopped: it took more than {self.limits.seconds:g} s") from None
        except OSError:
            raise SandboxDied("it ended") from None
        except (ValueError, RecursionError):
            raise SandboxDied("stopped: it wrote what is no message") from None
        if not isinstance(said, dict):
            raise SandboxDied("it ended" if said is None else "stopped: it wrote what is no message")
        return said


def _texts(said: dict[str, Any]) -> list[str] | None:
    """Those that a model is asked about; None if it is not. Raises `Lost` where that cannot be."""
    if "error" in said:
        raise SandboxDied("it ended")
    texts = said.get("query")
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SandboxDied("stopped: it wrote what is no message")
    if len(texts) > MOST:
        raise SandboxDied(f"stopped: it asked about more than {MOST} texts at once")
    return [*map(_clean, texts)]


def _clean(text: object) -> str:
    """As text that can be encoded; a program may make others."""
    return str(text).encode(errors="replace").decode()
