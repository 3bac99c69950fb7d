"""A server that reads a dialect from a file: it is listed, requests can name it, and no request can name a file."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.formats import dialects
from tests.support.paths import DOCS

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]
PAGE = (DOCS / "dialects.md").read_text()
GRAMMAR = re.search(r'```lark title="debate.lark"\n(.*?)```', PAGE, re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture(scope="module")
def url(
    forked_server: type[apr.Server], untagged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("own")
    path = folder / "debate.lark"
    path.write_text(GRAMMAR)
    before = dict(dialects._registered)
    with forked_server(untagged, log_path=folder / "log", apr_dialect=str(path)) as server:
        yield server.url
    dialects._registered.clear()
    dialects._registered.update(before)


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_is_listed_and_decoded(url: str):
    status, listed = ask(url, "/apr/dialects")
    names = [d["name"] for d in listed["dialects"]]
    assert (status, names) == (200, sorted({*names, "debate", "npr"}))
    budget = {"tokens": 300, "outline_chars": 8}
    status, trajectory = ask(
        url, "/apr/generate", {"prompt": "Tea? ", "dialect": "debate", "mode": "parallel", "budget": budget}
    )
    assert (status, trajectory.get("dialect")) == (200, "debate")
    text = apr.Trajectory.from_dict(trajectory).text
    assert apr.Dialect.from_source("debate", GRAMMAR).is_valid(text)


@pytest.mark.parametrize("name", ["debate.lark", "./debate", "/etc/passwd", "../debate", "x" * 5000, ""])
def test_no_request_names_a_file(url: str, name: str):
    status, answer = ask(url, "/apr/generate", {"prompt": "a", "dialect": name})
    assert status == 400
    assert "no dialect" in json.dumps(answer)
    assert len(json.dumps(answer)) < 1000


def test_the_command_line_runs_a_dialect_from_a_file(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (path := tmp_path / "debate.lark").write_text(GRAMMAR)
    budget = "tokens=300,outline_chars=8"
    arguments = [
        "run",
        "Tea? ",
        "--url",
        url,
        "--dialect",
        str(path),
        "--mode",
        "parallel",
        "--budget",
        budget,
        "--raw",
    ]
    assert main([*arguments, "--json"]) == 0
    trajectory = apr.Trajectory.from_json(capsys.readouterr().out)
    assert trajectory.dialect == "debate"
    assert trajectory.blocks
    assert apr.Dialect.from_file(path).is_valid(trajectory.text)
