"""The interpreter inside the sandbox: it runs blocks of Python that share their variables, and trusts none of them."""

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
for module in ("binascii", "bz2", "hashlib", "lzma", "zlib"):  # they need libraries that are not there later
    with suppress(ImportError):
        importlib.import_module(module)


class Output(io.TextIOBase):
    """What is printed: its first `most` characters, and how many there were."""

    def __init__(self, most: int) -> None:
        self.most, self.kept, self.chars = most, "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.kept += text[: max(0, self.most - len(self.kept))]
        self.chars += len(text)
        return len(text)


class Repl:
    """Answers each message, a line of JSON, with another; in between a program may ask what a model says."""

    def __init__(self, heard: TextIO, said: TextIO, most: int) -> None:
        self.heard, self.said, self.most = heard, said, most
        self.final: str | None = None
        self.scope: dict[str, Any] = {
            "__name__": "__main__",
            "llm_query": lambda text: self.ask([text])[0],
            "llm_query_batched": lambda texts: self.ask(texts),
            "rlm_query": lambda text: self.ask([text], deep=True)[0],
            "rlm_query_batched": lambda texts: self.ask(texts, deep=True),
            "FINAL": self.end,
            "FINAL_VAR": lambda name: self.end(self.scope.get(name, name) if isinstance(name, str) else name),
        }

    def serve(self) -> None:
        """Until nothing more is asked."""
        self.tell({"ready": True})
        for line in self.heard:
            message: dict[str, Any] = json.loads(line)
            if "set" in message:
                self.scope.update(message["set"])
                self.tell({})
            elif "run" in message:
                self.tell(self.run(message["run"]))
            else:
                name = message["value"]
                self.tell({"value": str(self.scope[name]) if name in self.scope else None})

    def run(self, code: str) -> dict[str, Any]:
        """What a block prints, errors included, and the answer, if it gives one."""
        output, self.final = Output(self.most), None
        sys.stdout = sys.stderr = output
        sys.stdin = io.StringIO()
        try:
            exec(compile(code, NAME, "exec"), self.scope)
        except BaseException as error:
            trace = error.__traceback__.tb_next if error.__traceback__ else None
            output.write("".join(traceback.format_exception(type(error), error, trace)))
        return {"output": output.kept, "chars": output.chars, "final": self.final}

    def ask(self, texts: Sequence[str], deep: bool = False) -> list[str]:
        """What a model says to each of them; `deep`: as one that can write programs about it."""
        self.tell({"query": [str(text) for text in texts], "deep": deep})
        answers: list[str] = json.loads(self.heard.readline())["answers"]
        return answers

    def end(self, value: object) -> None:
        self.final = str(value)

    def tell(self, message: dict[str, Any]) -> None:
        self.said.write(json.dumps(message) + "\n")
        self.said.flush()
