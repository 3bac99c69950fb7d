"""A sandbox seen from outside: it starts the process, exchanges messages with it, and kills it in time.

Nothing that comes from the process is trusted.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sgl_apr.errors import SandboxUnavailable

MAX_MESSAGE_BYTES = 8 << 20
START_TIMEOUT_S, END_TIMEOUT_S = 20.0, 10.0
MAX_QUERIES = 10_000  # texts in one query of a program
NO_MESSAGE = "stopped: it wrote what is no message"
ENDED = "it ended"
# The process loads its modules under neutral names, so that no frame tells where they are on this machine.
START = """
import sys, types
package = sys.modules["sandbox"] = types.ModuleType("sandbox")
package.__path__ = []
for name in ("seccomp", "paths", "repl", "jail"):
    module = types.ModuleType("sandbox." + name)
    module.__package__ = "sandbox"
    sys.modules[module.__name__] = module
    setattr(package, name, module)
    with open(sys.argv[1] + "/" + name + ".py", encoding="utf-8") as file:
        exec(compile(file.read(), "<sandbox " + name + ">", "exec"), module.__dict__)
del package, file
module.main({parent}, module.ResourceLimits(**{limits}))
"""
Answer = Callable[[list[str], bool], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of the programs in a sandbox.

    Attributes:
        seconds: Wall time of one block, without the time that its queries to a model take.
        cpu: Seconds of CPU time of all blocks together.
        memory: Bytes of address space, including the interpreter's own.
        output: Characters of a block's output that are returned (20,000 in the published code of RLM).
    """

    seconds: float = 10.0
    cpu: int = 120
    memory: int = 1 << 29
    output: int = 20_000


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a block.

    Attributes:
        output: What it printed, errors included.
        final: The answer that it gave, None if it gave none.
    """

    output: str
    final: str | None = None


class SandboxDied(Exception):
    """The process in the sandbox has ended, and its variables are lost; the message says why."""


class Sandbox:
    """An interpreter for blocks of Python that share their variables. Use it with `async with`.

    When a block takes too much time or memory, or breaks the interpreter, the process is killed; the next block gets
    a new one.

    Args:
        variables: Variables that blocks can read, by name.
        answer: Answers the queries of programs to a model. It gets the texts, and whether the model may write
            programs about them; it returns one reply per text.
        limits: Limits of the programs.

    Raises:
        SandboxUnavailable: On entry, if this machine cannot isolate programs; they never run without isolation.
    """

    def __init__(
        self, variables: dict[str, str], answer: Answer, limits: SandboxLimits | None = None
    ) -> None:
        self.variables, self.answer, self.limits = variables, answer, limits or SandboxLimits()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Sandbox:
        try:
            await self._start()
        except BaseException:
            await asyncio.shield(self.close())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self.close())

    async def run(self, code: str) -> RunResult:
        """Run one block."""
        try:
            response = await self._exchange({"run": code})
        except SandboxDied as died:
            return RunResult(f"{died}; its variables are lost")
        output, chars, final = response.get("output"), response.get("chars"), response.get("final")
        if not (isinstance(output, str) and isinstance(chars, int) and isinstance(final, str | None)):
            await self.close()
            return RunResult(f"{NO_MESSAGE}; its variables are lost")
        text = _encodable(output)[: self.limits.output]
        if chars > len(text):
            text += f"... + [{chars - len(text)} chars...]"
        return RunResult(text, None if final is None else _encodable(final))

    async def read_variable(self, name: str) -> str | None:
        """A variable as text; None if there is none of that name."""
        try:
            value = (await self._exchange({"value": name})).get("value")
        except SandboxDied:
            return None
        return None if value is None else _encodable(value)

    async def close(self) -> None:
        """Kill the process, and everything that runs in it."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                while await process.stdout.read(
                    MAX_MESSAGE_BYTES
                ):  # ends once nobody is left who could write
                    pass
        except TimeoutError:
            pass
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        """The running process, a new one if it has ended."""
        if self._process and self._process.returncode is None:
            return self._process
        await self.close()
        if sys.platform != "linux":
            raise SandboxUnavailable(f"programs are isolated by Linux namespaces, found {sys.platform}")
        limits = {name: value for name, value in asdict(self.limits).items() if name != "seconds"}
        start = START.format(parent=os.getpid(), limits=limits)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", start, str(Path(__file__).parent),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={}, cwd="/", limit=MAX_MESSAGE_BYTES, start_new_session=True,
        )  # fmt: skip
        try:
            response = await self._receive(self._process, START_TIMEOUT_S)
            error = None if response.get("ready") else response.get("error")
        except SandboxDied as died:
            response, error = {}, f"{died}"
        if not response.get("ready"):
            await self.close()
            raise SandboxUnavailable(f"programs cannot be isolated here: {_encodable(error)}")
        try:
            await self._exchange({"set": self.variables})
        except SandboxDied as died:
            raise SandboxUnavailable(
                f"the text does not fit into a sandbox of {self.limits.memory} bytes: {died}"
            ) from None
        return self._process

    async def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message, answer queries, and return the response. Raises `SandboxDied` after killing the process."""
        process, left = await self._start(), self.limits.seconds
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            message_id = secrets.token_hex(16)
            try:
                response = await self._receive(process, left, {**message, "id": message_id})
                if response.get("id") != message_id:
                    raise SandboxDied(NO_MESSAGE)
                texts = _queries(response)
            except SandboxDied:
                await self.close()
                raise
            left -= clock() - started
            if texts is None:
                return response
            message = {"answers": await self.answer(texts, bool(response.get("deep")))}

    async def _receive(
        self, process: asyncio.subprocess.Process, seconds: float, message: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send a message, if any, and return the next one that comes back."""
        assert process.stdin
        assert process.stdout
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                if message is not None:
                    process.stdin.write(json.dumps(message).encode() + b"\n")
                    await process.stdin.drain()
                line = await process.stdout.readline()
            response = json.loads(line) if line else None
        except TimeoutError:
            raise SandboxDied(f"stopped: it took more than {self.limits.seconds:g} s") from None
        except OSError:
            raise SandboxDied(ENDED) from None
        except (ValueError, RecursionError):
            raise SandboxDied(NO_MESSAGE) from None
        if not isinstance(response, dict):
            raise SandboxDied(ENDED if response is None else NO_MESSAGE)
        return response


def _queries(response: dict[str, Any]) -> list[str] | None:
    """The texts that a program asks a model about; None if the response is no query."""
    if "error" in response:
        raise SandboxDied(ENDED)
    texts = response.get("query")
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SandboxDied(NO_MESSAGE)
    if len(texts) > MAX_QUERIES:
        raise SandboxDied(f"stopped: it asked about more than {MAX_QUERIES} texts at once")
    return [*map(_encodable, texts)]


def _encodable(text: object) -> str:
    """Text without lone surrogates, which a program can produce and UTF-8 cannot encode."""
    return str(text).encode(errors="replace").decode()
