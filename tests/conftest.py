"""The one server that a test run starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sgl_apr.dialects import dialect, dialect_names
from sgl_apr.models import random_llama
from sgl_apr.server.launch import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a random model that likes tags; those of all dialects are its tokens. Starting it takes 20-90 s."""
    directory = tmp_path_factory.mktemp("served")
    tags = dict.fromkeys(tag for name in dialect_names() for tag in dialect(name).tags)
    random_llama(directory, tags=list(tags), tag_bias=5.0)
    with Server(directory, log_path=directory / "server.log") as server:
        yield server
