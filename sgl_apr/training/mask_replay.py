"""Replay the masks of grammars on tokens that a server decoded under them, for log-probabilities as the server has them.

It does not apply masks to logits: `sgl_apr.training.ppo` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par_with_draft_tokens
from transformers import AutoTokenizer

from sgl_apr.engine.base import Request, Result, TokenSink
from sgl_apr.engine.http import HttpEngine
from sgl_apr.errors import AprError, UnsupportedEngine
from sgl_apr.training.training_tree import TrainingTree
from sgl_apr.training.trie import FlatTree, Ints
from sgl_apr.trajectory.trajectory import Trajectory

UNMASKED = 0  # number of the mask that allows every token
BITS = 32  # tokens of one word of a mask


class RecordedGrammars:
    """The grammar of each call, by its prompt and its output."""

    def __init__(self) -> None:
        self._grammars: dict[bytes, str | None] = {}

    def add(self, request: Request, result: Result) -> None:
        """Record a request. One that continues another is recorded with the output of both."""
        begin = len(request.input_ids) - request.resumed_tokens
        output = (*request.input_ids[begin:], *result.token_ids)
        self._grammars[_key(request.input_ids[:begin], output)] = request.grammar

    def find(self, prompt: Sequence[int] | Ints, output: Sequence[int] | Ints) -> str | None:
        """The grammar of a call, None if it had none.

        Raises:
            AprError: If no such call was recorded.
        """
        try:
            return self._grammars[_key(prompt, output)]
        except KeyError:
            raise AprError(
                "the grammar of a call was not recorded, expected an engine that records it (RecordingEngine)"
            ) from None


def _key(prompt: Sequence[int] | Ints, output: Sequence[int] | Ints) -> bytes:
    length = np.asarray([len(prompt)], dtype=np.int32)
    return np.concatenate([length, np.asarray(prompt, np.int32), np.asarray(output, np.int32)]).tobytes()


class RecordingEngine(HttpEngine):
    """A server whose calls are recorded with their grammars.

    Attributes:
        grammars: Those of the calls so far.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.grammars = RecordedGrammars()

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        result = await super().decode(request, on_tokens)
        self.grammars.add(request, result)
        return result


class MaskReplay:
    """The masks of grammars for one model. Equal masks are kept once, and are referred to by number.

    Args:
        tokenizer: Directory or hub id of the model's tokenizer.
        vocabulary: Logits of the model.
        backend: The grammar backend of the server.

    Attributes:
        eos: Id of the token that ends a text under a grammar.

    Raises:
        UnsupportedEngine: If the grammar backend is not llguidance.
    """

    def __init__(self, tokenizer: str | Path, vocabulary: int, backend: str = "llguidance") -> None:
        if backend != "llguidance":
            raise UnsupportedEngine(f"masks of {backend} cannot be replayed, expected llguidance")
        self.vocabulary = vocabulary
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        self.eos: int = loaded.eos_token_id
        self._guide = from_tokenizer(loaded, n_vocab=vocabulary)
        self._executor = LLExecutor(1)
        self._matchers: dict[str, LLMatcher] = {}
        unmasked = allocate_token_bitmask(1, vocabulary)
        self._masks: list[npt.NDArray[np.int32]] = [unmasked[0]]
        self._numbers = {unmasked.tobytes(): UNMASKED}

    def replay(self, tree: TrainingTree, trajectory: Trajectory, grammars: RecordedGrammars) -> Ints:
        """The number of the mask under which each target of a tree was decoded, (m,).

        Calls without log-probabilities, such as aborted ones, count as unmasked.

        Args:
            tree: The training tree of the trajectory alone.
            trajectory: The trajectory.
            grammars: The grammars of its calls.

        Raises:
            AprError: If a call was not recorded, or its grammar does not allow what it decoded.
        """
        numbers = np.full(len(tree.targets), UNMASKED, dtype=np.int32)
        span_calls = np.asarray([-1 if s.call is None else s.call for s in trajectory.spans], dtype=np.int32)
        calls = span_calls[tree.spans]
        for call in np.unique(calls[calls >= 0]).tolist():
            if trajectory.calls[call].logprobs is None:
                continue
            own = np.flatnonzero(calls == call)
            output = tree.targets[own]
            grammar = grammars.find(visible_tokens(tree.tree, int(tree.sources[own[0]])), output)
            if grammar is not None:
                numbers[own] = self._numbers_of(grammar, output)
        return numbers

    def _numbers_of(self, grammar: str, output: Ints) -> list[int]:
        masks = allocate_token_bitmask(len(output) + 1, self.vocabulary)
        replayed = (self._matcher(grammar), 0, output.tolist())  # the matcher is as before afterwards
        fill_next_token_bitmask_par_with_draft_tokens(self._executor, [replayed], masks)
        masks = masks[:-1]  # nothing was decoded under the last one
        words, bits = np.divmod(output, BITS)
        if not ((masks[np.arange(len(output)), words] >> bits) & 1).all():
            raise AprError(
                "a grammar does not allow what was decoded under it: is it the tokenizer of the server?"
            )
        return [self._number(mask) for mask in masks]

    def _matcher(self, grammar: str) -> LLMatcher:
        if grammar not in self._matchers:
            self._matchers[grammar] = LLMatcher(self._guide, grammar)
        return self._matchers[grammar]

    def _number(self, mask: npt.NDArray[np.int32]) -> int:
        number = self._numbers.setdefault(mask.tobytes(), len(self._masks))
        if number == len(self._masks):
            self._masks.append(mask.copy())
        return number

    def allowed_tokens(self, numbers: torch.Tensor) -> torch.Tensor:
        """Whether masks allow tokens, (m, vocabulary), on the device of their numbers, (m,)."""
        unique, inverse = numbers.unique(return_inverse=True)
        words = torch.from_numpy(np.stack([self._masks[k] for k in unique.tolist()])).to(numbers.device)
        bits = (words.unsqueeze(-1) >> torch.arange(BITS, device=numbers.device)) & 1
        return bits.flatten(1)[:, : self.vocabulary].bool()[inverse]


def visible_tokens(tree: FlatTree, index: int) -> Ints:
    """The tokens that a token of a tree sees, its own included: the prompt of what it predicts."""
    visible = (np.arange(len(tree.token_ids)) <= index) & (tree.ends > index)
    joined, first, last = tree.joined.T
    visible[joined[(first <= index) & (index < last)]] = True
    return tree.token_ids[visible]
