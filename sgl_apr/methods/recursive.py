"""A model that writes programs which read its prompt and ask it about parts; where these run is `sgl_apr.methods.sandbox`'s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, CodeForbidden
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.sandbox.process import Limits, Sandbox
from sgl_apr.methods.session import MethodSession, gather, method_session
from sgl_apr.methods.task import Task

BLOCK = re.compile(r"```repl[ \t]*\n(.*?)\n?```", re.DOTALL)
FINAL = re.compile(r"^[ \t]*FINAL\((.*)\)[ \t]*$", re.DOTALL | re.MULTILINE)
FINAL_VAR = re.compile(r"^[ \t]*FINAL_VAR\([ \t]*[\"']?(\w+)[\"']?[ \t]*\)", re.MULTILINE)
ASK = """
- llm_query(text): what a language model that sees nothing else says to a text.
- llm_query_batched(texts): a list of that, all at once."""
DEEP = """
- rlm_query(text), rlm_query_batched(texts): the same, by a model that writes programs about the text as you do."""
RULES = """You answer a question about a text that is too long to be read at once. The text is in the variable \
`context` of a Python REPL: a string of {length} characters that begins with {begin!r}. You are asked again and again \
until you give the answer. Python that you write in a block like
```repl
print(context[:1000])
```
is run, and you are shown what it prints, the first {output} characters of it. Variables stay. There are also{more}
- FINAL(text), FINAL_VAR(name): gives the answer, itself or in a variable, and ends the work.
Look at the text first, cut it into parts, go through them, and keep what you find in variables. When you know the \
answer, give it by one of the last two, in a program or in a line of its own behind all blocks.

