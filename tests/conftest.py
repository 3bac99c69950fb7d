"""The one server that a test run starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sgl_apr.dialects import dialect
from sgl_apr.models import random_llama
from sgl_apr.server.launch import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a random model that likes the tags of `threadweaver`, its tokens; starting it takes 20-90 s."""
    directory = tmp_path_factory.mktemp("served")
    random_llama(directory, tags=dialect("threadweaver").tags, tag_bias=5.0)
    with Server(directory, log_path=directory / "server.log") as server:
        yield server
