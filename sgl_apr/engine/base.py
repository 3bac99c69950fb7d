"""The interface between the loop and an engine: decode, commit, fork, group, abort and load, in token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from sgl_apr.engine.load import Load as Load
from sgl_apr.errors import AprError, EngineError
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.calls import TopLogprobs
from sgl_apr.trajectory.join_layout import Layout
from sgl_apr.trajectory.worker_groups import GroupKind

TokenSink = Callable[[Sequence[int]], None]  # receives the ids of each chunk as it arrives
LogprobSink = Callable[
    [Sequence[TopLogprobs]], None
]  # receives the most likely tokens in the places of a chunk
WorkerSink = Callable[
    [int, "Result | EngineError"], None
]  # receives how a worker has ended, by its number from 0


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
        on_top_logprobs: Receives `top_logprobs` of each chunk as it arrives, before `on_tokens` receives its ids.
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
    on_top_logprobs: LogprobSink | None = field(default=None, compare=False, repr=False)


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
class GroupRequest:
    """Requests of workers that decode together: each token of a worker sees the tokens of all workers so far.

    In decode step k every worker that has not ended reads its k-th token, and attends to the prompt, the headers, and
    the first k tokens of all workers. The others also see the last token of a worker, whatever ended it.

    Attributes:
        kind: "group_think" or "hogwild" (`sgl_apr.trajectory.GroupRecord`).
        requests: One for each worker. Their `input_ids` begin with the same prompt, and each has a header after it.
        prompt_tokens: Tokens of the prompt that they have in common. Commit it before.
        step_end: Text that ends a step of Hogwild!. The step then moves to the history that all workers share. None if
            steps do not end.

    Raises:
        AprError: The requests do not fit together.
    """

    kind: GroupKind
    requests: tuple[Request, ...]
    prompt_tokens: int
    step_end: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(GroupKind):
            raise AprError(
                f"the group has the kind {self.kind!r}, expected {' or '.join(get_args(GroupKind))}"
            )
        if not self.requests or self.prompt_tokens < 1:
            raise AprError("a group needs at least one worker, and a prompt of at least one token")
        if self.step_end is not None and (self.kind != "hogwild" or not self.step_end):
            raise AprError("step_end is for Hogwild!, expected None or a text that is not empty")
        if len({request.rid for request in self.requests}) < len(self.requests):
            raise AprError("two workers have the same request id")
        first = self.requests[0]
        for number, request in enumerate(self.requests):
            if what := _unfit_for_group(request, first, self.prompt_tokens):
                raise AprError(f"worker {number} {what}")

    @property
    def position_range(self) -> int:
        """The positions that each worker of Group Think gets: enough for the longest header and output, and the token
        that is sampled while the last one is read."""
        return 1 + max(len(r.input_ids) - self.prompt_tokens + r.max_tokens for r in self.requests)


def _unfit_for_group(request: Request, first: Request, prompt_tokens: int) -> str | None:
    """Return why a request cannot be a worker beside the first one."""
    if request.input_ids[:prompt_tokens] != first.input_ids[:prompt_tokens]:
        return f"begins with another prompt than worker 0, expected the same {prompt_tokens} tokens"
    if len(request.input_ids) <= prompt_tokens:
        return (
            f"has {len(request.input_ids)} tokens, expected a header after the {prompt_tokens} of the prompt"
        )
    if request.max_tokens < 1:
        return f"may decode {request.max_tokens} tokens, expected at least 1"
    if request.layout is not None or request.resumed_tokens:
        return "has a layout or continues another request, which a worker cannot"
    common = ("fields", "logprobs", "top_logprobs")
    differing = [name for name in common if getattr(request, name) != getattr(first, name)]
    return f"has other {differing[0]} than worker 0, expected the same" if differing else None


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

    @property
    def groups(self) -> Collection[GroupKind]:
        """The kinds of groups of workers that it decodes exactly (`group`). Empty if it decodes none."""
        ...

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        """Decode one request and pass its ids to `on_tokens` as they arrive.

        Without `on_tokens` nobody needs an id before the end, so the engine may transfer them in few large pieces.
        """
        ...

    async def group(
        self,
        group: GroupRequest,
        on_tokens: Sequence[TokenSink | None] | None = None,
        on_end: WorkerSink | None = None,
    ) -> Sequence[Result | EngineError]:
        """Decode the workers of a group together, until all have ended.

        Aborting the id of one worker ends it, and the others continue. Cancelling the call aborts all of them.

        Args:
            group: The requests.
            on_tokens: For each worker what receives its ids as they arrive.
            on_end: Called as soon as a worker has ended, with its number and its result or error.

        Returns:
            For each worker its result, or the error that ended it. What an aborted worker has decoded is in the ids
            that arrived.

        Raises:
            UnsupportedEngine: The engine does not decode groups of this kind.
            EngineError: The group failed before any worker had ended.
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
