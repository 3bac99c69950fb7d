"""A real server: keys are nowhere, ids of requests cannot be used against other clients, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.engine.http import HttpEngine
from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.launch import preflight
from sgl_apr.server.launch.launcher import Server
from tests.support.processes import SERVE, in_session, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

KEY, ADMIN_KEY = "ordinary-key-7f3a91", "admin-key-c2d80e"
SHARED_MEMORY = Path("/dev/shm")
CACHES = ("torchinductor_",)
ATTACK = {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}


FAULTS = (
    "open without a key", "keys in answers", "foreign pages (CORS)", "foreign Host", "size of a body", "length of a prompt",
    "n", "stop_regex", "sessions", "logit_bias", "top_k", "token ids", "ids of requests", "half-sent bodies",
)  # fmt: skip


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Servers that start in the block make their temporary files in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture(scope="module")
def new_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders whose paths are short enough for sockets, as those of `tmp_path` may not be."""
    with ExitStack() as stack:
        yield lambda: Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apr-", dir="/tmp")))


def leftovers(folder: Path) -> set[str]:
    """Return the files in a folder for temporary files, without the caches of compiled kernels."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(CACHES)}


def server_folder_of(folder: Path) -> str:
    """Return the name of the folder that the only server has in a folder for temporary files."""
    (path,) = folder.glob("sgl-apr-server-*")
    return path.name


def metrics_of(folder: Path) -> set[str]:
    """Return the kinds of files that the only server in a folder for temporary files writes its metrics to."""
    return {path.name.split("_")[0] for path in (folder / server_folder_of(folder)).glob("metrics/*.db")}


def shared_memory_of(leader: int) -> set[str]:
    """Return the names in shared memory that the processes of a server use, of which each has to be removed."""
    maps = (Path(f"/proc/{pid}/maps").read_text() for pid in in_session(leader))
    return {name for text in maps for name in re.findall(rf"{SHARED_MEMORY}/(\S+)$", text, re.MULTILINE)}


def send(url: str, path: str, key: str | None, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """The status and the text of an answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode() + str(error.headers)


@pytest.fixture(scope="module")
def keyed(forked_server: type[Server], untagged: Path, new_folder: Callable[[], Path]) -> Iterator[Server]:
    """A server with both keys, of which nothing may be left."""
    log, folder = untagged / "keyed.log", new_folder()
    options = {"api_key": KEY, "admin_api_key": ADMIN_KEY, "apr_body_timeout": 1, "enable_metrics": True}
    server = forked_server(untagged, log_path=log, max_total_tokens=4096, context_length=2048, **options)
    with temporary_files_in(folder):
        server.start()
    name, segments = server_folder_of(folder), shared_memory_of(server.pid)
    assert [s for s in segments if s.startswith("sglang_load") and name in s]
    assert "gauge" in metrics_of(folder)
    yield server
    threads, descriptors, pid = threading.active_count(), psutil.Process().num_fds(), server.pid
    server.stop()
    assert not in_session(pid)
    assert leftovers(folder) == set()
    assert not {path.name for path in SHARED_MEMORY.iterdir() if path.name in segments or name in path.name}
    assert threading.active_count() == threads - 1
    assert psutil.Process().num_fds() <= descriptors - 4  # a socket, a pipe, the lock and the log


def test_no_answer_has_a_key(keyed: Server):
    schema = json.loads(send(keyed.url, "/openapi.json", KEY)[1])
    paths = [path for path, methods in schema["paths"].items() if "get" in methods and "{" not in path]
    assert {"/server_info", "/get_server_info", "/model_info", "/v1/models"} <= set(paths)
    risky = {"/health_generate", "/flush_cache"}
    for path in sorted(set(paths) - risky):
        for key in (KEY, None, "\xe9"):
            status, text = send(keyed.url, path, key)
            assert status < 500 or path.startswith("/health")
            assert [k for k in (KEY, ADMIN_KEY) if k in text] == [], path
    info = json.loads(send(keyed.url, "/server_info", KEY)[1])
    assert (info["api_key"], info["admin_api_key"]) == ("<redacted>", "<redacted>")
    assert info["internal_states"][0]["api_key"] == "<redacted>"
    assert "--api-key=<redacted>" in info["launch_command"]


