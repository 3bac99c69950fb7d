"""What a start leaves out: each part, its switch, and what happens where SGLang is not as expected."""

from __future__ import annotations

import argparse
import gc
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import (
    MODEL_MODULE_ENV,
    ONE_MODEL_MODULE_ENV,
    PAUSE_GC_ENV,
    QUICK_WARMUP_ENV,
    SKIP_FLASHINFER_ENV,
)
from sgl_apr.server.launch import fast_imports as fast_imports_module
from sgl_apr.server.launch import fork_start, served_model, warmup
from sgl_apr.server.launch.fast_imports import fast_imports
from sgl_apr.server.launch.launcher import Server
from sgl_apr.server.launch.served_model import import_only_served_model, model_module

PACKAGE = "colorsys"  # a module that nothing here imports


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_imports_module, "has_accelerator", lambda: False)
    monkeypatch.setattr(fast_imports_module, "GPU_PACKAGE", PACKAGE)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)


def test_garbage_is_not_collected_while_importing():
    made = [[]]  # an object that the collector looks at
    gc.unfreeze()
    with fast_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    assert not any(one is made for one in gc.get_objects())


def test_the_pause_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PAUSE_GC_ENV, "0")
    frozen = list[bool]()
    monkeypatch.setattr(
        gc, "freeze", lambda: frozen.append(True)
    )  # the count falls as other objects are freed
    with fast_imports():
        assert gc.isenabled()
    assert not frozen


def test_flashinfer_is_hidden_while_importing():
    with fast_imports():
        assert find_spec(PACKAGE) is None
        with pytest.raises(ModuleNotFoundError):
            __import__(PACKAGE)
    assert find_spec(PACKAGE) is not None
    assert __import__(PACKAGE).rgb_to_hsv


def test_flashinfer_is_hidden_no_longer_after_an_error():
    with pytest.raises(LaunchError), fast_imports():
        raise LaunchError("wrong flags")
    assert gc.isenabled()
    assert find_spec(PACKAGE) is not None


@pytest.mark.parametrize("reason", ["switched off", "accelerator", "imported"])
def test_flashinfer_is_not_hidden_where_it_may_matter(reason: str, monkeypatch: pytest.MonkeyPatch):
    if reason == "switched off":
        monkeypatch.setenv(SKIP_FLASHINFER_ENV, "0")
    elif reason == "accelerator":
        monkeypatch.setattr(fast_imports_module, "has_accelerator", lambda: True)
    else:
        __import__(PACKAGE)
    with fast_imports():
        assert __import__(PACKAGE).rgb_to_hsv
    assert sys.modules[PACKAGE]


@pytest.mark.parametrize(
    ("architectures", "module"),
    [
        (["LlamaForCausalLM"], "sglang.srt.models.llama"),
        (["Phi3ForCausalLM"], "sglang.srt.models.llama"),
        (["Qwen3MoeForCausalLM", "LlamaForCausalLM"], "sglang.srt.models.qwen3_moe"),
        (["Qwen3Model"], None),  # two modules have a class of this name
        (["NoSuchForCausalLM", "LlamaForCausalLM"], None),
        (["Llama.*"], None),
        ([], None),
    ],
)
def test_the_module_of_an_architecture(architectures: list[str], module: str | None):
    assert model_module(architectures) == module


class Config:
    """A configuration whose architectures the test sets."""

    def __init__(self) -> None:
        self.architectures: list[str] | None = ["LlamaForCausalLM"]
        self.hf_config = self


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    config = Config()
    monkeypatch.setattr(served_model, "require_sglang", lambda *_: lambda _: config)
    monkeypatch.delitem(sys.modules, "sglang.srt.models.registry", raising=False)
    for name in (served_model.EXTERNAL_PACKAGE_ENV, MODEL_MODULE_ENV):
        monkeypatch.setenv(name, "")  # so that it is reset after the test
    return config


def chosen() -> tuple[str, str]:
    return os.environ[served_model.EXTERNAL_PACKAGE_ENV], os.environ[MODEL_MODULE_ENV]


