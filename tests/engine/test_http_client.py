"""Single requests: their JSON, and what goes wrong as this package's errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.http_client import check_exists, post_json, post_json_async

RESPONSES = {
    "/ok": (200, '{"answer": 42}'),
    "/refused": (400, '{"error": {"message": "no such model"}}'),
    "/plain": (503, "try again\nlater"),
    "/html": (200, "<html>"),
}
NO_SERVER = "http://127.0.0.1:9"


def blocking(url: str, body: dict, **options: Any) -> Any:
    return post_json(url, body, **{"timeout": 10.0} | options)


def awaiting(url: str, body: dict, **options: Any) -> Any:
    return asyncio.run(post_json_async(url, body, **options))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/slow":
                time.sleep(1.0)
            echo = json.dumps({"body": json.loads(body), "key": self.headers["Authorization"]})
            self.answer(*RESPONSES.get(self.path, (200, echo)))

        def do_HEAD(self) -> None:
            self.answer(RESPONSES[self.path][0], "")

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if text.startswith("<") else "application/json")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that did not wait
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("post", [blocking, awaiting])
def test_json_goes_out_and_comes_back(url: str, post: Callable[..., Any]):
    assert post(f"{url}/echo", {"a": 1}, api_key="k") == {"body": {"a": 1}, "key": "Bearer k"}
    assert post(f"{url}/echo", {}) == {"body": {}, "key": None}


@pytest.mark.parametrize("post", [blocking, awaiting])
@pytest.mark.parametrize(
    ("path", "message", "status"),
    [
        ("/refused", "/refused: the server answered 400: no such model", 400),
        ("/plain", "/plain: the server answered 503: try again later", 503),
        ("/html", "no answer from .*/html", None),
    ],
)
def test_errors_have_the_message_and_the_status(
    url: str, post: Callable[..., Any], path: str, message: str, status: int | None
):
    with pytest.raises(apr.EngineError, match=message) as raised:
        post(url + path, {})
    assert raised.value.status == status


@pytest.mark.parametrize("post", [blocking, awaiting])
def test_no_server_and_a_slow_one(url: str, post: Callable[..., Any]):
    with pytest.raises(apr.EngineError, match=f"no answer from {NO_SERVER}"):
        post(NO_SERVER, {})
    with pytest.raises(apr.EngineTimeout, match=r"did not answer within 0.1 s"):
        post(f"{url}/slow", {}, timeout=0.1)


def test_a_url_exists_or_not(url: str):
    check_exists(f"{url}/ok", timeout=10.0)
    with pytest.raises(apr.EngineError, match="answered 400") as raised:
        check_exists(f"{url}/refused", timeout=10.0)
    assert raised.value.status == 400
    with pytest.raises(apr.EngineError, match="no answer from"):
        check_exists(NO_SERVER, timeout=10.0)