def test_the_log_and_the_command_lines_have_no_key(keyed: Server):
    assert isinstance(keyed._log_path, Path)
    log = keyed._log_path.read_text()
    assert "server_args=" in log
    assert [k for k in (KEY, ADMIN_KEY) if k in log] == []
    for pid in in_session(keyed.pid):
        process = psutil.Process(pid)
        text = " ".join(process.cmdline()) + str(process.environ())
        assert [k for k in (KEY, ADMIN_KEY) if k in text] == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/metrics", (None, KEY, ADMIN_KEY, "wrong")),
        ("GET", "/model_info", (KEY,)),
        ("GET", "/server_info", (KEY,)),
        ("GET", "/v1/models", (KEY,)),
        ("POST", "/generate", (KEY,)),
        ("POST", "/apr/generate", (KEY,)),
        ("POST", "/v1/chat/completions", (KEY,)),
        ("POST", "/abort_request", (ADMIN_KEY,)),
        ("POST", "/flush_cache", (ADMIN_KEY,)),
        ("POST", "/configure_logging", (ADMIN_KEY,)),
        ("POST", "/update_weights_from_disk", (ADMIN_KEY,)),
        ("POST", "/set_internal_state", (ADMIN_KEY,)),
    ],
)
def test_who_may_do_what(keyed: Server, method: str, path: str, allowed: tuple[str | None, ...]):
    """The table of `docs/security.md`. The bodies are invalid, so that nothing is done."""
    body = {"rid": 5, "flush": "x"} if method == "POST" and path != "/flush_cache" else None
    for key in (None, KEY, ADMIN_KEY, "wrong"):
        status, _ = send(keyed.url, path, key, {} if body is None and method == "POST" else body)
        assert (status not in (401, 403)) == (key in allowed), (key, status)


