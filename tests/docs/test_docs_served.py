"""README and the pages of the documentation that talk to a server, as they stand: what they show runs, and prints what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

import sgl_apr as apr
from tests.support.doc_runner import PAGES, ROOT, name, run, server_of

# One evaluates, one shows calls that the tutorial and the page about the server show too, and one takes as long as two others.
SLOW = ("evaluating.md", "coming-from.md", "agents.md")
SERVED = [
    pytest.param(page, marks=pytest.mark.slow if name(page) in SLOW else (), id=name(page))
    for page in (ROOT / "README.md", *PAGES)
    if server_of(page)
]


@pytest.mark.server
@pytest.mark.parametrize("page", SERVED)
def test_what_a_page_shows_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, forked_server
):
    monkeypatch.setattr(apr, "Server", forked_server)  # the same servers, started faster
    run(page, tmp_path, request.getfixturevalue(server_of(page)).url, monkeypatch)
