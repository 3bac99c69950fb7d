"""The cached texts of log-probabilities are those that SGLang decodes."""

from __future__ import annotations

import inspect
import time
from types import SimpleNamespace

import pytest
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from transformers import AutoTokenizer

from sgl_apr.server.security.logprob_texts import detokenize_cached
from sgl_apr.training.models import locate_model

ORIGINAL = inspect.unwrap(TokenizerManager.detokenize_logprob_tokens)  # a test before may have set the hook


class Manager(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(locate_model("builtin")))


def test_texts_are_the_same(tokenizer):
    manager = Manager(tokenizer=tokenizer)
    size = len(tokenizer)
    for ids in ([5], list(range(size)), [5, 5, 3], list(range(size - 1, -1, -1)), [], [size + 5, 1]):
        values = [-0.5 * i for i in range(len(ids))]
        for texts in (True, False):
            expected = ORIGINAL(manager, values, ids, texts)
            assert detokenize_cached(ORIGINAL, manager, values, ids, texts) == expected


def test_looking_up_is_much_faster(tokenizer):
    manager, ids = Manager(tokenizer=tokenizer), list(range(400))
    values = [0.0] * 400
    detokenize_cached(ORIGINAL, manager, values, ids, True)

    def seconds(call) -> float:
        times = []
        for _ in range(20):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
        return min(times)

    stock = seconds(lambda: tokenizer.batch_decode([[i] for i in ids]))  # as SGLang does
    assert seconds(lambda: detokenize_cached(ORIGINAL, manager, values, ids, True)) < stock / 8
