"""The choice of an attention backend: the order of what is tried, and why. SGLang's answers are stand-ins here."""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Sequence

import pytest

from sgl_apr.server.launch.attention_backend import (
    FALLBACK_BACKENDS,
    AttentionChoice,
    ResolvedAttention,
    attention_failure,
    choose_attention,
    describe_backends,
    without_side_effects,
)

PAGES = "--page-size 64"


class Resolver:
    """Answers for each attention backend as a test says, and records the flags that were tried.

    Args:
        own: What SGLang chooses by itself.
        others: The result for each explicit backend. An exception is raised. The default is one that joins.
    """

    def __init__(
        self,
        own: ResolvedAttention | Exception,
        **others: ResolvedAttention | Exception,
    ) -> None:
        self.own, self.others = own, others
        self.tried: list[tuple[str, ...]] = []

    def __call__(self, flags: Sequence[str]) -> ResolvedAttention:
        self.tried.append(tuple(flags))
        result = self.others.get(flags[1], ResolvedAttention(flags[1])) if flags else self.own
        if isinstance(result, Exception):
            raise result
        return result


def flags_of(backend: str) -> tuple[str, ...]:
    return ("--attention-backend", backend, "--page-size", "1")


def cannot_join(backend: str, what: str = PAGES) -> ResolvedAttention:
    return ResolvedAttention(backend, incompatibility=what)


def test_sglangs_choice_is_kept_if_it_joins():
    resolver = Resolver(ResolvedAttention("fa3"))
    assert choose_attention(resolver) == AttentionChoice((), "SGLang's choice")
    assert resolver.tried == [()]


@pytest.mark.parametrize("works", FALLBACK_BACKENDS)
def test_the_first_backend_that_joins_is_taken(works: str):
    """In the order fa3, triton, flashinfer. Earlier ones are refused, fail or cannot join."""
    reasons = [
        ValueError("no"),
        ResolvedAttention("x", failure="too old"),
        ResolvedAttention("x", keeps_prefixes=False),
        cannot_join("x"),
    ]
    earlier = FALLBACK_BACKENDS[: FALLBACK_BACKENDS.index(works)]
    for reason in reasons:
        resolver = Resolver(cannot_join("trtllm_mha"), **dict.fromkeys(earlier, reason))
        choice = choose_attention(resolver)
        assert choice.flags == flags_of(works)
        assert choice.reason == f"in place of trtllm_mha: joins do not work with {PAGES}"
        assert choice.rejected == ()


def test_a_page_size_of_the_user_is_not_changed():
    choice = choose_attention(Resolver(cannot_join("trtllm_mha")), page_size_is_set=True)
    assert choice.flags == ("--attention-backend", "fa3")


def test_sglangs_choice_is_kept_if_no_backend_joins_the_model():
    what = "a model with a sliding window"
    others = {name: cannot_join(name, what) for name in FALLBACK_BACKENDS}
    choice = choose_attention(Resolver(cannot_join("fa3", what), **others))
    assert choice == AttentionChoice((), "SGLang's choice"), "the backends are not the reason"


def test_why_each_backend_was_rejected():
    resolver = Resolver(
        cannot_join("trtllm_mha"),
        fa3=ResolvedAttention("fa3", failure="too new"),
        triton=ValueError("no\nmore"),
        flashinfer=cannot_join("flashinfer", "--disable-radix-cache"),
    )
    choice = choose_attention(resolver)
    assert (choice.flags, choice.reason) == ((), "SGLang's choice")
    assert choice.rejected == (
        "fa3: too new",
        "triton: SGLang refuses it: no",
        "flashinfer: joins do not work with --disable-radix-cache",
    )


def test_a_model_that_cannot_join_still_gets_a_backend_that_runs():
    """SGLang's choice would end the server after it has loaded the model."""
    what = "a model with a sliding window"
    resolver = Resolver(
        ResolvedAttention("fa3", "too new", incompatibility=what),
        fa3=ResolvedAttention("fa3", "too new", incompatibility=what),
        triton=cannot_join("triton", what),
        flashinfer=cannot_join("flashinfer", what),
    )
    assert choose_attention(resolver) == AttentionChoice(flags_of("triton"), "in place of fa3: too new")