Question: {question}"""
AGAIN = "REPL output:\n{output}\n\nGo on, or give the answer to the question: {question}"
NOTHING = "(nothing was run: write Python in a ```repl block, or the answer as FINAL(...))"
LAST = "Give the final answer to the question now, from what you know, and nothing else: {question}"


async def recursive(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    allow_code: bool = False,
    depth: int = 1,
    iterations: int = 30,
    queries: int = 100,
    at_once: int = 16,
    turn: int = 1024,
    limits: Limits | None = None,
    **options: Any,
) -> MethodResult:
    """A recursive language model (RLM: Zhang 2025, arXiv 2512.24601, section 2, algorithm 1).

    The text is a variable of an interpreter; the model sees how long it is and how it begins, and writes programs
    that look into it and ask models about parts of it. What they print, cut, is what it goes on from, until it, or a
    program, gives the answer; else it is asked for one, as in the published code. Prompts are that code's, shorter.

    allow_code: runs what the model writes, in a sandbox; else `CodeForbidden` is raised. depth: 0 without models to
    ask, 1 with models that only answer (the paper's, section 3.2), more with such that write programs themselves.
    iterations: replies of each at most (30: published code). queries: to models in all, at_once: of those together,
    turn: tokens of one reply; these three are ours. limits: of the programs.
    """
    question, text = task.program(problem)
    if not allow_code:
        raise CodeForbidden(
            "recursive runs Python that the model writes: pass allow_code=True, and a sandbox runs it"
        )
    for name, value, least in (("depth", depth, 0), ("iterations", iterations, 1), ("at_once", at_once, 1)):
        if value < least:
            raise AprError(f"{name}={value}, expected at least {least}")
    limits = limits or Limits()
    prompt = task.chat_turn(_rules(question, text, depth, limits))
    async with method_session(engine, prompt, "recursive", **options) as thoughts:
        run = _Run(thoughts, task, iterations, queries, at_once, turn, limits)
        final = await run.answered(thoughts.root, question, text, depth)
        return MethodResult("recursive", task.answer(final) or final, thoughts.finish())


@dataclass
class _Run:
    thoughts: MethodSession
    task: Task[Any, Any]
    iterations: int
    queries: int  # that are left
    at_once: int
    turn: int
    limits: Limits
    running: int = 0  # models that write programs now

    async def answered(self, thought: Completion, question: str, text: str, depth: int) -> str:
        """What a model comes to that goes on behind its prompt, with an interpreter of its own."""
        asked = list[Completion]()  # since its last reply

        async def answer(texts: list[str], deep: bool) -> list[str]:
            if depth == 0:
                return ["(there is no model to ask)"] * len(texts)
            return await self.asked(thought, asked, texts, depth if deep else 1)

        self.running += 1
        try:
            async with Sandbox({"context": text}, answer, self.limits) as sandbox:
                ask = Prompt()
                for _ in range(self.iterations):
                    thought = await self.thoughts.continue_from(thought, replace(ask, tokens=self.tokens))
                    if not thought.is_complete and not thought.text:
                        return ""
                    ran = await self.thoughts.run_until_deadline(self.ran(sandbox, thought.text))
                    if ran is None:  # the time is up
                        return ""
                    output, final = ran
                    if final is not None:
                        return final
                    said = self.task.chat_turn(AGAIN.format(output=output, question=question), first=False)
                    ask, asked[:] = Prompt(said, depends_on=tuple(asked)), []
            last = self.task.chat_turn(LAST.format(question=question), first=False)
            return (
                await self.thoughts.continue_from(thought, replace(ask, text=last, tokens=self.tokens))
            ).text
        finally:
            self.running -= 1

    @property
    def tokens(self) -> int:
        """Of one reply, so that those who write at the same time have as much."""
        left = self.thoughts.requests.left
        return max(1, min(self.turn, left // max(1, self.running)))

    async def ran(self, sandbox: Sandbox, reply: str) -> tuple[str, str | None]:
        """What the blocks of a reply print, and the answer that they or it give."""
        blocks, outputs = BLOCK.findall(reply), list[str]()
        for block in blocks:
            found = await sandbox.run(block)
            outputs.append(found.output)
            if found.final is not None:
                return "", found.final
        rest = BLOCK.sub("", reply)
        if named := FINAL_VAR.search(rest):
            value = await sandbox.value(named[1])
            outputs.append(f"there is no variable {named[1]}")
            return "\n".join(outputs), value
        given = FINAL.search(rest)
        return "\n".join(outputs) if blocks else NOTHING, given[1].strip() if given else None

    async def asked(
        self, at: Completion, asked: list[Completion], texts: Sequence[str], depth: int
    ) -> list[str]:
        """What models say to each of the texts, some of them at once; behind those asked before, to which they come."""
        found = list[str]()
        for k in range(0, len(texts), self.at_once):
            part, after = texts[k : k + self.at_once][: self.queries], (at, *asked)
            if not part:
                break
            self.queries -= len(part)
            if depth > 1:
                said = await gather(self.deeper(at, after, text, depth - 1) for text in part)
            else:
                asks = [
                    Prompt(self.task.chat_turn(text), tokens=self.turn, depends_on=after) for text in part
                ]
                thoughts = await self.thoughts.sample_independent(
                    asks, of=1 - self.thoughts.budget.reserve, at=at
                )
                said = [(thought, thought.text or f"(no answer: {thought.finish})") for thought in thoughts]
            asked += [thought for thought, _ in said]
            found += [text for _, text in said]
        return found + ["(no answer: no more queries)"] * (len(texts) - len(found))

    async def deeper(
        self, at: Completion, after: tuple[Completion, ...], text: str, depth: int
    ) -> tuple[Completion, str]:
        """What one says that writes programs about a text, which is also its question."""
        question = "what the text asks"
        prompt = self.task.chat_turn(_rules(question, text, depth, self.limits))
        (begun,) = await self.thoughts.prefill([Prompt(prompt, depends_on=after)], at=at)
        return begun, await self.answered(begun, question, text, depth) or "(no answer)"


def _rules(question: str, text: str, depth: int, limits: Limits) -> str:
    more = (ASK if depth else "") + (DEEP if depth > 1 else "")
    return RULES.format(length=len(text), begin=text[:80], output=limits.output, more=more, question=question)
