"""Flags, and every way in which a launch can fail: with one line, a status, and no process left."""

from __future__ import annotations

import argparse
import io
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sgl_apr.errors import LaunchError
from sgl_apr.server import hooks, plugin
from sgl_apr.server.constants import LAUNCHED_ENV
from sgl_apr.server.hooks import require_sglang
from sgl_apr.server.launch import main as launch_main
from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.defaults import (
    CPU_FLAGS,
    DEFAULT_POOL_TOKENS,
    as_flags,
    default_flags,
    pool_tokens,
)
from sgl_apr.server.launch.help import own_flags
from sgl_apr.server.launch.launcher import Server, serve
from sgl_apr.server.launch.process import ServerProcess, clean_log_line, failure_reason
from sgl_apr.server.launch.sglang_flags import plugin_flags, sglang_flags
from tests.support.processes import SERVE, in_session, until


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "num_hidden_layers": 4}
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize("accelerator", [True, False])
def test_sglang_knows_every_default(parser, accelerator):
    args = parser.parse_args([*default_flags(accelerator=accelerator), "--model", "m"])
    for flag, value in ({} if accelerator else CPU_FLAGS).items():
        parsed = getattr(args, flag[2:].replace("-", "_"))
        assert parsed is True if value is None else str(parsed) == value
    assert args.grammar_backend == "llguidance"
    if accelerator:  # SGLang chooses
        assert (args.attention_backend, args.page_size, args.device) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--attention-backend", "torch_native"], "attention_backend", "torch_native"),
        (["--attention-backend=torch_native"], "attention_backend", "torch_native"),
        (["--max-total-tokens", "77"], "max_total_tokens", 77),
        (["--dtype=bfloat16"], "dtype", "bfloat16"),
        (["--grammar-backend", "xgrammar"], "grammar_backend", "xgrammar"),
        (["--schedule-policy=fcfs"], "schedule_policy", "fcfs"),
        (["--device", "cuda"], "device", "cuda"),
        (["--cuda-graph-backend-decode", "full"], "cuda_graph_backend_decode", "full"),
    ],
)
def test_flags_of_the_user_win(parser, flags, name, value):
    args = parser.parse_args([*default_flags(accelerator=False, max_tokens=5), "--model", "m", *flags])
    assert getattr(args, name) == value


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"context_length": 4096}, ["--context-length", "4096"]),
        ({"disable_radix_cache": True}, ["--disable-radix-cache"]),
        ({"disable_radix_cache": False, "dtype": None}, []),
        ({"lora_paths": ["a", "b"], "port": 0}, ["--lora-paths", "a", "b", "--port", "0"]),
    ],
)
def test_keywords_are_flags(options, flags):
    assert as_flags(options) == flags


@pytest.mark.parametrize(
    ("config", "available", "tokens"),
    [
        (LLAMA, 10**12, DEFAULT_POOL_TOKENS),
        (LLAMA, 2 * 10_000 * (2 * 4 * 4 * 2 * 64), 10_000),
        ({"text_config": LLAMA}, 2 * 10_000 * (2 * 4 * 4 * 2 * 64), 10_000),
        (LLAMA | {"head_dim": 128}, 2 * 10_000 * (2 * 4 * 4 * 2 * 64), 5_000),
        (LLAMA | {"v_head_dim": 192}, 2 * 10_000 * (2 * 4 * 4 * 2 * 64), 5_000),
        (LLAMA | MLA, 2 * 10_000 * (4 * 4 * 576), 10_000),
        ({"language_config": LLAMA | MLA}, 2 * 10_000 * (4 * 4 * 576), 10_000),
        ({"thinker_config": {"text_config": LLAMA}}, 2 * 10_000 * (2 * 4 * 4 * 2 * 64), 10_000),
        (LLAMA | {"text_config": None}, 2 * 10_000 * (2 * 4 * 4 * 2 * 64), 10_000),
        (LLAMA, 1, 1024),
        ({}, 1, DEFAULT_POOL_TOKENS),
        ({"num_hidden_layers": 4}, 1, DEFAULT_POOL_TOKENS),
    ],
)
def test_the_pool_fits_into_memory(config, available, tokens):
    assert pool_tokens(config, available) == tokens


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ([], None),
        (["starting", "fine"], None),
        (["ValueError: bad", "more", "EOFError", "RuntimeError: Rank 0 scheduler died"], "ValueError: bad"),
        (
            ["Traceback", "torch.cuda.OutOfMemoryError: no", "  KeyError: x"],
            "torch.cuda.OutOfMemoryError: no",
        ),
        (["EOFError"], "EOFError"),
        (["sgl-apr: error: SGLang 9", "ValueError: bad"], "SGLang 9"),
    ],
)
def test_the_reason_of_a_failure(log, reason):
    assert failure_reason(log) == reason


