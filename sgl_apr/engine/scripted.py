"""An engine that answers from a script, to test programs on replies that a real model rarely produces."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sgl_apr.engine.base import GroupRequest, Load, Request, Result, TokenSink, WorkerSink
from sgl_apr.engine.chat_template import encode_by_template
from sgl_apr.errors import EngineError, UnsupportedEngine
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer, check_encodable
from sgl_apr.trajectory.calls import TopLogprobs
from sgl_apr.trajectory.worker_groups import GroupKind


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, 256 as end of text, and one id for each tag given.

    Examples:
        >>> ByteTokenizer(["<Thread>"]).encode("a<Thread>")
        [97, 257]
    """

    EOS = 256

    def __init__(self, tags: Sequence[str] = ()) -> None:
        self._eos_ids = frozenset({self.EOS})
        self._tags = {tag: self.EOS + 1 + i for i, tag in enumerate(tags)}
        self._bytes = [*(bytes([i]) for i in range(self.EOS)), b"", *(tag.encode() for tag in tags)]
        pattern = "|".join(map(re.escape, filter(None, self._tags)))
        self._any_tag = re.compile(f"({pattern})") if pattern else None

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        check_encodable(text)
        ids: list[int] = []
        # A pattern with one group: text and tags alternate.
        for index, piece in enumerate(self._any_tag.split(text) if self._any_tag else [text]):
            if index % 2:
                ids.append(self._tags[piece])
            else:
                ids += piece.encode()
        return ids

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def special_token_id(self, tag: str) -> int | None:
        return self._tags.get(tag)

    @property
    def added_tokens(self) -> Mapping[str, int]:
        return self._tags

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._bytes)


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of the script to one request.

    Attributes:
        text: What is decoded.
        end: Whether to append the end-of-text id. It is left out if the text ends with a stop or is cut by the token
            limit.
        delay: Seconds before every token.
        error: Raised after the text.
        logprob: The log-probability of every token, if it is requested.
        top_logprobs: The most likely tokens in the place of every token, if they are requested.
    """

    text: str = ""
    end: bool = True
    delay: float = 0.0
    error: Exception | None = None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None


Script = Callable[[Request, str], Reply | str]


class ScriptedEngine:
    """Answers every request with `script(request, prompt text)` and applies token limits and stops.

    `cached_tokens` is counted as in a radix cache: the longest prefix that the prompt shares with an earlier request.

    Args:
        script: Returns the reply to a request.
        tokenizer: The tokenizer. By default a `ByteTokenizer`.
        supports_seeds: What the engine reports about seeds.
        groups: The kinds of groups that it decodes: the script answers each worker, and all write one token a step.

    Attributes:
        requests: The requests to decode so far, those of workers included.
        group_requests: The groups so far.
        commits: The ids committed so far.
        aborted: The request ids, or prefixes of them, that were aborted.
        active: The ids of running requests. It is empty at the end if no request was left running.
        loads: What `load` returns, if it is set.
        forks: The sizes of the forks so far.
        released: How often `release` was called.
    """

    def __init__(
        self,
        script: Script,
        tokenizer: Tokenizer | None = None,
        *,
        supports_seeds: bool = True,
        groups: Collection[GroupKind] = (),
    ) -> None:
        self.script, self.supports_seeds, self.groups = script, supports_seeds, groups
        self.group_requests: list[GroupRequest] = []
        self._tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        self.joins_kv, self.resumes_grammar, self.caches_output = False, True, False
        self.context: int | None = None
        self.vocab_size: int | None = getattr(self._tokenizer, "vocab_size", None)
        self.loads: Load | None = None
        self.requests: list[Request] = []
        self.commits: list[tuple[int, ...]] = []
        self.aborted: list[str] = []
        self.active: set[str] = set()
        self.forks: list[int] = []
        self.released = 0
        self._cache: list[tuple[int, ...]] = []

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def grammar_backend(self) -> GrammarBackend:
        return "llguidance"

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        cached = self._cached(request.input_ids)
        reply, ids, finish = self._reply(request)
        self.active.add(request.rid)
        try:
            for i in ids:
                await asyncio.sleep(reply.delay)
                if request.on_top_logprobs and reply.top_logprobs is not None:
                    request.on_top_logprobs([reply.top_logprobs])
                if on_tokens:
                    on_tokens([i])
            if reply.error:
                raise reply.error
        finally:
            self.active.discard(request.rid)
        self._cache.append(request.input_ids + ids)
        logprobs = None if reply.logprob is None or not request.logprobs else (reply.logprob,) * len(ids)
        top = (
            None
            if reply.top_logprobs is None or not request.top_logprobs
            else (reply.top_logprobs,) * len(ids)
        )
        return Result(ids, finish, len(request.input_ids), cached, logprobs, top)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of chat messages, rendered by `apply_chat_template` of the tokenizer.

        Raises:
            UnsupportedEngine: The tokenizer has no such method.
        """
        template = getattr(self._tokenizer, "apply_chat_template", None)
        return await encode_by_template(
            self._tokenizer, template, messages, tools, engine_name=type(self).__name__
        )

    async def group(
        self,
        group: GroupRequest,
        on_tokens: Sequence[TokenSink | None] | None = None,
        on_end: WorkerSink | None = None,
    ) -> Sequence[Result | EngineError]:
        """Answer each worker by the script. In each step every worker that has not ended gets one token."""
        if group.kind not in self.groups:
            raise UnsupportedEngine(f"this engine does not decode groups of kind {group.kind}")
        self.group_requests.append(group)
        requests, sinks = group.requests, on_tokens or [None] * len(group.requests)
        cached = [self._cached(request.input_ids) for request in requests]
        replies = [self._reply(request) for request in requests]
        outcomes: dict[int, Result | EngineError] = {}
        rids = {request.rid: number for number, request in enumerate(requests)}
        self.active |= rids.keys()
        try:
            step = 0
            while len(outcomes) < len(requests):
                await asyncio.sleep(max(r.delay for k, (r, *_) in enumerate(replies) if k not in outcomes))
                for number, request in enumerate(requests):
                    if number in outcomes:
                        continue
                    reply, ids, finish = replies[number]
                    is_aborted = any(request.rid.startswith(rid) for rid in self.aborted)
                    if not is_aborted and step < len(ids):
                        if sink := sinks[number]:
                            sink([ids[step]])
                        if step + 1 < len(ids) or reply.error:
                            continue
                    if is_aborted:
                        outcomes[number] = EngineError("the request was aborted")
                    elif reply.error is not None and not isinstance(reply.error, EngineError):
                        raise reply.error
                    else:
                        length = len(request.input_ids)
                        outcomes[number] = reply.error or Result(ids, finish, length, cached[number])
                    self.active.discard(request.rid)
                    if on_end:
                        on_end(number, outcomes[number])
                step += 1
        finally:
            self.active -= rids.keys()
        return [outcomes[number] for number in range(len(requests))]

    def _reply(self, request: Request) -> tuple[Reply, tuple[int, ...], Literal["stop", "length"]]:
        """Return what the script answers, its ids without those that the request continues, and how it ends."""
        self.requests.append(request)
        prompt = request.input_ids[: len(request.input_ids) - request.resumed_tokens]
        reply = self.script(request, self._tokenizer.decode(prompt))
        reply = Reply(reply) if isinstance(reply, str) else reply
        ids, finish = self._limited(request, reply)
        return reply, ids[request.resumed_tokens :], finish

    def _limited(self, request: Request, reply: Reply) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
        ids: list[int] = []
        for i in self._tokenizer.encode(reply.text):
            ids.append(i)
            if i in request.stop_ids or (
                request.stop and self._tokenizer.decode(ids).endswith(tuple(request.stop))
            ):
                return tuple(ids), "stop"
            if len(ids) == request.resumed_tokens + request.max_tokens:
                return tuple(ids), "length"
        return (*ids, *([min(self._tokenizer.eos_ids)] if reply.end else [])), "stop"

    def _cached(self, ids: tuple[int, ...]) -> int:
        def common(known: tuple[int, ...]) -> int:
            return next(
                (k for k, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b),
                min(len(ids), len(known)),
            )

        return min(max(map(common, self._cache), default=0), len(ids) - 1)

    async def commit(self, request: Request) -> Result:
        ids = request.input_ids
        self.commits.append(ids)
        result = Result((), "length", len(ids), self._cached(ids))
        self._cache.append(ids)
        return result

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[ScriptedEngine]]:
        self.forks.append(size)
        return await self.commit(request), [self] * size

    async def release(self) -> None:
        self.released += 1

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def load(self) -> Load:
        return self.loads or Load(
            running=len(self.active), waiting=0, used_tokens=sum(map(len, self._cache)), max_tokens=1 << 30
        )
