"""A stranger's text as token ids: no added token occurs in them, and they decode to the text."""

from __future__ import annotations

import time
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from sgl_apr.engine.scripted import ByteTokenizer
from sgl_apr.tokenizer import HfTokenizer, Tokenizer, added_token_scanner, plain_ids
from sgl_apr.training.models import locate_model

SPECIAL = ("<|im_start|>", "<|im_end|>", "</Thread>", "<Thread>", "<Conclusion>", "<a", "a>", "<a>", "<a>>")
OTHER = ("<tool_call>", "</tool_call>", "[x]", "x][", "    ")
KINDS = ("bytes", "byte-level", "metaspace", "normalized", "builtin")


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Tokenizers as models have them: of bytes, of bytes with merges, with a space before every text, with a normalizer."""
    if kind == "bytes":
        return ByteTokenizer([*SPECIAL, *OTHER[:-1]])
    if kind == "builtin":
        return HfTokenizer(locate_model("builtin"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "metaspace":
        pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
        merges = [("\u2581", "a"), ("a", "b")]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        merges = [("<", "a"), ("i", "m"), ("im", "_"), ("l", "l")]
        pieces = [*alphabet, *("".join(pair) for pair in merges)]
        backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if kind == "normalized":
            backend.normalizer = normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Replace(Regex("[T]"), "t")]
            )
    backend.add_special_tokens([AddedToken(s, normalized=kind == "normalized") for s in SPECIAL])
    backend.add_tokens(
        [AddedToken(s, normalized=kind == "normalized") for s in OTHER[: -1 if kind == "metaspace" else None]]
    )
    made = object.__new__(HfTokenizer)
    made._backend = backend
    added = backend.get_added_tokens_decoder()
    made._added = {t.content: i for i, t in added.items() if t.special}
    made._added_tokens = {t.content: i for i, t in added.items()}
    made._eos_ids, made.normalizes_added_tokens = frozenset({0}), kind == "normalized"
    return made


FRAGMENTS = [
    *SPECIAL,
    *OTHER,
    "<",
    ">",
    "a",
    "im_end|>",
    "<|im_",
    "\uff1c",
    "\uff1e",
    "T",
    " ",
    "\n",
    "é",
    "\U0001f600",
    "x",
    "]",
    "b",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(text=TEXTS)
def test_no_added_token_occurs_in_plain_ids(kind: str, text: str):
    tokenizer = tokenizer_of(kind)
    scanner = added_token_scanner(tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    ids = plain_ids(tokenizer, text)
    assert scanner.ids.isdisjoint(ids)
    usual = tokenizer.encode(text)
    if kind != "normalized":  # which does not keep what it encodes
        assert tokenizer.decode(ids) == text
    if scanner.ids.isdisjoint(usual) and not scanner.cuts(text):
        assert ids == usual, "a text without spellings is encoded as usual"
    pieces = [text[a:b] for a, b in pairwise([0, *scanner.cuts(text), len(text)])]
    assert "".join(pieces) == text
    assert not any(spelling in piece for piece in pieces for spelling in scanner.spellings)


def test_tags_of_a_stranger_are_plain_text():
    tokenizer = ByteTokenizer(["</Thread>", "<Conclusion>"])
    text = "</Thread><Conclusion>"
    assert tokenizer.encode(text) == [257, 258]
    assert plain_ids(tokenizer, text) == list(text.encode())


def test_spaces_that_are_added_tokens_stay_tokens():
    tokenizer = tokenizer_of("byte-level")
    ids = plain_ids(tokenizer, "if x:\n    y")
    assert ids == tokenizer.encode("if x:\n    y")
    assert tokenizer.added_tokens["    "] in ids


def test_plain_ids_take_linear_time():
    tokenizer = tokenizer_of("byte-level")

    def seconds(repeats: int) -> float:
        started = time.perf_counter()
        plain_ids(tokenizer, "<|im_end|><a>>" * repeats)
        return time.perf_counter() - started

    seconds(100)
    assert seconds(8000) < 30 * max(seconds(800), 0.002)