def test_one_module_of_models_is_imported(config: Config):
    import_only_served_model(None)
    assert chosen() == ("sgl_apr.server.model_package", "sglang.srt.models.llama")


@pytest.mark.parametrize("architectures", [["NoSuchForCausalLM"], None])
def test_all_models_are_imported_for_an_unknown_architecture(architectures: list[str] | None, config: Config):
    config.architectures = architectures
    import_only_served_model(None)
    assert chosen() == ("", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (ONE_MODEL_MODULE_ENV, "0"),
        (served_model.DISABLED_ENV, "llama"),
        (served_model.EXTERNAL_PACKAGE_ENV, "my_models"),
    ],
)
def test_what_the_operator_sets_wins(name: str, value: str, config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    import_only_served_model(None)
    assert os.environ[MODEL_MODULE_ENV] == ""
    assert os.environ[name] == value


def test_another_sglang_imports_all_models(config: Config, monkeypatch: pytest.MonkeyPatch, caplog):
    def missing(path: str, *_: object) -> None:
        raise LaunchError(f"this SGLang has no {path}")

    monkeypatch.setattr(served_model, "require_sglang", missing)
    import_only_served_model(None)
    assert chosen() == ("", "")
    assert "SGLang imports the classes of all models: this SGLang has no" in caplog.text


def test_another_sglang_spawns_its_processes(monkeypatch: pytest.MonkeyPatch, caplog):
    def missing(path: str, *_: object) -> None:
        raise LaunchError(f"this SGLang has no {path}")

    monkeypatch.setattr(fork_start, "hook_after", missing)
    with socket.socket() as launcher:
        fork_start.fork_children(launcher)
    assert "each process of the server imports SGLang again: this SGLang has no" in caplog.text


REGISTRY = """
import os, sys
from sgl_apr.server.launch.fast_imports import fast_imports
with fast_imports():
    import sglang.srt.managers.scheduler
print("flashinfer", "flashinfer" in sys.modules)
from sglang.srt.models.registry import ModelRegistry
for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
    print(ModelRegistry.resolve_model_cls([architecture])[0].__module__, len(ModelRegistry.models) > 200)
print(ModelRegistry.is_arch_supported("NoSuchForCausalLM"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "complete"), [("sglang.srt.models.llama", False), ("no.such.module", True)]
)
def test_sglang_finds_other_classes_too(module: str, complete: bool):
    """The second is an architecture that was not served at first, as for a draft model."""
    environment = os.environ | {
        served_model.EXTERNAL_PACKAGE_ENV: served_model.PACKAGE,
        MODEL_MODULE_ENV: module,
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = [sys.executable, "-c", REGISTRY]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[:4] == [
        "flashinfer False",
        f"sglang.srt.models.llama {complete}",
        "sglang.srt.models.qwen2 True",
        "False",
    ]


class Stock:
    """SGLang's parts that the warm-up uses."""

    calls = 0
    status = None
    plain = True
    failure: str | None = None

    def __call__(self, path: str, *_: object) -> Any:
        name = path.rpartition(":")[2]
        if name == "resolving_view" and self.failure == "seam":
            raise LaunchError("this SGLang has no resolving_view")
        return {
            "_execute_server_warmup": self.execute,
            "_global_state": argparse.Namespace(tokenizer_manager=self),
            "ServerStatus.Up": "up",
            "resolving_view": lambda _: self.view(),
            "model_config_of": lambda _: argparse.Namespace(
                is_generation=True, is_image_understandable_model=False
            ),
        }[name]

    def view(self) -> argparse.Namespace:
        mode = "null" if self.plain else "prefill"
        return argparse.Namespace(
            disaggregation_mode=mode, dp_size=1, skip_tokenizer_init=False, ssl_certfile=None,
            debug_tensor_dump_input_file=None,
        )  # fmt: skip

    def execute(self, args: object) -> bool:
        self.calls += 1
        return True

    @property
    def server_status(self) -> None:
        raise AssertionError

    @server_status.setter
    def server_status(self, value: str) -> None:
        self.status = value


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Stock:
    stock = Stock()
    monkeypatch.setattr(warmup, "require_sglang", stock)

    def generate(*_: object) -> None:
        if stock.failure == "request":
            raise LaunchError("status 500")

    monkeypatch.setattr(warmup, "_generate", generate)
    return stock


ARGS = argparse.Namespace(url=lambda: "http://127.0.0.1:1", api_key=None)


def test_the_first_request_is_sent_at_once(stock: Stock):
    assert warmup.warm_up_sglang(ARGS)
    assert (stock.calls, stock.status) == (0, "up")


@pytest.mark.parametrize("reason", ["seam", "request", "special", "switched off", "timeout"])
def test_sglang_warms_up_in_all_other_cases(reason: str, stock: Stock, monkeypatch: pytest.MonkeyPatch):
    stock.failure = reason
    stock.plain = reason != "special"
    if reason == "switched off":
        monkeypatch.setenv(QUICK_WARMUP_ENV, "0")
    elif reason == "timeout":
        monkeypatch.setenv("SGLANG_WARMUP_TIMEOUT", "30")
    assert warmup.warm_up_sglang(ARGS)
    assert (stock.calls, stock.status) == (1, None)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("skip_warmup", [False, True])
def test_joins_are_checked_on_every_rank(ranks: int, skip_warmup: bool, monkeypatch: pytest.MonkeyPatch):
    """Also with `--skip-server-warmup`: the check then waits until the server listens."""
    calls: list[object] = []
    view = argparse.Namespace(radix_cache_backend="apr", dp_size=ranks)
    monkeypatch.setattr(warmup, "require_sglang", lambda path: lambda args: view)
    monkeypatch.setattr(warmup, "_generate", lambda url, body, key: calls.append("listens"))
    monkeypatch.setattr(warmup, "make_client", lambda url, key, rank: rank)
    monkeypatch.setattr(warmup, "assert_joins_correct", calls.append)
    args = argparse.Namespace(**vars(ARGS), skip_server_warmup=skip_warmup)
    warmup.check_joins(args)
    assert calls == ["listens", *range(ranks)]
    view.radix_cache_backend = "stock"
    warmup.check_joins(args)
    assert calls == ["listens", *range(ranks)], "no other cache is checked"


def test_a_node_is_waited_for_until_it_answers():
    """Any answer counts: SGLang serves no more than health on nodes other than the first."""
    answered = threading.Event()

    class Health(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answered.set()
            self.send_error(405)

    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    args = argparse.Namespace(url=lambda: f"http://127.0.0.1:{port}")
    waiting = threading.Thread(target=warmup.wait_until_listening, args=[args], daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "nothing listens yet"
    with http.server.HTTPServer(("127.0.0.1", port), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        waiting.join(10)
        server.shutdown()
    assert answered.is_set()
    assert not waiting.is_alive()


@pytest.mark.server
def test_a_server_starts_without_what_it_does_not_need(server: Server):
    log = Path(server._log_path).read_text()
    start = log.partition("The server is fired up")[0]
    assert "POST /generate" in start
    assert "GET /model_info" not in start, "SGLang's own warm-up ran"
    assert "sglang.srt.models.falcon_mamba" not in log, "all models were imported"
    assert apr.run(server.url, "a", mode="parallel", budget={"tokens": 200, "width": 2}).blocks


@pytest.mark.slow
@pytest.mark.server
def test_a_second_architecture_is_served(untagged: Path, forked_server: type[Server], tmp_path: Path):
    """A Qwen2 model, from the tokenizer of a Llama."""
    from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

    directory = shutil.copytree(
        untagged, tmp_path / "qwen2", ignore=shutil.ignore_patterns("log", "*.safetensors")
    )
    llama = AutoConfig.from_pretrained(untagged)
    same = {
        name: getattr(llama, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id",
        )
    }  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**same)).save_pretrained(directory)
    with forked_server(directory, log_path=tmp_path / "log") as server:
        assert apr.run(server.url, "a", mode="sequential", budget={"tokens": 20}).text
    log = (tmp_path / "log").read_text()
    assert "type=Qwen2ForCausalLM" in log
    assert "sglang.srt.models.falcon_mamba" not in log
