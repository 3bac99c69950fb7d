"""The interpreter inside the sandbox. It runs blocks of Python that share their variables, and trusts none of them."""

from __future__ import annotations

import importlib
import io
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

NAME = "<repl>"
for module in (
    "binascii",
    "bz2",
    "hashlib",
    "lzma",
    "zlib",
):  # they need libraries that are unavailable later
    with suppress(ImportError):
        importlib.import_module(module)


class Output(io.TextIOBase):
    """Collects printed text.

    Attributes:
        max_chars: How many characters are stored.
        stored: The first `max_chars` characters.
        chars: How many characters were printed.
    """

    def __init__(self, max_chars: int) -> None:
        self.max_chars, self.stored, self.chars = max_chars, "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.stored += text[: max(0, self.max_chars - len(self.stored))]
        self.chars += len(text)
        return len(text)


class Repl:
    """Answers each message, a line of JSON, with another. Meanwhile, a program may query a model by messages of its own.

    Each message from outside has an id that cannot be guessed, and the response has the same id. A response with
    another id is not accepted.

    Args:
        received: Messages from outside.
        sent: Messages to the outside.
        max_chars: Characters of a block's output that are sent.
    """

    def __init__(self, received: TextIO, sent: TextIO, max_chars: int) -> None:
        self.received, self.sent, self.max_chars = received, sent, max_chars
        self.final: str | None = None
        self.id = ""
        self.scope: dict[str, Any] = {
            "__name__": "__main__",
            "llm_query": lambda text: self.query([text])[0],
            "llm_query_batched": lambda texts: self.query(texts),
            "rlm_query": lambda text: self.query([text], deep=True)[0],
            "rlm_query_batched": lambda texts: self.query(texts, deep=True),
            "FINAL": self.set_final,
            "FINAL_VAR": lambda name: self.set_final(
                self.scope.get(name, name) if isinstance(name, str) else name
            ),
        }

    def serve(self) -> None:
        """Answer messages until the input ends."""
        self.send({"ready": True})
        for line in self.received:
            message: dict[str, Any] = json.loads(line)
            self.id = message["id"]
            if "set" in message:
                self.scope.update(message["set"])
                self.send({})
            elif "run" in message:
                self.send(self.run(message["run"]))
            else:
                name = message["value"]
                self.send({"value": str(self.scope[name]) if name in self.scope else None})

    def run(self, code: str) -> dict[str, Any]:
        """Run a block: its output, errors included, and the answer if it gives one."""
        output, self.final = Output(self.max_chars), None
        sys.stdout = sys.stderr = output
        sys.stdin = io.StringIO()
        try:
            exec(compile(code, NAME, "exec"), self.scope)
        except BaseException as error:
            trace = error.__traceback__.tb_next if error.__traceback__ else None
            output.write("".join(traceback.format_exception(type(error), error, trace)))
        return {"output": output.stored, "chars": output.chars, "final": self.final}

    def query(self, texts: Sequence[str], deep: bool = False) -> list[str]:
        """The replies of a model to the texts; `deep`: of one that can write programs about them."""
        self.send({"query": [str(text) for text in texts], "deep": deep})
        message: dict[str, Any] = json.loads(self.received.readline())
        self.id = message["id"]
        answers: list[str] = message["answers"]
        return answers

    def set_final(self, value: object) -> None:
        self.final = str(value)

    def send(self, message: dict[str, Any]) -> None:
        self.sent.write(json.dumps({**message, "id": self.id}) + "\n")
        self.sent.flush()