def test_a_model_that_cannot_join_keeps_the_radix_cache():
    what = "a model with a sliding window"
    without_cache = ResolvedAttention("flashinfer", keeps_prefixes=False, incompatibility=what)
    resolver = Resolver(
        without_cache, fa3=ValueError("no"), triton=cannot_join("triton", what), flashinfer=without_cache
    )
    reason = "in place of flashinfer: SGLang turns its radix cache off there"
    assert choose_attention(resolver) == AttentionChoice(flags_of("triton"), reason)


def test_a_radix_cache_that_the_user_turns_off_changes_no_backend():
    off = ResolvedAttention("fa3", keeps_prefixes=False, incompatibility="--disable-radix-cache")
    assert choose_attention(Resolver(off, **dict.fromkeys(FALLBACK_BACKENDS, off))).flags == ()


def test_a_choice_that_sglang_refuses_is_replaced():
    refused = ValueError("deterministic inference does not support trtllm_mha")
    choice = choose_attention(Resolver(refused, fa3=cannot_join("fa3")))
    assert choice == AttentionChoice(
        flags_of("triton"), f"in place of SGLang's choice: SGLang refuses it: {refused}"
    )


def test_an_error_that_has_nothing_to_do_with_attention_is_left_to_sglang():
    wrong = ValueError("--tp-size has to divide the heads")
    choice = choose_attention(Resolver(wrong, **dict.fromkeys(FALLBACK_BACKENDS, wrong)))
    assert choice.flags == ()


def model(**sizes: int) -> types.SimpleNamespace:
    arch = types.SimpleNamespace(name="MLA" if "qk_nope_head_dim" in sizes else "MHA")
    return types.SimpleNamespace(attention_arch=arch, hf_config=object(), **({"head_dim": 256} | sizes))


SPARSE = model(head_dim=128)
SPARSE.hf_config = types.SimpleNamespace(index_topk=2048)
DENSE, MLA = model(head_dim=128), model(qk_nope_head_dim=128, qk_rope_head_dim=64)


@pytest.mark.parametrize(
    ("prefill", "decode", "served", "capability", "words"),
    [
        ("fa3", "fa3", DENSE, 8, None),
        ("fa3", "fa3", DENSE, 9, None),
        ("fa3", "fa3", DENSE, 10, "fa3 needs a GPU of compute capability 8 or 9, this one has 10"),
        ("fa3", "fa3", DENSE, 12, "8 or 9, this one has 12"),
        ("fa3", "fa3", MLA, 8, "9 for a model with MLA, this one has 8"),
        ("fa3", "fa3", MLA, 9, None),
        ("triton", "fa3", DENSE, 12, "this one has 12"),
        ("triton", "triton", model(head_dim=80), 12, None),
        ("flashinfer", "flashinfer", DENSE, 8, None),
        ("flashinfer", "flashinfer", model(head_dim=96), 8, "a multiple of 64 dimensions, this model has 96"),
        ("triton", "flashinfer", model(head_dim=96), 8, None),
        ("flashinfer", "flashinfer", MLA, 10, None),
        (
            "flashinfer",
            "flashinfer",
            model(qk_nope_head_dim=64, qk_rope_head_dim=32),
            10,
            "this model has 96",
        ),
        ("dsa", "dsa", SPARSE, 10, None),
        ("triton", "triton", SPARSE, 10, "sparse attention would be dense"),
        ("dsa", "flashinfer", SPARSE, 10, "sparse attention would be dense"),
    ],
)
def test_what_ends_a_server_after_it_has_loaded_the_model(prefill, decode, served, capability, words):
    failure = attention_failure(prefill, decode, served, capability)
    assert failure == words if words is None else words in failure


def test_two_backends_are_described():
    assert describe_backends("fa3", "fa3") == "fa3"
    assert describe_backends("fa3", "flashinfer") == "fa3 for prefill and flashinfer for decode"


def test_trying_leaves_no_trace(monkeypatch, caplog):
    monkeypatch.setenv("SGL_APR_TEST", "before")
    with caplog.at_level(logging.INFO), without_side_effects():
        os.environ["SGL_APR_TEST"] = "inside"
        os.environ["SGL_APR_TEST_NEW"] = "inside"
        logging.getLogger("sglang").warning("inside")
    logging.getLogger("sglang").warning("after")
    assert os.environ["SGL_APR_TEST"] == "before"
    assert "SGL_APR_TEST_NEW" not in os.environ
    assert [record.message for record in caplog.records] == ["after"]
