"""The attention backend of models on GPUs, by SGLang's own resolution of arguments. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sgl_apr.server.kv_join.compatibility import SUPPORTED_ATTENTION_BACKENDS
from tests.support.paths import ROOT
from tests.support.resolve_on_cuda import Resolved, resolve_on_cuda

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIGS = ROOT / "tests" / "data" / "model_configs"  # the sizes of public models, with fewer layers
AMPERE, ADA, HOPPER, BLACKWELL, RTX_BLACKWELL = "8.0", "8.9", "9.0", "10.0", "12.0"
CAPABILITIES = (AMPERE, ADA, HOPPER, BLACKWELL, RTX_BLACKWELL)

# By model: SGLang's backend for each of CAPABILITIES. A pair is SGLang's choice, and what is taken in its place.
WINDOW = "a model with a sliding window"
RECURRENT = "a model with recurrent state"
HEADS_OF_96 = HEADS_OF_32 = "flashinfer needs heads of a multiple of 64 dimensions"
TOO_NEW = "fa3 needs a GPU of compute capability 8 or 9"
DENSE = ("flashinfer", "flashinfer", "fa3", "trtllm_mha", "flashinfer")
ODD_HEADS = (("flashinfer", "fa3"), ("flashinfer", "fa3"), "fa3", "trtllm_mha", ("flashinfer", "triton"))
OLMO = ("fa3", "fa3", "fa3", "trtllm_mha", ("fa3", "triton"))
SINKS = ("triton", "triton", "fa3", "trtllm_mha", "triton")
HYBRID = ("flashinfer", "flashinfer", "fa3", "triton", "flashinfer")
MODELS: Mapping[str, tuple[tuple[str | tuple[str, str], ...], str]] = {
    "llama": (DENSE, ""),
    "qwen3": (DENSE, ""),
    "qwen3-moe": (DENSE, ""),
    "phi3": (ODD_HEADS, ""),
    "llama-heads-of-32": (ODD_HEADS, ""),
    "qwen2.5-vl": (DENSE, ""),
    "olmo2": (OLMO, ""),
    "deepseek-v3": (("triton", "triton", "fa3", "trtllm_mla", "triton"), ""),
    "deepseek-v3.2": (("dsa",) * 5, "a model whose attention is sparse"),
    "gpt-oss": (SINKS, WINDOW),
    "llama4": (SINKS, WINDOW),
    "exaone4": (OLMO, WINDOW),
    "gemma3": (DENSE, WINDOW),
    "qwen3-next": (HYBRID, RECURRENT),
    "qwen3.5": (HYBRID, RECURRENT),
}
TABLE = [
    (name, capability, backends[CAPABILITIES.index(capability)], obstacle)
    for name, (backends, obstacle) in MODELS.items()
    for capability in CAPABILITIES
]
DETERMINISTIC = ("--enable-deterministic-inference",)
FLASHINFER = ("--attention-backend", "flashinfer")
JOINING = [name for name, (_, obstacle) in MODELS.items() if not obstacle]


class Table:
    """Resolves command lines on first use, all at once in one process."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str, tuple[str, ...]], Resolved] = {}

    def resolve(self, cases: list[tuple[str, str, tuple[str, ...]]], folder: Path) -> None:
        commands = [
            (capability, ["--model", str(CONFIGS / model), "--skip-tokenizer-init", *flags])
            for model, capability, flags in cases
        ]
        self.results = dict(zip(cases, resolve_on_cuda(commands, folder), strict=True))

    def __call__(self, model: str, capability: str, *flags: str) -> Resolved:
        return self.results[model, capability, flags]


