"""The interface between the loop and an engine: decode, commit, fork, abort and load, in token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.calls import TopLogprobs
from sgl_apr.trajectory.join_layout import Layout

TokenSink = Callable[[Sequence[int]], None]  # receives the ids of each chunk as it arrives


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        rid: The request id. It begins with the prefix of its trajectory, so that one abort reaches all requests of
            the trajectory.
        input_ids: The prompt.
        max_tokens: How many tokens to decode at most.
        sampling: Further sampling parameters, under SGLang's names.
        grammar: Text for the engine's grammar backend, or None.
        stop_ids: Tokens that end decoding. They stay in the output.
        stop: Strings that end decoding. They stay in the output. An engine may ignore them where the grammar ends at
            a stop string by itself, because a stop string can cut inside a token.
        layout: Which of the ids are branches that were decoded in parallel. None means that the prompt is one
            sequence. Engines that do not join in their cache (`joins_kv`) are sent no layout.
        logprobs: Whether to return the log-probabilities of the decoded tokens.
        top_logprobs: How many of the most likely tokens to return in the place of each, with their log-probabilities.
        resumed_tokens: How many of the last `input_ids` were decoded under `grammar`, by a request that its
            `max_tokens` cut. The grammar continues after them. Only for engines that resume (`resumes_grammar`), or
            without a grammar.
        fields: Further fields of the request (lora_path, cache_salt, ...), under SGLang's names.
    """

    rid: str
    input_ids: tuple[int, ...]
    max_tokens: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grammar: str | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    layout: Layout | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    resumed_tokens: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a request: the sampled ids and the engine's own counts.

    Attributes:
        token_ids: The ids as sampled, including a final stop token.
        finish: Why decoding ended.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt that were cached. None if the request was cut before the engine
            reported them.
        logprobs: The log-probabilities of `token_ids`, if they were requested.
        top_logprobs: For each of `token_ids` the most likely tokens in its place, if they were requested.
        weight_version: The engine's name for the weights that it used.
    """

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int | None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    weight_version: str | None = None

    def continued_by(self, further: Result) -> Result:
        """The result of this request and of one that continued it, as of one request.

        Its prompt is that of this request. What the other one had to compute again does not count as cached; the last
        token of a prompt is always computed.
        """
        cached = None
        if self.cached_tokens is not None and further.cached_tokens is not None:
            again = max(0, further.prompt_tokens - further.cached_tokens - 1)
            cached = max(0, self.cached_tokens - again)
        logprobs = None if further.logprobs is None else (*(self.logprobs or ()), *further.logprobs)
        top = None if further.top_logprobs is None else (*(self.top_logprobs or ()), *further.top_logprobs)
        return replace(
            self,
            token_ids=self.token_ids + further.token_ids,
            finish=further.finish,
            cached_tokens=cached,
            logprobs=logprobs,
            top_logprobs=top,
            weight_version=further.weight_version,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, in requests and KV tokens.

    Attributes:
        running: Requests that are running.
        waiting: Requests that are queued.
        used_tokens: KV tokens that running requests hold. Cached tokens that no request uses are not counted.
        max_tokens: Size of the KV cache, in tokens.
        max_running_requests: How many requests run at once at most, if the engine reports it.
        steps: (requests running, seconds of a decoding step), ascending. This client measures them, on its own
            requests only.
    """

    running: int
    waiting: int
    used_tokens: int
    max_tokens: int
    max_running_requests: int | None = None
    steps: tuple[tuple[float, float], ...] = ()

    @property
    def free_tokens(self) -> int:
        """KV tokens that another request could get, if need be by evicting tokens that are only cached.

        Requests that wait come first, and running requests still grow. Neither is subtracted.
        """
        return max(0, self.max_tokens - self.used_tokens)

    def step_s(self, running: int) -> float | None:
        """Estimate the seconds of a decoding step with `running` requests.

        Linear interpolation between the two nearest measurements. Below the lowest measurement, its value. Above the
        highest, the last line extended if it rises, but at most in proportion to the requests.

        Returns:
            Seconds, or None if too little was measured.
        """
        if not self.steps or (len(self.steps) == 1 and running > 2 * self.steps[0][0]):
            return None
        (lowest, seconds), slope = self.steps[0], 0.0
        if running <= lowest:
            return seconds
        for (low, before), (high, after) in pairwise(self.steps):
            slope = (after - before) / (high - low)
            if running <= high:
                return before + slope * (running - low)
        highest, seconds = self.steps[-1]
        return seconds + min(max(slope, 0.0), seconds / highest) * (running - highest)


class Engine(Protocol):
    """An engine, or one fork of it: each branch decodes through the engine that its fork returned.

    Cancelling a call aborts its request on the engine.

    Raises:
        EngineError: From every method, if the engine fails. Its status is `CACHE_MISS_STATUS` if the cache has
            lost tokens that a layout needs.
        EngineTimeout: If the engine does not answer in time.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the served model."""
        ...

    @property
    def grammar_backend(self) -> GrammarBackend:
        """The library that turns grammars into masks there."""
        ...

    @property
    def supports_seeds(self) -> bool:
        """Whether `sampling_seed` among the sampling parameters makes sampling repeatable."""
        ...

    @property
    def context(self) -> int | None:
        """The context length: tokens of a prompt and its output together, if the engine reports it."""
        ...

    @property
    def joins_kv(self) -> bool:
        """Whether requests may have a layout, so that branches join in the KV cache."""
        ...

    @property
    def caches_output(self) -> bool:
        """Whether its cache keeps what a request has decoded, so that branches may decode through the engine itself."""
        ...

    @property
    def resumes_grammar(self) -> bool:
        """Whether a request may continue under its grammar where another was cut (`Request.resumed_tokens`)."""
        ...

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        """Decode one request and pass its ids to `on_tokens` as they arrive.

        Without `on_tokens` nobody needs an id before the end, so the engine may transfer them in few large pieces.
        """
        ...

    async def commit(self, request: Request) -> Result:
        """Prefill the request's ids into the cache, without decoding."""
        ...

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[Engine]]:
        """Commit the request's ids once and return one engine per branch."""
        ...

    async def release(self) -> None:
        """Free what `fork` allocated for this branch."""
        ...

    async def abort(self, rid: str) -> None:
        """Abort every request whose id begins with `rid`. Never raises."""
        ...

    async def load(self) -> Load:
        """Return how busy the engine is."""
        ...


@runtime_checkable
class ChatEngine(Protocol):
    """An engine that renders the messages of a chat by the chat template of its model."""

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Sequence[int]:
        """Return the token ids of messages, up to where the reply begins.

        Text that users, tools and clients wrote has no added tokens, even where it spells them. The tags in an
        assistant's text stay tokens.

        Args:
            messages: The messages in OpenAI's form, also of the role "tool" and with `tool_calls`.
            tools: The tools in OpenAI's form, which the template shows to the model.

        Raises:
            UnsupportedEngine: The model has no chat template.
            AprError: The template refuses the messages.
        """
        ...
