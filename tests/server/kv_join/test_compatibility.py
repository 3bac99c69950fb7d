"""Which command lines join in the KV cache, and what the others print. No server is started."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import FalconH1Config, Gemma2Config

from sgl_apr.training.models import random_llama

pytestmark = pytest.mark.timeout(600)

RESOLVE = """
import contextlib, io, json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolving_view
from sgl_apr.server.launch.arguments import server_args
for environment, argv in json.loads(sys.argv[1]):
    stderr = io.StringIO()
    os.environ |= environment
    try:
        with contextlib.redirect_stderr(stderr):
            result = {"cache": resolving_view(server_args(argv)).radix_cache_backend}
    except Exception as error:
        result = {"error": type(error).__name__, "why": str(error)}
    for name in environment:
        del os.environ[name]
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("sgl-apr: ")]
    print("RESULT", json.dumps(result | {"printed": lines}), flush=True)
"""
FLAGS = {
    "--disable-radix-cache": ["--disable-radix-cache"],
    "--speculative-algorithm": ["--speculative-algorithm", "NGRAM"],
    "--enable-hierarchical-cache": ["--enable-hierarchical-cache"],
    "--enable-lmcache": ["--enable-lmcache"],
    "--disaggregation-mode prefill": ["--disaggregation-mode", "prefill"],
    "--disaggregation-mode decode": ["--disaggregation-mode", "decode"],
    "--attn-dp-size 2": ["--tp-size", "2", "--attn-dp-size", "2"],
    "--dcp-size 2": ["--tp-size", "2", "--dcp-size", "2"],
    "--enable-two-batch-overlap": ["--enable-two-batch-overlap"],
    "--enable-session-radix-cache": ["--enable-session-radix-cache"],
    "--kv-canary": ["--kv-canary", "log"],
    "--attention-backend flex_attention": ["--attention-backend", "flex_attention"],
}
MODELS = {
    "a sliding window": Gemma2Config(num_hidden_layers=2, architectures=["Gemma2ForCausalLM"]).to_dict(),
    "recurrent state": FalconH1Config(num_hidden_layers=2, architectures=["FalconH1ForCausalLM"]).to_dict(),
    "sparse": {"index_topk": 64},
    "does not generate": {"architectures": ["BertModel"]},
}
COMPATIBLE_MODELS = {
    "M-RoPE": {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}},
}
NODES = ["--nnodes", "2", "--tp-size", "2", "--dist-init-addr", "127.0.0.1:20000"]
SECRET = {"SGLANG_APR_SECRET": "0f" * 32}
MAMBA_FLAGS = ["--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"]
COMPATIBLE = {
    "nothing": [],
    "tensors in parallel": ["--tp-size", "2"],
    "several ranks": ["--dp-size", "2"],
    "a pipeline": ["--pp-size", "2"],
    "pages of several tokens": ["--page-size", "16"],
    "chunks and decoding mixed": ["--enable-mixed-chunk"],
    "another policy": ["--schedule-policy", "dfs-weight", "--radix-eviction-policy", "lfu"],
}


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict]:
    """The result of every command line, by its name and whether it requests the cache."""
    model = random_llama(tmp_path_factory.mktemp("model"))
    base = json.loads((model / "config.json").read_text())
    cases: dict[tuple[str, bool], tuple[dict, list[str]]] = {}
    for requested in (False, True):
        flag = ["--radix-cache-backend", "apr"] if requested else []
        for name, flags in (FLAGS | COMPATIBLE).items():
            cases[name, requested] = {}, ["--model", str(model), *flags, *flag]
        for name, config in (MODELS | COMPATIBLE_MODELS).items():
            directory = tmp_path_factory.mktemp("config")
            (directory / "config.json").write_text(json.dumps(base | config))
            cases[name, requested] = {}, ["--model", str(directory), *MAMBA_FLAGS, *flag]
        argv = ["--model", str(model), *flag]
        cases["SGLANG_RADIX_FORCE_MISS", requested] = {"SGLANG_RADIX_FORCE_MISS": "1"}, argv
        cases["SGLANG_APR_KV_JOIN=0", requested] = {"SGLANG_APR_KV_JOIN": "0"}, argv
        cases["nodes", requested] = {}, [*argv, *NODES]
        cases["nodes with a secret", requested] = SECRET, [*argv, *NODES]
    cases["stock", True] = {}, ["--model", str(model), "--radix-cache-backend", "stock", "--page-size", "16"]
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(list(cases.values()))], capture_output=True, text=True
    )
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(cases), done.stderr[-2000:]
    return dict(zip(cases, results, strict=True))


INCOMPATIBLE = [*FLAGS, *MODELS, "SGLANG_RADIX_FORCE_MISS", "SGLANG_APR_KV_JOIN=0"]


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_a_server_that_cannot_join_prints_why(resolved, name: str):
    result = resolved[name, False]
    assert result["cache"] is None
    (line,) = result["printed"]
    assert line.startswith("sgl-apr: branches are not joined in the KV cache: that does not work with ")
    assert name in line


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_requesting_the_cache_is_an_error_if_the_server_cannot_join(resolved, name: str):
    result = resolved[name, True]
    assert result["error"] == "UsageError"
    assert result["why"].startswith("--radix-cache-backend apr does not work with ")
    assert name in result["why"]
    assert result["printed"] == []


@pytest.mark.parametrize("requested", [False, True])
@pytest.mark.parametrize("name", [*COMPATIBLE, *COMPATIBLE_MODELS, "nodes with a secret"])
def test_a_server_joins_if_it_can(resolved, name: str, requested: bool):
    assert resolved[name, requested] == {"cache": "apr", "printed": []}


@pytest.mark.parametrize("requested", [False, True])
def test_several_nodes_need_a_secret_from_the_operator(resolved, requested: bool):
    result = resolved["nodes", requested]
    assert result["error"] == "LaunchError"
    assert "--nnodes 2 needs one secret for the cache on all nodes: set the environment" in result["why"]


def test_another_cache_can_be_requested(resolved):
    assert resolved["stock", True] == {"cache": "stock", "printed": []}
