"""A plain orchestrator with the OpenAI client and thread pools: one blocking request for each phase."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import openai

import sgl_apr as apr
from sgl_apr.tokenizer import Tokenizer

DIALECT = apr.dialect("threadweaver")


@dataclass(frozen=True, slots=True)
class Phase:
    """What a request of one phase carries beside its prompt.

    Attributes:
        grammar: For the grammar backend.
        max_tokens: Tokens that it may decode.
        stop_ids: Tokens that end it.
    """

    grammar: str | None
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The requests of a reply that forks once.

    Attributes:
        trunk: Up to the outlines.
        branches: By number.
        after: After the join. Its `max_tokens` are what the budget leaves if nothing was decoded before.
        eos: The end of text as text.
    """

    trunk: Phase
    branches: tuple[Phase, ...]
    after: Phase
    eos: str


async def make_plan(tokenizer: Tokenizer, options: Mapping[str, Any]) -> Plan:
    """Take grammars, limits and stop tokens from the requests that the runtime sends to an engine with a script.

    Args:
        tokenizer: Of the model, with the tags as tokens.
        options: Of `areason`, with a budget that has a width. Every fork has that width.
    """
    width = options["budget"].width

    def script(request: apr.Request, text: str) -> str:
        if text.endswith("?"):
            outlines = "".join(f"<Outline>{k + 1}: a</Outline>\n" for k in range(width))
            return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>"
        return "</Parallel>\nb" if text.endswith("</Thread>\n") else " a</Thread>"

    engine = apr.ScriptedEngine(script, tokenizer)
    trajectory = await apr.areason(engine, "?", DIALECT, pacing=None, **options)
    trunk, *branches, after = (Phase(r.grammar, r.max_tokens, r.stop_ids) for r in engine.requests)
    assert len(branches) == width
    assert DIALECT.is_valid(trajectory.text)
    decoded = sum(c.output_tokens for c in trajectory.calls if c.phase in ("trunk", "branch"))
    after = Phase(after.grammar, after.max_tokens + decoded, after.stop_ids)
    return Plan(trunk, tuple(branches), after, tokenizer.decode([min(tokenizer.eos_ids)]))


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, however it was made.

    Attributes:
        text: The reply.
        wall_s: Seconds from the start of its first request to the end of its last.
        phases: Seconds of trunk, branches (from the end of the trunk to the last of them) and the rest.
        decoded: Tokens decoded by trunk, branches and the request after the join.
        requests: How many requests it took.
        prompt_tokens: Tokens of their prompts.
        cached_tokens: How many of these were cached.
    """

    text: str
    wall_s: float
    phases: tuple[float, ...]
    decoded: tuple[int, ...]
    requests: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def is_valid(self) -> bool:
        return DIALECT.is_valid(self.text)


@dataclass(frozen=True, slots=True)
class Completion:
    """The response to one request."""

    text: str
    decoded: int
    prompt_tokens: int
    cached_tokens: int


class ThreadPoolOrchestrator:
    """Forks and joins with blocking requests in threads.

    Args:
        url: The server.
        plan: What its requests carry.
        questions: How many replies it makes at once.
    """

    def __init__(self, url: str, plan: Plan, questions: int) -> None:
        self.plan = plan
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200, max_retries=0)
        self._questions = ThreadPoolExecutor(questions)
        self._branches = ThreadPoolExecutor(len(plan.branches) * questions)

    def close(self) -> None:
        """Close its threads and connections."""
        self._questions.shutdown()
        self._branches.shutdown()
        self._client.close()

    def run(self, prompts: Sequence[str]) -> list[Reply]:
        """Reply to all prompts at once."""
        return list(self._questions.map(self.reason, prompts))

    def reason(self, prompt: str) -> Reply:
        """Decode the trunk, the branches in parallel, and the text after their concatenation."""
        started = time.perf_counter()
        trunk = self.complete(prompt, self.plan.trunk)
        forked = time.perf_counter()
        numbers = re.findall(r"<Outline>(\d+):", trunk.text)
        if not trunk.text.endswith("</Outlines>"):  # its limit cut it, so the reply is lost
            return make_reply(trunk.text, [started, forked], [trunk])
        text = f"{trunk.text}\n"
        headers = [f"<Thread>\n{number}:" for number in numbers]
        prompts = [prompt + text + header for header in headers]
        branches = list(self._branches.map(self.complete, prompts, self.plan.branches))
        joined = time.perf_counter()
        used = trunk.decoded
        for header, branch in zip(headers, branches, strict=True):
            closed = branch.text.endswith("</Thread>")
            text += f"{header}{branch.text}{'' if closed else '</Thread>'}"
            used += branch.decoded + (not closed)
        text += "\n"
        after = self.complete(prompt + text, self.plan.after, used)
        times = [started, forked, joined, time.perf_counter()]
        return make_reply(text + after.text, times, [trunk, *branches, after])

    def complete(self, prompt: str, phase: Phase, used: int = 0) -> Completion:
        """Send one request and wait for its response.

        Args:
            prompt: Everything so far.
            phase: What it decodes.
            used: Tokens of the phase's limit that were used before.
        """
        response = self._client.completions.create(
            model="default",
            prompt=prompt,
            max_tokens=phase.max_tokens - used,
            temperature=0,
            extra_body={
                "ebnf": phase.grammar,
                "stop_token_ids": list(phase.stop_ids),
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
        )
        text, usage = response.choices[0].text, response.usage
        assert usage
        assert usage.prompt_tokens_details, "the server needs --enable-cache-report"
        return Completion(
            text.removesuffix(self.plan.eos),
            usage.completion_tokens,
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens or 0,
        )


def make_reply(text: str, times: Sequence[float], completions: Sequence[Completion]) -> Reply:
    """A reply from its requests, and from the times at which its phases began and the last one ended."""
    return Reply(
        text,
        times[-1] - times[0],
        tuple(b - a for a, b in pairwise(times)),
        tuple(c.decoded for c in completions),
        len(completions),
        sum(c.prompt_tokens for c in completions),
        sum(c.cached_tokens for c in completions),
    )
