"""Servers that send what SGLang never sends: every client ends with this package's error, within time and memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine import http_client, http_response
from sgl_apr.engine.http_client import post_json, post_json_async
from tests.support.fake_sglang_server import TOKENIZER

Answer = Callable[[asyncio.StreamWriter], Any]
REQUEST = apr.Request("apr-1", (1, 2, 3), 8)


def event(ids: Any = (65,), finish: Any = None, **meta: Any) -> bytes:
    """One event of SGLang's stream, with some of its counts changed."""
    counts = {"finish_reason": finish, "prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 1} | meta
    data = {"output_ids": list(ids) if isinstance(ids, tuple) else ids, "meta_info": counts}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


END = event(finish={"type": "stop"}) + b"data: [DONE]\n\n"


def response(body: bytes, status: str = "200 OK", kind: str = "text/event-stream", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def hostile(answer: bytes | Answer, path: str = "/generate") -> AsyncIterator[str]:
    """A server that describes itself like SGLang, and answers `path` with exactly these bytes."""
    described = {
        "/model_info": {"tokenizer_path": "/nowhere/at.all"},
        "/server_info": {"grammar_backend": "llguidance"},
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked = head.split()[1]
            if asked != path:
                text = json.dumps(described.get(asked, {})).encode()
                writer.write(response(text, kind="application/json", Content_Length=str(len(text))))
            elif callable(answer):
                await answer(writer)
            else:
                writer.write(answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(asyncio.current_task())
            writer.close()

    def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    tasks: set[Any] = set()
    server = await asyncio.start_server(start, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def decoded(answer: bytes | Answer, timeout: float = 5.0, **request: Any) -> apr.Result:
    async def once() -> apr.Result:
        async with (
            hostile(answer) as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, timeout=timeout) as engine,
        ):
            return await engine.decode(apr.Request("apr-1", (1, 2, 3), 8, **request))

    return asyncio.run(once())


def test_what_sglang_sends_is_read():
    assert decoded(response(END)).token_ids == (65,)
    assert decoded(response(b": comment\n\n" + END.rstrip())).token_ids == (65,)
    assert decoded(response(END.replace(b"data: ", b"data:").replace(b"\n", b"\r\n"))).token_ids == (65,)


def test_a_line_of_many_megabytes_is_read():
    """SGLang repeats all ids and log-probabilities in each line, so that long ones are large."""
    padded = event(finish={"type": "stop"}, padding="x" * (5 << 20))
    assert decoded(response(padded + b"data: [DONE]\n\n")).token_ids == (65,)


WRONG_EVENTS = {
    "a count in words": (
        event(completion_tokens="x"),
        "completion_tokens is 'x', expected a number of tokens",
    ),
    "a negative count": (event(completion_tokens=-1), "completion_tokens is -1"),
    "a count that is true": (event(completion_tokens=True), "completion_tokens is True"),
    "no count": (b'data: {"output_ids": [], "meta_info": {}}\n\n', "completion_tokens is None"),
    "a prompt in words": (event(finish={"type": "stop"}, prompt_tokens="3"), "prompt_tokens is '3'"),
    "no cached tokens": (event(finish={"type": "stop"}, cached_tokens=None), "cached_tokens is None"),
    "a negative id": (event((-5,)), "a token id is -5, expected one of the vocabulary, 0 to "),
    "an id that is too large": (event((10**9,)), "a token id is 1000000000, expected one of the vocabulary"),
    "an id that is a real": (event((1.5,)), "a token id is 1.5"),
    "an id that is true": (event((True,)), "a token id is True"),
    "ids that are text": (event("abc"), "output_ids is str, expected a list of token ids"),
    "a reason in words": (event(finish="stop"), "finish_reason is 'stop'"),
    "a reason without a type": (event(finish={}), "finish_reason is {}"),
    "a list": (b"data: [1]\n\n", "a chunk is list, expected an object"),
    "null": (b"data: null\n\n", "a chunk is NoneType"),
    "an abort without counts": (
        b'data: {"meta_info": {"finish_reason": {"type": "abort", "message": "full"}}}\n\n',
        "aborted the request: full",
    ),
    "an error in words": (b'data: {"error": "no"}\n\n', "the server answered 500: no"),
    "an error with a wrong code": (b'data: {"error": {"code": "x"}}\n\n', "the server answered 500"),
    "100,000 brackets": (b"data: " + b"[" * 100_000 + b"\n\n", "nested too deeply"),
    "5,000 digits": (b"data: " + b"9" * 5000 + b"\n\n", "does not answer like an SGLang server"),
    "invalid UTF-8": (b'data: {"a": "\xff\xfe"}\n\n', "does not answer like an SGLang server"),
    "half a line": (b'data: {"output_ids": [1', "does not answer like an SGLang server"),
    "nothing": (b"", "without a finish reason"),
    "binary": (bytes(range(256)) * 64, "without a finish reason"),
}


@pytest.mark.parametrize("case", WRONG_EVENTS)
def test_an_event_that_sglang_does_not_send_is_an_engine_error(case: str):
    sent, message = WRONG_EVENTS[case]
    with pytest.raises(apr.EngineError) as raised:
        decoded(response(sent))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [None, "x", True, [None], [["x", 1]], [[float("nan"), 1]]])
def test_a_log_probability_that_is_no_number_is_an_engine_error(value: Any):
    sent = event(finish={"type": "stop"}, output_token_logprobs=value)
    if value is None:
        assert decoded(response(sent), logprobs=True).logprobs == ()
        return
    with pytest.raises(apr.EngineError, match=r"output_token_logprobs is|a log-probability is"):
        decoded(response(sent), logprobs=True)


async def comments(writer: asyncio.StreamWriter) -> None:
    writer.write(response(event()))
    while True:
        writer.write(b": still here\n\n")
        await writer.drain()
        await asyncio.sleep(0.1)


async def slow_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for k in range(1000):
        writer.write(f"X-{k}: 1\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.1)


async def slow_error(writer: asyncio.StreamWriter) -> None:
    writer.write(response(b"", "500 Oh"))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.1)


async def comments_after_the_end(writer: asyncio.StreamWriter) -> None:
    writer.write(response(END))
    await comments(writer)


@pytest.mark.parametrize("answer", [comments, pytest.param(slow_headers, marks=pytest.mark.slow)])
def test_bytes_without_data_do_not_hold_a_client(answer: Answer):
    began = time.monotonic()
    with pytest.raises(apr.EngineTimeout, match=r"did not answer within 0\.6 s"):
        decoded(answer, timeout=0.6)
    assert time.monotonic() - began < 15  # ten seconds are for the connection


def test_a_slow_error_and_comments_after_the_end_do_not_hold_a_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_response, "MAX_ERROR_BYTES", 4)
    with pytest.raises(apr.EngineError, match="the server answered 500: xxxx"):
        decoded(slow_error)
    assert decoded(comments_after_the_end, timeout=0.6).token_ids == (65,)


def test_a_line_and_a_body_without_end_are_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_response, "MAX_LINE_BYTES", 3 << 20)
    with pytest.raises(apr.EngineError, match="a line of more than 3 MiB"):
        decoded(response(b"data: " + b"9" * (8 << 20)))


RESPONSES = {
    "a redirect": (response(b"", "307 Moved", Location="http://127.0.0.1:9/x"), "it redirects to http://127.0.0.1:9/x"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", ""),
    "nothing": (b"", ""),
    "a truncated body": (response(b"data: {", Content_Length="100"), ""),
    "a wrong chunk": (response(b"zz\r\n", Transfer_Encoding="chunked"), ""),
    "no gzip": (response(b"plain", Content_Encoding="gzip"), ""),
    "half a gzip": (response(gzip.compress(END)[:30], Content_Encoding="gzip"), ""),
    "a long header": (response(b"", X="x" * 100_000), ""),
    "many headers": (response(b"", **{f"X{k}": "1" for k in range(5000)}), ""),
    "an unknown status": (response(b"hello", "799 What"), "answered 799: hello"),
    "no status": (b"HTTP/1.1 OK\r\n\r\n", ""),
    "another type": (response(b"<html>", kind="text/html"), ""),
    "an error that is no text": (response(b"\xff\xfe\x1b[2J", "400 No"), "answered 400: "),
    "an empty error": (response(b"", "503 No"), "answered 503"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESPONSES)
def test_a_response_that_is_none_is_an_engine_error(case: str):
    sent, message = RESPONSES[case]
    with pytest.raises(apr.EngineError) as raised:
        decoded(sent, timeout=2.0)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def bomb(size: int) -> bytes:
    """A gzip body that is a thousand times as large when it is decompressed."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(b"0" * (1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def test_a_gzip_bomb_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_response, "MAX_LINE_BYTES", 4 << 20)
    monkeypatch.setattr(http_response, "MAX_BODY_BYTES", 4 << 20)
    packed = bomb(256 << 20)
    began = time.monotonic()
    with pytest.raises(apr.EngineError, match=r"of more than 4 MiB|does not answer|broke off"):
        decoded(response(b"data: " + packed, Content_Encoding="gzip"))
    with pytest.raises(apr.EngineError, match=r"of more than 4 MiB|does not answer|broke off"):
        decoded(response(packed, Content_Encoding="gzip"))
    assert time.monotonic() - began < 5


WRONG_DESCRIPTIONS = {
    "/model_info": [b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b'{"tokenizer_path": 5}', b"9" * 5000],
    "/server_info": [
        b"[]", b'{"grammar_backend": []}', b'{"grammar_backend": "llguidance", "dp_size": "x"}',
        b'{"grammar_backend": "llguidance", "dp_size": -1}', b'{"a": ' + b"9" * 5000 + b"}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", WRONG_DESCRIPTIONS)
def test_a_server_that_describes_itself_otherwise_is_an_error(path: str):
    async def connect(answer: bytes) -> None:
        async with hostile(response(answer, kind="application/json"), path) as url:
            with pytest.raises((apr.EngineError, apr.UnsupportedEngine)):
                async with await apr.HttpEngine.connect(url, timeout=2.0):
                    pass

    for answer in WRONG_DESCRIPTIONS[path]:
        asyncio.run(connect(answer))


@pytest.mark.parametrize(
    "answer",
    [
        b'{"loads": "x"}', b'{"loads": [1]}', b'{"loads": [{}]}', b'{"loads": [{"num_running_reqs": "many"}]}', b"[]",
        b'{"loads": []}',
    ],
)  # fmt: skip
def test_a_load_that_is_none_is_an_engine_error(answer: bytes):
    async def once() -> None:
        async with (
            hostile(response(answer, kind="application/json"), "/v1/loads") as url,
            await apr.HttpEngine.connect(url, tokenizer=TOKENIZER, timeout=2.0) as engine,
        ):
            await engine.load()

    with pytest.raises(apr.EngineError):
        asyncio.run(once())


def test_a_request_that_is_no_json_is_an_error_of_the_caller():
    for value in ({1, 2}, float("nan")):
        with pytest.raises(apr.AprError, match="the request cannot be written as JSON"):
            decoded(response(END), sampling={"temperature": value})


# Single requests


@pytest.fixture
def served() -> Iterator[Callable[[bytes | Answer], str]]:
    """Starts hostile servers in another thread, for clients that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    contexts: list[Any] = []

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    def serve(answer: bytes | Answer) -> str:
        contexts.append(hostile(answer, "/x"))
        return f"{wait(contexts[-1].__aenter__())}/x"

    yield serve
    for context in contexts:
        wait(context.__aexit__(None, None, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def blocking(url: str, timeout: float = 2.0) -> Any:
    return post_json(url, {}, timeout=timeout)


def awaiting(url: str, timeout: float = 2.0) -> Any:
    return asyncio.run(post_json_async(url, {}, timeout=timeout))


@pytest.mark.parametrize("post", [blocking, awaiting])
def test_single_requests(post: Callable[..., Any], served: Any, monkeypatch: pytest.MonkeyPatch):
    for name, (sent, message) in RESPONSES.items():
        if name == "nothing":
            continue
        with pytest.raises(apr.EngineError) as raised:
            post(served(sent))
        assert message in str(raised.value), name
        assert "\n" not in str(raised.value)
    for body in (b"[" * 100_000, b"9" * 5000, b"\xff", b"", b"{"):
        with pytest.raises(apr.EngineError, match="no answer from"):
            post(served(response(body, kind="application/json")))
    for module in (http_client, http_response):
        monkeypatch.setattr(module, "MAX_BODY_BYTES", 2 << 20)
    with pytest.raises(apr.EngineError, match="a response of more than 2 MiB"):
        post(served(response(b"0" * (4 << 20), kind="application/json")))
    with pytest.raises(apr.AprError, match="cannot be written as JSON"):
        asyncio.run(post_json_async("http://127.0.0.1:9", {"a": {1}}))
    monkeypatch.setattr(http_client, "BODY_S", 0.2)
    with pytest.raises(apr.EngineTimeout, match=r"did not answer within 0\.4 s"):
        post(served(comments), 0.4)
    for url in (
        "nonsense",
        "http://",
        "ftp://127.0.0.1:9/x",
        "http://[::1",
        "file:///etc/passwd",
        "http://a b/",
    ):
        with pytest.raises(apr.EngineError):
            post(url)
