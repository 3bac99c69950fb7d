"""A byte-level tokenizer with llguidance's masks, and an engine that samples from them, without a model or a server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache, lru_cache

import llguidance.numpy as masks
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sgl_apr as apr
from sgl_apr.engine.base import Load


class Masked:
    """A byte-level tokenizer, with or without tags as tokens, and its llguidance tokenizer."""

    def __init__(self, tags: tuple[str, ...]) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens(["<eos>", *tags])
        self.eos_ids = frozenset({self.backend.token_to_id("<eos>")})
        self.tags = tags
        self.guide = LLTokenizer(self.backend.to_str(), eos_token=self.backend.token_to_id("<eos>"))

    def special_token_id(self, tag: str) -> int | None:
        return self.backend.token_to_id(tag) if tag in self.tags else None

    @property
    def added_tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}

    def matcher(self, phase: str, **options) -> LLMatcher:
        dialect = options.pop("dialect", apr.dialect("threadweaver"))
        matcher = LLMatcher(self.guide, dialect.llguidance(phase, self, **options))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    @lru_cache(maxsize=4096)  # noqa: B019  # compiling takes most of the time of a reply
    def compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.guide, grammar)
        assert not matcher.is_error(), (matcher.get_error(), grammar)
        return matcher

    def accepts(self, phase: str, text: str, **options) -> bool:
        """Whether a text can be decoded, and decoding can end there."""
        matcher, ids = self.matcher(phase, **options), self.backend.encode(text).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(self.backend.encode(text).ids)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)


@cache
def masked(name: str, spelled: bool = False) -> Masked:
    """The tokenizer of a dialect, with its tags as tokens or spelled out."""
    return Masked(() if spelled else apr.dialect(name).tags)


class SampledEngine:
    """Samples every request from its mask; a tag is `tag_weight` times as likely as a byte."""

    grammar_backend = "llguidance"
    supports_seeds = True
    context: int | None = None
    resumes_grammar, caches_output = True, False

    def __init__(self, tokenizer: Masked, seed: int = 0, tag_weight: float = 30.0) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        self.size = tokenizer.backend.get_vocab_size()
        self.weights = np.ones(self.size)
        # Mostly letters, because random bytes are not text.
        for i in range(self.size):
            token = tokenizer.backend.id_to_token(i)
            if len(token) == 1 and not (
                (token.isascii() and (token.isalnum() or token in "<>/ ")) or token in "ĠĊ"
            ):
                self.weights[i] = 0.02
            if token in tokenizer.tags or token == "<eos>":
                self.weights[i] = tag_weight
        self.requests: list[apr.Request] = []

    async def decode(self, request: apr.Request, on_tokens=None) -> apr.Result:
        self.requests.append(request)
        matcher = self.tokenizer.compiled(request.grammar).deep_copy()
        resumed = request.input_ids[len(request.input_ids) - request.resumed_tokens :]
        assert matcher.consume_tokens(list(resumed)), matcher.get_error()
        bits = masks.allocate_token_bitmask(1, self.size)
        ids: list[int] = []
        while len(ids) < request.max_tokens:
            masks.fill_next_token_bitmask(matcher, bits)
            allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.size]
            odds = np.cumsum(self.weights * allowed)
            token = int(np.searchsorted(odds, self.random.random() * odds[-1], side="right"))
            ids.append(token)
            if on_tokens:
                on_tokens([token])
            if token in self.tokenizer.eos_ids or token in request.stop_ids:
                break
            assert matcher.consume_token(token), matcher.get_error()
        else:
            return apr.Result(tuple(ids), "length", len(request.input_ids), 0)
        return apr.Result(tuple(ids), "stop", len(request.input_ids), 0)

    async def commit(self, request: apr.Request) -> apr.Result:
        return apr.Result((), "length", len(request.input_ids), 0)

    async def fork(self, request: apr.Request, size: int):
        return await self.commit(request), [self] * size

    async def release(self) -> None:
        pass

    async def abort(self, rid: str) -> None:
        pass

    async def load(self) -> Load:
        return Load(running=0, waiting=0, used_tokens=0, max_tokens=1 << 30)
