"""Every hook of the plugin can be switched off by its environment variable, and is set without it."""

from __future__ import annotations

import socket

import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from sgl_apr.server import plugin
from sgl_apr.server.constants import (
    CACHE_SECRET_ENV,
    FORK_START_ENV,
    KV_JOIN_ENV,
    LAUNCHED_ENV,
    MASK_KERNEL_ENV,
    MASK_SLICES_ENV,
    PADDED_MATMUL_ENV,
)
from sgl_apr.server.cpu import mask_kernel
from sgl_apr.server.hooks import require_sglang
from sgl_apr.server.launch import fork_start, server_folder
from sgl_apr.server.security import abort, auth, grammar_cost, logprob_texts, redaction


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that are hooked, on a machine with only a CPU; no hook is really set."""
    paths: list[str] = []

    def record(path: str, *_: object) -> None:
        paths.append(path.rpartition(":")[2])

    modules = (
        plugin,
        fork_start,
        abort,
        auth,
        grammar_cost,
        logprob_texts,
        mask_kernel,
        redaction,
        server_folder,
    )
    for module in modules:
        for name in ("hook_after", "hook_around"):
            monkeypatch.setattr(module, name, record, raising=False)
        monkeypatch.setattr(
            module, "require_sglang", lambda path, parameters=(): lambda *_: lambda *_: None, raising=False
        )
    monkeypatch.setattr(plugin, "has_accelerator", lambda: False)
    monkeypatch.setattr(plugin, "activated", False)
    monkeypatch.setenv(LAUNCHED_ENV, "1")
    monkeypatch.setenv(CACHE_SECRET_ENV, "00" * 32)
    return paths


@pytest.mark.parametrize(
    ("variable", "functions"),
    [
        (PADDED_MATMUL_ENV, {"UnquantizedLinearMethod.apply", "LogitsProcessor._compute_lm_head"}),
        (MASK_KERNEL_ENV, {"GuidanceGrammar.apply_vocab_mask"}),
        (MASK_SLICES_ENV, {"_create_llguidance_tokenizer"}),
        (KV_JOIN_ENV, {"ForwardBatch.init_new", "ModelRunner.sample"}),
    ],
)
def test_a_hook_can_be_switched_off(
    hooked: list[str], variable: str, functions: set[str], monkeypatch: pytest.MonkeyPatch
):
    plugin.activate()
    on = set(hooked)
    hooked.clear()
    monkeypatch.setenv(variable, "0")
    plugin.activate()
    assert on - set(hooked) == functions


@pytest.mark.parametrize(("value", "functions"), [(None, ["_set_envs_and_config"]), ("0", [])])
def test_forking_can_be_switched_off(
    hooked: list[str], value: str | None, functions: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fork_start.os, "register_at_fork", lambda **_: None)
    if value is not None:
        monkeypatch.setenv(FORK_START_ENV, value)
    with socket.socket() as launcher:
        fork_start.fork_children(launcher)
    assert hooked == functions


def test_mask_slices_change_no_mask():
    require_sglang(
        "sglang.srt.constrained.llguidance_backend:_create_llguidance_tokenizer",
        ["tokenizer", "n_vocab", "eos_token"],
    )
    stock = LLTokenizer("byte")
    sliced = plugin._with_mask_slices(stock)
    assert sliced is not stock
    masks = []
    for tokenizer in (stock, sliced):
        matcher = LLMatcher(tokenizer, 'start: /[^<]*/ "</Thread>"')
        mask = allocate_token_bitmask(1, tokenizer.vocab_size)
        for token in tokenizer.tokenize_str("a <"):
            fill_next_token_bitmask(matcher, mask)
            masks.append(mask.tolist())
            assert matcher.consume_token(token)
    assert masks[: len(masks) // 2] == masks[len(masks) // 2 :]