def explicit_flags() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Command lines whose user decides."""
    for backend in ("triton", "flashinfer", "trtllm_mha"):
        yield "llama", BLACKWELL, ("--attention-backend", backend)
    yield "llama", HOPPER, ("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer")
    yield "llama", HOPPER, ("--page-size", "16")
    yield "llama", BLACKWELL, ("--page-size", "32")
    yield "llama", BLACKWELL, ("--radix-cache-backend", "stock")
    yield "llama", BLACKWELL, ("--disable-radix-cache",)
    yield "llama", HOPPER, ("--disable-radix-cache", "--radix-cache-backend", "apr")
    yield "llama", BLACKWELL, (*DETERMINISTIC, "--radix-cache-backend", "stock")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Table:
    cases = [(name, capability, ()) for name, capability, _, _ in TABLE]
    cases += [(name, capability, DETERMINISTIC) for name in MODELS for capability in CAPABILITIES]
    cases += [
        (name, capability, FLASHINFER) for name in ("gpt-oss", "deepseek-v3.2") for capability in CAPABILITIES
    ]
    cases += [("olmo2", BLACKWELL, FLASHINFER), ("llama", HOPPER, (*DETERMINISTIC, *FLASHINFER))]
    cases += [("gemma4", HOPPER, ()), *explicit_flags()]
    table = Table()
    table.resolve(list(dict.fromkeys(cases)), tmp_path_factory.mktemp("driver"))
    return table


@pytest.mark.parametrize(("model", "capability", "expected", "obstacle"), TABLE)
def test_the_backend_of_a_model_on_a_gpu(on_gpu, model, capability, expected, obstacle):
    result = on_gpu(model, capability)
    assert result.error == ""
    own, backend = expected if isinstance(expected, tuple) else (expected, expected)
    if not obstacle and backend not in SUPPORTED_ATTENTION_BACKENDS:
        backend = "triton"  # fa3 does not run on Blackwell, so it is the first with which joins work
    assert result.backend == backend
    assert result.page_size == (64 if backend.startswith(("trtllm", "dsa")) else 1)
    assert result.cache == (None if obstacle else "apr")
    assert result.has_radix_cache
    if own == backend:
        assert result.attention == f"{backend}, SGLang's choice"
    else:
        assert result.attention.startswith(f"{backend}, in place of {own}: ")
    line = f"sgl-apr: branches are not joined in the KV cache: that does not work with {obstacle}"
    assert result.printed == ((line,) if obstacle else ())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_flashinfer_for_all_would_end_gpt_oss_and_change_deepseek(on_gpu, capability):
    """Each of these is why `--attention-backend flashinfer` is no default. A user who sets it gets it."""
    assert "AssertionError" in on_gpu("gpt-oss", capability, *FLASHINFER).error
    assert on_gpu("deepseek-v3.2", capability, *FLASHINFER).backend == "flashinfer", "dense, without a word"
    assert on_gpu("deepseek-v3.2", capability).backend == "dsa"


def test_flashinfer_for_all_would_end_olmo_and_turn_off_the_radix_cache(on_gpu):
    assert "AssertionError" in on_gpu("olmo2", BLACKWELL, *FLASHINFER).error
    assert not on_gpu("llama", HOPPER, *DETERMINISTIC, *FLASHINFER).has_radix_cache


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("model", MODELS)
def test_deterministic_inference_keeps_the_radix_cache_and_joins(on_gpu, model, capability):
    result = on_gpu(model, capability, *DETERMINISTIC)
    if model == "deepseek-v3.2":
        assert "only" in result.error
        assert "supported for deterministic inference" in result.error
        return
    assert result.error == ""
    assert result.has_radix_cache
    assert result.backend in ("fa3", "triton"), "the backends for which SGLang keeps the radix cache on"
    assert result.backend == "triton" or capability not in (BLACKWELL, RTX_BLACKWELL)
    assert result.cache == ("apr" if model in JOINING else None)


def test_a_model_that_sglang_cannot_read_ends_with_its_error(on_gpu):
    """SGLang 0.5.23 reads one head dimension, and transformers has one for each layer of Gemma 4."""
    assert on_gpu("gemma4", HOPPER).error.startswith("AmbiguousGlobalPerLayerAttributeError: 'head_dim'")


@pytest.mark.parametrize("backend", ["triton", "flashinfer", "trtllm_mha"])
def test_an_attention_backend_of_the_user_wins(on_gpu, backend):
    result = on_gpu("llama", BLACKWELL, "--attention-backend", backend)
    assert (result.error, result.attention) == ("", f"{backend}, set by a flag")
    joins = backend in SUPPORTED_ATTENTION_BACKENDS
    assert result.cache == ("apr" if joins else None)
    assert len(result.printed) == (not joins)


def test_split_attention_backends_of_the_user_win(on_gpu):
    flags = ("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer")
    result = on_gpu("llama", HOPPER, *flags)
    assert result.attention == "fa3 for prefill and flashinfer for decode, set by a flag"
    assert result.cache == "apr"


@pytest.mark.parametrize(("capability", "page_size"), [(HOPPER, "16"), (BLACKWELL, "32")])
def test_a_page_size_of_the_user_wins(on_gpu, capability, page_size):
    result = on_gpu("llama", capability, "--page-size", page_size)
    assert (result.error, result.page_size, result.cache) == ("", int(page_size), "apr")


def test_a_cache_of_the_user_wins(on_gpu):
    """SGLang's choice is then as good as any."""
    stock = on_gpu("llama", BLACKWELL, "--radix-cache-backend", "stock")
    assert (stock.backend, stock.page_size, stock.cache) == ("trtllm_mha", 64, "stock")
    off = on_gpu("llama", BLACKWELL, "--disable-radix-cache")
    assert (off.backend, off.cache, off.has_radix_cache) == ("trtllm_mha", None, False)
    assert off.printed[0].endswith("does not work with --disable-radix-cache")
    both = on_gpu("llama", HOPPER, "--disable-radix-cache", "--radix-cache-backend", "apr")
    assert both.error == "UsageError: --radix-cache-backend apr does not work with --disable-radix-cache"
    repeatable = on_gpu("llama", BLACKWELL, *DETERMINISTIC, "--radix-cache-backend", "stock")
    assert (repeatable.backend, repeatable.has_radix_cache) == ("triton", True)