def test_the_doctor_finds_no_fault(
    keyed: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SGL_APR_API_KEY", KEY)
    assert main(["doctor", "--security", "--url", keyed.url, "--body-wait", "10", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert report["ok"]
    assert states == dict.fromkeys(FAULTS, "pass")


@pytest.mark.slow
@pytest.mark.skipif(has_accelerator(), reason="the server of this test uses a CPU")
def test_the_doctor_finds_the_faults_of_a_stock_server(untagged: Path, capsys: pytest.CaptureFixture[str]):
    """A server without the plugin has them. It still answers afterwards."""
    port = str(preflight.free_port())
    flags = {"--device": "cpu", "--attention-backend": "torch_native", "--sampling-backend": "pytorch", "--dtype": "float32",
             "--max-total-tokens": "4096", "--grammar-backend": "none", "--cuda-graph-backend-decode": "disabled",
             "--cuda-graph-backend-prefill": "disabled"}  # fmt: skip
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(untagged), "--port", port]
    command += [argument for pair in flags.items() for argument in pair]
    environment = os.environ | {"SGLANG_PLUGINS": "torch_cpu"}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [*command, "--admin-api-key", ADMIN_KEY], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as stock:  # fmt: skip
        try:
            until(lambda: is_healthy(url), 300)
            assert main(["doctor", "--security", "--url", url, "--body-wait", "2"]) == 1
            output = capsys.readouterr().out
            assert main(["doctor", "--security", "--url", url, "--body-wait", "0", "--json"]) == 1
            findings = json.loads(capsys.readouterr().out)["findings"]
            assert is_healthy(url)
        finally:
            os.killpg(stock.pid, signal.SIGKILL)
    assert ADMIN_KEY not in output
    assert "half a body is still waited for" in output
    states = {finding["name"]: finding["state"] for finding in findings}
    failing = {
        "keys in answers",
        "foreign pages (CORS)",
        "foreign Host",
        "size of a body",
        "n",
        "stop_regex",
        "sessions",
        "ids of requests",
    }
    assert {name for name, state in states.items() if state == "FAIL"} == failing
    assert {name for name, state in states.items() if state == "not probed"} == set(FAULTS) - failing - {
        "open without a key"
    }


def is_healthy(url: str) -> bool:
    try:
        return send(url, "/health_generate", None)[0] == 200
    except OSError:
        return False


async def send_and_leave(session: aiohttp.ClientSession, url: str, rid: str) -> None:
    """Start a request under an id, and close the connection after its first chunk."""
    async with session.post(f"{url}/generate", json=ATTACK | {"rid": rid}) as response:
        assert response.status == 200
        await response.content.readline()


async def generate(session: aiohttp.ClientSession, url: str, rid: str | None) -> tuple[str, list[int]]:
    """How an ordinary request ends, and its tokens."""
    sampling = {"max_new_tokens": 96, "ignore_eos": True, "temperature": 0}
    body = {"text": "The model thinks", "sampling_params": sampling} | ({"rid": rid} if rid else {})
    async with session.post(f"{url}/generate", json=body) as response:
        answer = await response.json()
    return answer["meta_info"]["finish_reason"]["type"], answer["output_ids"]


def test_no_id_ends_the_requests_of_others(server: Server):
    """The attack: three requests named "apr-", then "0" to "f", each closed after its first chunk."""
    asyncio.run(no_id_ends_the_requests_of_others(server))


async def no_id_ends_the_requests_of_others(server: Server) -> None:
    options: dict[str, Any] = {
        "mode": "parallel",
        "temperature": 0,
        "budget": apr.Budget(tokens=400, width=2),
    }
    async with (
        await HttpEngine.connect(server.url) as engine,
        aiohttp.ClientSession() as session,
    ):

        async def honest() -> tuple[list[Any], list[Any]]:
            trajectories = [apr.areason(engine, f"Question {i}:", "multiverse", **options) for i in range(3)]
            ordinary = [
                generate(session, server.url, rid) for rid in (None, None, "apr-victim", "apr-victim-1")
            ]
            results = await asyncio.gather(*trajectories, *ordinary)
            return [t.text for t in results[:3]], results[3:]

        alone = await honest()
        running = asyncio.create_task(honest())
        await asyncio.sleep(0.1)
        for rids in (["apr-"], ["apr-"], ["apr-"], "0123456789abcdef", ["apr-v", "a", "apr-victim-"]):
            assert not running.done(), "the attack came too late"
            await asyncio.gather(*(send_and_leave(session, server.url, rid) for rid in rids))
        texts, ordinary = await running
        assert [reason for reason, _ in ordinary] == ["length"] * 4
        assert ordinary == alone[1]
        assert texts == alone[0]


def test_an_id_ends_its_own_request_and_a_running_id_is_refused(server: Server):
    asyncio.run(an_id_ends_its_own_request_and_a_running_id_is_refused(server))


async def an_id_ends_its_own_request_and_a_running_id_is_refused(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/generate", json=ATTACK | {"rid": "mine-1"}) as response:
            await response.content.readline()
            duplicate = await session.post(f"{server.url}/generate", json=ATTACK | {"rid": "mine-1"})
            assert "Duplicate request ID" in await duplicate.text()
            await session.post(f"{server.url}/abort_request", json={"rid": "mine-"})  # no request has this id
            chunks = [await response.content.readline() for _ in range(4)]
            assert not any(b'"abort"' in chunk for chunk in chunks)
            await session.post(f"{server.url}/abort_request", json={"rid": "mine-1"})
            assert b'"type":"abort"' in await response.content.read()
        bad = await session.post(f"{server.url}/generate", json=ATTACK | {"rid": "a\nb"})
        assert (bad.status, "printable characters" in await bad.text()) == (400, True)
        waiting = [asyncio.create_task(generate(session, server.url, f"all-{i}")) for i in range(3)]
        await asyncio.sleep(0.1)
        await session.post(f"{server.url}/abort_request", json={"abort_all": True})
        assert "abort" in {reason for reason, _ in await asyncio.gather(*waiting)}
        batch = {"text": ["x", "y"], "rid": "batch", "sampling_params": {"max_new_tokens": 3, "n": 2}}
        async with session.post(f"{server.url}/generate", json=batch) as response:
            assert len(await response.json()) == 4


@pytest.mark.slow
def test_a_refused_id_does_not_end_the_request_that_has_it(server: Server):
    """SGLang would abort the id two seconds after the response to the refused request."""

    async def attack() -> bytes:
        body = ATTACK | {"rid": "victim"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{server.url}/generate", json=body) as response,
        ):
            await response.content.readline()
            duplicate = await session.post(f"{server.url}/generate", json=body)
            assert "Duplicate request ID" in await duplicate.text()
            return await response.content.read()

    assert b'"type":"length"' in asyncio.run(attack())


@pytest.mark.slow
def test_five_starts_and_stops_leave_nothing(
    forked_server: type[Server], untagged: Path, tmp_path: Path, new_folder: Callable[[], Path]
):
    folder, before = new_folder(), {path.name for path in SHARED_MEMORY.iterdir()}
    names, segments = set[str](), set[str]()
    threads, descriptors = threading.active_count(), psutil.Process().num_fds()
    for ending in (signal.SIGTERM, signal.SIGKILL, None, None, None):
        options = {"max_total_tokens": 2048, "context_length": 512, "enable_metrics": True}
        server = forked_server(untagged, log_path=tmp_path / "log", **options)
        with temporary_files_in(folder), server:
            pid = server.pid
            body = {"text": "x", "sampling_params": {"max_new_tokens": 2}}
            assert send(server.url, "/generate", None, body)[0] == 200
            names.add(server_folder_of(folder))
            assert "sglang:generation_tokens_total" in send(server.url, "/metrics", None)[1]
            assert {"counter", "histogram"} <= metrics_of(folder)
            segments |= shared_memory_of(pid)
            if ending is not None:
                os.kill(pid, ending)
                until(lambda pid=pid: pid not in in_session(pid))
        until(lambda pid=pid: not in_session(pid))
    assert len(names) == len([s for s in segments if s.startswith("sglang_load")]) == 5
    assert leftovers(folder) == set()
    left = {path.name for path in SHARED_MEMORY.iterdir()} - before
    assert not {name for name in left if name in segments or any(own in name for own in names)}
    del server
    assert threading.active_count() <= threads
    assert psutil.Process().num_fds() <= descriptors


@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing(untagged: Path, new_folder: Callable[[], Path]):
    folder, port = new_folder(), str(preflight.free_port())
    command = [
        *SERVE,
        "--model",
        str(untagged),
        "--port",
        port,
        "--max-total-tokens",
        "2048",
        "--api-key",
        KEY,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"TMPDIR": str(folder)}
    ) as launcher:  # fmt: skip
        assert launcher.stdout is not None
        assert launcher.stdout.readline().startswith("sgl-apr ready")
        (child,) = psutil.Process(launcher.pid).children()
        commands = [
            p.cmdline() for p in (psutil.Process(launcher.pid), child, *child.children(recursive=True))
        ]
        assert KEY not in str(commands)
        name, segments = server_folder_of(folder), shared_memory_of(child.pid)
        assert [s for s in segments if s.startswith("sglang_load") and name in s]
        launcher.kill()
    until(lambda: not in_session(child.pid))
    assert leftovers(folder) == set()
    assert not {path.name for path in SHARED_MEMORY.iterdir() if path.name in segments or name in path.name}
