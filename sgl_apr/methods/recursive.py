"""Recursive language models: a model reads its prompt by programs that ask models about parts of it, or by fixed parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, CodeForbidden
from sgl_apr.methods.context_parts import answer_by_parts
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.sandbox.process import Sandbox, SandboxLimits
from sgl_apr.methods.session import MethodSession, method_session
from sgl_apr.methods.task import ProgramTask, Task, require_family
from sgl_apr.runtime.branch_group import gather

BY_PARTS = "recursive-by-parts"  # the label without programs
OPENING_FENCE, FENCE = re.compile(r"```repl[ \t]*\n"), "```"
FINAL = re.compile(r"^[ \t]*FINAL\(", re.MULTILINE)
END_OF_CALL = re.compile(r"\)[ \t]*$", re.MULTILINE)
FINAL_VAR = re.compile(r"^[ \t]*FINAL_VAR\([ \t]*[\"']?(\w+)[\"']?[ \t]*\)", re.MULTILINE)
QUERY_RULES = """
- llm_query(text): the reply of a language model that sees nothing but this text.
- llm_query_batched(texts): a list of replies, decoded in parallel."""
RECURSIVE_QUERY_RULES = """
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
answer, give it by one of the last two, in a program or on a line of its own after all blocks.

Question: {question}"""
NEXT_TURN = "REPL output:\n{output}\n\nGo on, or give the answer to the question: {question}"
NOTHING_RAN = "(nothing was run: write Python in a ```repl block, or the answer as FINAL(...))"
LAST_TURN = "Give the final answer to the question now, from what you know, and nothing else: {question}"


async def recursive(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    allow_code: bool = False,
    part_tokens: int | None = None,
    depth: int = 1,
    iterations: int = 30,
    queries: int = 100,
    concurrency: int = 16,
    reply_tokens: int = 1024,
    limits: SandboxLimits | None = None,
    **options: Any,
) -> MethodResult:
    """A recursive language model (RLM: Zhang 2025, arXiv 2512.24601, section 2, algorithm 1).

    The text of the problem is a variable of an interpreter. The model sees its length and its beginning, and writes
    programs that read it and ask models about parts of it. The model continues from what they print, truncated, until
    it or a program gives the answer. If neither does, it is asked for the answer, as in the published code. The prompts
    are shorter versions of those in that code.

    With `part_tokens` no program is written: the text is read in parts of that size, by sub-calls in parallel, whose
    notes are read in turn. The label of the result says so.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `ProgramTask`.
        allow_code: Whether programs of the model may run, in a sandbox.
        part_tokens: Tokens of a part that one sub-call reads. None lets programs cut the text.
        depth: 0: programs cannot ask models. 1: they can ask models that only reply (the paper's, section 3.2).
            More: also models that write programs themselves.
        iterations: Replies of each program-writing model, at most (30 in the published code).
        queries: Queries to models in total, at most (our choice).
        concurrency: Queries in parallel, at most (our choice).
        reply_tokens: Tokens of one reply, at most (our choice).
        limits: Limits of the programs.
        options: Those of `MethodSession`.

    Raises:
        CodeForbidden: Without `allow_code=True` or `part_tokens`.
        Inapplicable: If the task is no `ProgramTask`.
        SandboxUnavailable: If this machine cannot isolate programs.
    """
    programmable = require_family(task, ProgramTask)
    question, text = programmable.program(problem)
    if part_tokens is not None:
        if part_tokens < 1 or reply_tokens < 1:
            raise AprError(f"part_tokens={part_tokens}, reply_tokens={reply_tokens}, expected at least 1")
        async with method_session(engine, "", "recursive", **options) as session:
            answer = await answer_by_parts(
                session, programmable, question, text, part_tokens=part_tokens, reply_tokens=reply_tokens
            )
            return MethodResult("recursive", task.answer(answer.text), session.finish(), label=BY_PARTS)
    if not allow_code:
        raise CodeForbidden(
            "recursive runs Python that the model writes: pass allow_code=True, and a sandbox runs it; or part_tokens, "
            "and sub-calls read parts of that size"
        )
    minimums = (("depth", depth, 0), ("iterations", iterations, 1), ("concurrency", concurrency, 1))
    for name, value, minimum in minimums:
        if value < minimum:
            raise AprError(f"{name}={value}, expected at least {minimum}")
    limits = limits or SandboxLimits()
    rules = _rules(question, text, depth, limits)
    prompt = Prompt(programmable.chat_turn(rules), quoted=(rules,))
    async with method_session(engine, prompt, "recursive", **options) as session:
        run = _Run(session, programmable, iterations, queries, concurrency, reply_tokens, limits)
        final = await run.solve(session.root, question, text, depth)
        return MethodResult("recursive", task.answer(final) or final, session.finish())


@dataclass
class _Run:
    session: MethodSession
    task: ProgramTask[Any]
    iterations: int
    queries_left: int
    concurrency: int
    reply_tokens: int
    limits: SandboxLimits
    running: int = 0  # models that are writing programs now

    async def solve(self, completion: Completion, question: str, text: str, depth: int) -> str:
        """The answer of a model that continues after its prompt, with an interpreter of its own."""
        queried = list[Completion]()  # since its last reply

        async def answer(texts: list[str], deep: bool) -> list[str]:
            if depth == 0:
                return ["(there is no model to ask)"] * len(texts)
            return await self.query(completion, queried, texts, depth if deep else 1)

        self.running += 1
        try:
            async with Sandbox({"context": text}, answer, self.limits) as sandbox:
                prompt = Prompt()
                for _ in range(self.iterations):
                    completion = await self.session.continue_from(
                        completion, replace(prompt, tokens=self.next_reply_tokens)
                    )
                    if not completion.is_complete and not completion.text:
                        return ""
                    ran = await self.session.root.sequence.scope.run_until_cancelled(
                        self.run_blocks(sandbox, completion.text)
                    )
                    if ran is None:  # the time is up
                        return ""
                    output, final = ran
                    if final is not None:
                        return final
                    turn = NEXT_TURN.format(output=output, question=question)
                    next_turn = self.task.chat_turn(turn, first=False)
                    prompt = Prompt(next_turn, quoted=(turn,), depends_on=tuple(queried))
                    queried[:] = []
            turn = LAST_TURN.format(question=question)
            last_turn = self.task.chat_turn(turn, first=False)
            prompt = replace(prompt, text=last_turn, quoted=(turn,), tokens=self.next_reply_tokens)
            return (await self.session.continue_from(completion, prompt)).text
        finally:
            self.running -= 1

    @property
    def next_reply_tokens(self) -> int:
        """Tokens of one reply: an equal share for each model that is writing now."""
        left = self.session.requests.unreserved_tokens
        return max(1, min(self.reply_tokens, left // max(1, self.running)))

    async def run_blocks(self, sandbox: Sandbox, reply: str) -> tuple[str, str | None]:
        """Run the blocks of a reply: what they print, and the answer that they or the reply give."""
        (blocks, rest), outputs = split_blocks(reply), list[str]()
        for block in blocks:
            result = await sandbox.run(block)
            outputs.append(result.output)
            if result.final is not None:
                return "", result.final
        if variable := FINAL_VAR.search(rest):
            value = await sandbox.read_variable(variable[1])
            outputs.append(f"there is no variable {variable[1]}")
            return "\n".join(outputs), value
        return "\n".join(outputs) if blocks else NOTHING_RAN, final_call(rest)

    async def query(
        self, parent: Completion, queried: list[Completion], texts: Sequence[str], depth: int
    ) -> list[str]:
        """The replies of models to the texts, up to `concurrency` in parallel.

        They depend on the queries in `queried`, and are appended to it.
        """
        replies = list[str]()
        for k in range(0, len(texts), self.concurrency):
            batch = texts[k : k + self.concurrency][: self.queries_left]
            if not batch:
                break
            depends_on = (parent, *queried)
            self.queries_left -= len(batch)
            if depth > 1:
                answered = await gather(self.recurse(parent, depends_on, t, depth - 1) for t in batch)
            else:
                prompts = [
                    Prompt(
                        self.task.chat_turn(text), self.reply_tokens, quoted=(text,), depends_on=depends_on
                    )
                    for text in batch
                ]
                share = 1 - self.session.budget.reserve
                completions = await self.session.sample_independent(prompts, share=share, parent=parent)
                answered = [(c, c.text or f"(no answer: {c.finish})") for c in completions]
            queried += [completion for completion, _ in answered]
            replies += [text for _, text in answered]
        return replies + ["(no answer: no more queries)"] * (len(texts) - len(replies))

    async def recurse(
        self, parent: Completion, depends_on: tuple[Completion, ...], text: str, depth: int
    ) -> tuple[Completion, str]:
        """The answer of a model that writes programs about a text, which is also its question."""
        question = "what the text asks"
        rules = _rules(question, text, depth, self.limits)
        prompt = Prompt(self.task.chat_turn(rules), quoted=(rules,), depends_on=depends_on)
        (root,) = await self.session.prefill([prompt], parent=parent)
        return root, await self.solve(root, question, text, depth) or "(no answer)"


def _rules(question: str, text: str, depth: int, limits: SandboxLimits) -> str:
    more = (QUERY_RULES if depth else "") + (RECURSIVE_QUERY_RULES if depth > 1 else "")
    return RULES.format(length=len(text), begin=text[:80], output=limits.output, more=more, question=question)


def split_blocks(reply: str) -> tuple[list[str], str]:
    """The programs of a reply, and the reply without them. An open block is no program.

    Examples:
        >>> split_blocks("So:\\n```repl\\nprint(1)\\n```\\nFINAL(1)")
        (['print(1)'], 'So:\\n\\nFINAL(1)')
    """
    blocks, rest, position = list[str](), list[str](), 0
    while opening := OPENING_FENCE.search(reply, position):
        if (end := reply.find(FENCE, opening.end())) < 0:
            break
        blocks.append(reply[opening.end() : end].removesuffix("\n"))
        rest.append(reply[position : opening.start()])
        position = end + len(FENCE)
    return blocks, "".join([*rest, reply[position:]])


def final_call(text: str) -> str | None:
    """What FINAL(...) in a reply says, up to the last parenthesis that ends a line; None without one.

    Examples:
        >>> final_call("It is:\\n  FINAL(f(x) = (1 + 2))\\n")
        'f(x) = (1 + 2)'
    """
    opening, ends = FINAL.search(text), list(END_OF_CALL.finditer(text))
    if not opening or not ends or ends[-1].start() < opening.end():
        return None
    return text[opening.end() : ends[-1].start()].strip()
