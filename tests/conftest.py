"""The servers that a test run starts once, and how they start in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import locate_model, random_llama
from tests.support.forked_server import Nursery, share

SERVED = "pytest.mark.server"
GPU = has_accelerator()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one has all files with tests that ask a server, so that each is started once.

    With the slow ones that one would have most of the work, and files are taken as they come.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if "not slow" not in config.option.markexpr:
                return file
            return "servers" if SERVED in (config.rootpath / file).read_text(encoding="utf-8") else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Of several processes each computes on its share of the cores: threads beyond that wait for one another."""
    if threads := share():
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks a server says so, and what needs a GPU is skipped without one."""
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
        if "warm" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("server"):
            raise pytest.UsageError(f"{item.nodeid} asks a server, expected @{SERVED}")


@pytest.fixture(scope="session")
def warm() -> Iterator[type[Server]]:
    """Starts servers that need not import SGLang first, on the CPU."""
    nursery = Nursery()

    class Warm(Server):
        popen = staticmethod(nursery.popen)

    yield Warm
    nursery.close()


@pytest.fixture(scope="session")
def server(warm: type[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a random model that likes tags; those of all dialects are its tokens."""
    directory = tmp_path_factory.mktemp("served")
    tags = dict.fromkeys(tag for name in dialect_names() for tag in dialect(name).tags)
    random_llama(directory, tags=list(tags), tag_bias=5.0)
    with warm(directory, log_path=directory / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def solver(warm: type[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the model that comes with the package, which solves Countdown."""
    with warm(
        locate_model("builtin"), log_path=tmp_path_factory.mktemp("solver") / "log", **SERVER_OPTIONS
    ) as server:
        yield server


@pytest.fixture(scope="session")
def untagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without tags, for `checked`."""
    return random_llama(tmp_path_factory.mktemp("checked"), seed=3)


@pytest.fixture(scope="session")
def checked(warm: type[Server], untagged: Path) -> Iterator[Server]:
    """A small pool, and checks of it at every step: its log says what was wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
        patch.setenv("SGLANG_CHECK_KV_PAGE_INVARIANTS", "1")
        options = {"max_total_tokens": 4096, "context_length": 1024, "enable_custom_logit_processor": True}
        with warm(untagged, log_path=untagged / "log", **options) as server:
            yield server
