"""Fixtures for the servers that a test run starts once, and how pytest distributes the tests that use them."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.formats import branch_prompts, dialects
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model, random_llama
from tests.support.forked_server import ForkServer, cores_per_worker

SERVER_MARK = "pytest.mark.server"
SPLIT = ("tests/docs/test_docs_served.py",)  # a minute for some of its tests: workers share them
TOOL_DIALECTS = ("threadweaver", "multiverse", "spawn")
CALL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
OPERATOR_TOOLS = """
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b
"""
GPU = has_accelerator()
GC_THRESHOLD = 10_000  # objects: importing SGLang takes a fifth longer at Python's own threshold


def pytest_configure() -> None:
    """Collect no garbage while all test modules are imported: it takes seconds and finds nothing."""
    gc.disable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, give all files that use one server to one of them, so that it starts once.

    With the slow tests that worker would have most of the work, so files are then distributed as they come.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if "not slow" not in config.option.markexpr:
                return file
            if file in SPLIT:
                return nodeid
            return shared_server(config.rootpath / file) or file

    return Scheduling(config, log)


def shared_server(path: Path) -> str | None:
    """The fixture of the shared server that the tests of a file use, if they use one."""
    text = path.read_text(encoding="utf-8")
    used = re.findall(
        r"^ *(?:async )?def \w+\([^)]*\b(server|solver|checked|tool_server)\b", text, re.MULTILINE
    )
    own = re.findall(r"^def (server|solver|checked|tool_server)\(", text, re.MULTILINE)
    return next(
        (name for name in ("server", "solver", "checked", "tool_server") if name in used and name not in own),
        None,
    )


def pytest_collection_finish() -> None:
    """Collect garbage again, and let each of several workers compute on its share of the cores.

    More threads than cores wait for one another.
    """
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()
    if threads := cores_per_worker():
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU, check that server tests are marked, and begin with their files.

    These take longest. At the end, short files keep all workers busy.
    """
    served = {item.path for item in items if item.get_closest_marker("server")}
    items.sort(key=lambda item: item.path not in served)
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
        if "forked_server" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("server"):
            raise pytest.UsageError(f"{item.nodeid} uses a server, expected @{SERVER_MARK}")


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Forget the dialects and the branch prompts that a test registers, as commands do that name a grammar file."""
    registered = (dialects._registered, branch_prompts._registered)
    before = [dict(registry) for registry in registered]
    yield
    for registry, content in zip(registered, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture(scope="session")
def forked_server() -> Iterator[Any]:
    """A `Server` class whose servers start on the CPU, without importing SGLang again.

    `stop_soon` stops a server in a thread: a stop takes seconds, and at the end of a session there are several.
    """
    fork_server = ForkServer()

    with ThreadPoolExecutor() as stopping:

        class ForkedServer(Server):
            popen = staticmethod(fork_server.popen)

            def stop_soon(self) -> None:
                stopping.submit(self.stop)

        yield ForkedServer
    fork_server.close()


@pytest.fixture(scope="session")
def server(forked_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a random model that often writes tags. The tags of all dialects are its tokens."""
    directory = tmp_path_factory.mktemp("served")
    tags = dict.fromkeys(tag for name in dialect_names() for tag in dialect(name).tags)
    random_llama(directory, tags=list(tags), tag_bias=5.0)
    server = forked_server(directory, log_path=directory / "server.log").start()
    yield server
    server.stop_soon()


@pytest.fixture(scope="session")
def solver(forked_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the model that comes with the package, which solves Countdown."""
    log_path = tmp_path_factory.mktemp("solver") / "log"
    server = forked_server(locate_model("builtin"), log_path=log_path, **SERVER_OPTIONS).start()
    yield server
    server.stop_soon()


@pytest.fixture(scope="session")
def tool_server(forked_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a random model that often writes the tags of formats and of calls. It has tools of its own."""
    from tests.support.chat_templates import QWEN

    directory = tmp_path_factory.mktemp("tools")
    tags = dict.fromkeys(tag for name in TOOL_DIALECTS for tag in dialect(name).tags)
    random_llama(directory, tags=[*tags, *CALL_TAGS], tag_bias=5.0)
    (template := directory / "qwen.jinja").write_text(QWEN)
    (directory / "operator_tools.py").write_text(OPERATOR_TOOLS)
    flags = {"chat_template": str(template), "tool_call_parser": "qwen25", "apr_tools": "operator_tools:add"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        server = forked_server(directory, log_path=directory / "log", apr_tool_wait=20, **flags).start()
    yield server
    server.stop_soon()


@pytest.fixture(scope="session")
def untagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without tags, which `checked` serves."""
    return random_llama(tmp_path_factory.mktemp("checked"), seed=3)


@pytest.fixture(scope="session")
def checked(forked_server: Any, untagged: Path) -> Iterator[Server]:
    """A server with a small KV pool that SGLang checks at every step. It logs what is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
        patch.setenv("SGLANG_CHECK_KV_PAGE_INVARIANTS", "1")
        options = {"max_total_tokens": 4096, "context_length": 1024, "enable_custom_logit_processor": True}
        server = forked_server(untagged, log_path=untagged / "log", **options).start()
    yield server
    server.stop_soon()