def failure(argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and error of `serve`; the error is one line, and standard output stays empty."""
    before = signal.getsignal(signal.SIGTERM)
    status = serve(argv)
    out, err = capfd.readouterr()
    assert signal.getsignal(signal.SIGTERM) is before
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("sgl-apr: error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    return status, lines[0].removeprefix("sgl-apr: error: ")


def test_help(capfd):
    assert serve(["--help"]) == 0
    text = capfd.readouterr().out
    assert [flag for flag in own_flags() if flag.startswith("--apr-") and f"  {flag}" not in text] == []
    assert "--api-key-file FILE" in text
    assert "python -m sglang.launch_server --help" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_flags_that_are_read_from_source_are_those_of_sglang(parser):
    known = {flag for action in parser._actions for flag in action.option_strings}
    flags, added = sglang_flags(), plugin_flags()
    assert flags <= known, "no name that SGLang does not know"
    assert known - {"-h", "--help"} <= flags | added
    assert len(flags) > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contxt-length", "9"], "no flag --contxt-length: did you mean --context-length?"),
        (["--contxt-length=9"], "no flag --contxt-length: did you mean --context-length?"),
        (["--apr-max-widht", "3"], "no flag --apr-max-widht: did you mean --apr-max-width?"),
        (["--no-such-flag"], "no flag --no-such-flag: sgl-apr serve --help says where all are listed"),
        (["--zzz"], "no flag --zzz: sgl-apr serve --help says where all are listed"),
    ],
)
def test_an_unknown_flag_is_refused_before_anything_starts(model, flags, message, capfd):
    start = time.monotonic()
    assert failure(["--model", model, *flags], capfd) == (2, message)
    assert time.monotonic() - start < 2


def test_flags_and_values_that_sglang_takes_pass():
    argv = ["--model", "m", "--context-len", "9", "--dtype=float32", "--json-model-override-args", "--a b"]
    assert preflight.read_arguments([*argv, "--api-key-file", "k", "--no-dllm-fdfo"]).model == "m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name enclosed in double quotes"),
        ("", "Expecting value"),
        ("[1]", "is [1], expected a JSON object"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_broken_configuration_of_a_model_is_one_line(tmp_path, text, message, capfd):
    (tmp_path / "config.json").write_text(text)
    status, error = failure(["--model", str(tmp_path), "--port", str(preflight.free_port())], capfd)
    assert status == 1
    assert error.startswith(f"{tmp_path}/config.json ")
    assert message in error


@pytest.mark.parametrize("argv", [[], ["--port", "30000"], ["--model"], ["--model", "m", "--port", "x"]])
def test_bad_usage(argv, capfd):
    assert failure(argv, capfd)[0] == 2


def test_taken_port(model, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = failure(["--model", model, "--port", str(port)], capfd)
    assert (status, error.split(": ")[0]) == (1, f"cannot listen on 127.0.0.1:{port}")


def test_a_port_is_reserved_for_the_server():
    request = preflight.LaunchRequest(None, "main", "127.0.0.1", preflight.free_port())
    with preflight.reserve_port(request):
        with (
            socket.create_server((request.host, request.port)),
            pytest.raises(LaunchError, match="cannot listen"),
        ):
            preflight.reserve_port(request)
        others = [socket.socket() for _ in range(200)]
        for other in others:
            other.bind((request.host, 0))
        assert request.port not in {other.getsockname()[1] for other in others}
        for other in others:
            other.close()


def test_a_server_that_cannot_listen_is_not_waited_for():
    """SGLang does not end then: it sends its warm-up to the process that has the port."""
    line = "[2026-01-02 03:04:05] ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): taken"
    program = f"print({line!r}, flush=True); import time; time.sleep(100)"

    def popen(command, **options):
        return subprocess.Popen([sys.executable, "-c", program], **options)

    process = ServerProcess([], {}, io.BytesIO(), popen)
    try:
        with pytest.raises(
            LaunchError, match=r"^the server cannot listen: \[Errno 98\] error while .*: taken$"
        ):
            process.wait_ready(60)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, 0),
        ("::1", None, 0),
        ("localhost", None, 0),
        ("0.0.0.0", "K", 0),
        ("0.0.0.0", None, 1),
        ("::", None, 1),
    ],
)
def test_a_warning_for_a_server_that_is_open_to_other_machines(host, key, warns):
    warning = launch_main._warning(argparse.Namespace(host=host, api_key=key, port=30000))
    assert bool(warning) == bool(warns)
    assert warning.startswith(
        f"the server listens on {host} without a key, so everybody who reaches port 30000"
    ) == bool(warns)


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_missing_model_directory(model, capfd):
    port = str(preflight.free_port())
    assert failure(["--model", model, "--port", port], capfd) == (1, f"there is no model directory {model}")


def test_directory_without_a_model(tmp_path, capfd):
    status, error = failure([f"--model={tmp_path}", "--port", str(preflight.free_port())], capfd)
    assert (status, error) == (1, f"{tmp_path} is not a model: there is no config.json in it")


@pytest.mark.parametrize("variables", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_hub_id_without_a_network(variables, monkeypatch, capfd):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    argv = ["--model", "sgl-apr/there-is-none", "--port", str(preflight.free_port())]
    status, error = failure(argv, capfd)
    assert status == 1
    assert error.startswith("no model sgl-apr/there-is-none: no such directory, not in the cache, and ")
    assert time.monotonic() - start < 10


def test_wrong_version(model, monkeypatch, capfd):
    monkeypatch.setattr(hooks, "version", lambda name: "0.5.22")
    status, error = failure(["--model", model, "--port", str(preflight.free_port())], capfd)
    assert (status, error) == (1, "SGLang 0.5.22 is installed, but only 0.5.23 is supported")


def test_a_failing_plugin_ends_only_processes_we_launched(monkeypatch):
    monkeypatch.setattr(hooks, "version", lambda name: "0.5.22")
    monkeypatch.delenv(LAUNCHED_ENV, raising=False)
    with pytest.raises(LaunchError, match=r"0\.5\.22"):
        plugin.activate()
    monkeypatch.setenv(LAUNCHED_ENV, "1")
    with pytest.raises(SystemExit, match=r"sgl-apr: error: SGLang 0\.5\.22"):
        plugin.activate()


@pytest.mark.parametrize(
    ("path", "parameters", "message"),
    [
        ("sglang.nothing:x", [], "this SGLang has no sglang.nothing:x"),
        ("json:nothing", [], "this SGLang has no json:nothing"),
        ("json:JSONEncoder.encode", ["thing"], r"takes \(o\), not \(thing\)"),
    ],
)
def test_a_changed_function_of_sglang_is_named(path, parameters, message):
    with pytest.raises(LaunchError, match=message):
        require_sglang(path, parameters)


def test_the_cpu_platform_is_used_without_any_other(monkeypatch):
    monkeypatch.setattr(plugin, "has_accelerator", lambda: True)
    assert plugin.platform() is None
    monkeypatch.setattr(plugin, "has_accelerator", lambda: False)
    assert plugin.platform() == "sgl_apr.server.cpu.platform.TorchCpuPlatform"
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plugin.platform() is None


def test_plugin_that_sglang_does_not_load(model, monkeypatch, capfd):
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    status, error = failure(["--model", model, "--port", str(preflight.free_port())], capfd)
    assert status == 1
    assert error.startswith("SGLang did not load the plugin of sgl-apr")


@pytest.mark.slow
def test_what_sglang_refuses_is_wrong_usage(model, capfd):
    argv = ["--model", model, "--port", str(preflight.free_port()), "stray"]
    assert failure(argv, capfd) == (2, "unrecognized arguments: stray")


def test_start_up_timeout_leaves_no_process(model, tmp_path):
    server = Server(model, startup_timeout=0.5, log_path=tmp_path / "log")
    before = psutil.Process().children()
    with pytest.raises(LaunchError, match=r"^the server was not ready after 0.5 s \(log: .*log\)$"):
        server.start()
    assert psutil.Process().children() == before
    with pytest.raises(LaunchError, match="not running"):
        server.pid  # noqa: B018
    server.stop()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -9)]
)
def test_a_signal_while_starting_leaves_no_process(model, number, status):
    argv = [*SERVE, "--model", model, "--port", str(preflight.free_port())]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as launcher:
        until(lambda: psutil.Process(launcher.pid).children())
        (child,) = psutil.Process(launcher.pid).children()
        until(lambda: "sgl_apr.server.launch.main" in child.cmdline() and child.num_threads() > 1)
        launcher.send_signal(number)
        assert launcher.wait(30) == status
    until(lambda: not in_session(child.pid))


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        (b"[2026] INFO: ok\n", "[2026] INFO: ok"),
        (b"\x1b[31mred\x1b[0m\tb \r\n", "red b"),
        (b"\x1b]52;c;cHduZWQ=\x07 \xc2\x9b2J \xe2\x80\xae\n", "]52;c;cHduZWQ= 2J"),
        (b"\xff half \xe2\x82", "\ufffd half \ufffd"),
    ],
)
def test_a_line_of_a_log_has_nothing_that_a_terminal_obeys(line: bytes, clean: str):
    assert clean_log_line(line).strip() == clean
