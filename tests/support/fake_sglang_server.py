"""A server with SGLang's HTTP API that fails on demand, in ways that a real server rarely does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

import sgl_apr as apr
from sgl_apr.engine.routing import ROUTING_KEY_HEADER
from tests.support.threadweaver_traces import TAGS

FORK = "<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Outlines>"
REPLIES = {
    "trunk": "Think. " + FORK,
    "branch 1": " one\n</Thread>",
    "branch 2": " two is longer\n</Thread>",
    "after": "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone.",
}
GEN = "gen"  # what a gen decodes
TOKENIZER = apr.ByteTokenizer(TAGS)


def phase_of(prompt: str) -> str:
    if prompt.endswith(("1:", "2:")):
        return f"branch {prompt[-2]}"
    return "after" if prompt.endswith("</Thread>\n") else "trunk"


class SglangServer:
    """Answers the requests of one trajectory. `failures` maps a phase to a failure (see `_fail`)."""

    def __init__(self, *, incremental: bool = False, info: dict | None = None, **failures: str) -> None:
        self.failures = {phase.replace("_", " "): failure for phase, failure in failures.items()}
        self.incremental = incremental
        self.info = {"grammar_backend": "llguidance", **(info or {})}
        self.rids: dict[str, str] = {}  # by phase
        self.aborted: set[str] = set()
        self.rendered = 0  # chats
        self.live: set[str] = set()
        self.headers: list[str | None] = []
        self.bodies: list[tuple[dict, str]] = []  # of /generate, each with its routing key
        self.connections: list[int] = []  # by the client's port
        self.intervals: dict[str, list[int | None]] = {}  # by phase, what each request set
        self.chunks: dict[str, int] = {}  # by phase

    def reply(self, phase: str, prompt: str) -> str:
        """What is decoded in a phase, after a prompt."""
        return REPLIES.get(phase, "")

    @contextmanager
    def in_thread(self) -> Iterator[str]:
        """Serve in another thread, for callers that block."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        def wait(work: Coroutine[None, None, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(10)

        context = self.running()
        try:
            yield wait(context.__aenter__())
        finally:
            try:
                wait(context.__aexit__(None, None, None))
            finally:  # a thread that stays would keep the process from ending
                loop.call_soon_threadsafe(loop.stop)
                thread.join()
                loop.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health", self._health)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/tokenize", self._tokenize)
        server = TestServer(app)
        await server.start_server()
        try:
            yield str(server.make_url("")).rstrip("/")
        finally:
            await server.close()

    async def _model_info(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers.get("Authorization"))
        return web.json_response({"tokenizer_path": "/nowhere/at.all", "model_path": "/nowhere/at.all"})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.rendered += 1
        return web.json_response({"error": {"message": "chat_template is not set"}}, status=400)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.add((await request.json())["rid"])
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append((body, request.headers.get(ROUTING_KEY_HEADER, "")))
        sampling = body["sampling_params"]
        if not body.get("stream"):
            return self._answer_at_once(body)
        phase = phase_of(TOKENIZER.decode(body["input_ids"])) if sampling["max_new_tokens"] else "commit"
        rid, failure = body["rid"], self.failures.get(phase)
        self.rids[phase] = rid
        self.connections.append(request.transport.get_extra_info("peername")[1])
        interval = sampling.get("stream_interval")
        self.intervals.setdefault(phase, []).append(interval)
        if interval and "stream_interval" not in self.info:
            return web.json_response(
                {"error": {"message": "Unexpected keyword 'stream_interval'"}}, status=400
            )
        if failure == "status 500":
            return web.json_response({"error": {"message": "out of memory"}}, status=500)
        self.live.add(rid)
        try:
            return await self._stream(
                request,
                rid,
                len(body["input_ids"]),
                self.reply(phase, TOKENIZER.decode(body["input_ids"])),
                phase,
                failure,
                interval or 1,
            )
        finally:
            self.live.discard(rid)

    def _answer_at_once(self, body: dict) -> web.Response:
        """Answer a request of a program's own expressions, without a stream: `GEN` after each prompt."""
        if self.failures.get("gen") == "status 500":
            return web.json_response({"error": {"message": "out of memory"}}, status=500)
        text = body.get("text")  # of a program with an image
        if isinstance(text, str):
            prompts: Any = TOKENIZER.encode(text)
        else:
            prompts = [TOKENIZER.encode(one) for one in text] if text else body["input_ids"]
        if isinstance(prompts[0], int):
            return web.json_response(self._complete_answer(body, prompts))
        return web.json_response([self._complete_answer(body, ids) for ids in prompts])

    def _complete_answer(self, body: dict, prompt: list[int]) -> dict:
        text = GEN[: body["sampling_params"]["max_new_tokens"]]
        scored = prompt[body.get("logprob_start_len") or 0 :] if body.get("return_logprob") else []
        meta = {
            "id": "x", "finish_reason": {"type": "length"}, "prompt_tokens": len(prompt), "cached_tokens": 0,
            "completion_tokens": len(text), "output_token_logprobs": [],
            "input_token_logprobs": [[-1.0 - i / 1000, i, TOKENIZER.decode([i])] for i in scored],
        }  # fmt: skip
        return {"text": text, "output_ids": TOKENIZER.encode(text), "meta_info": meta}

    async def _stream(
        self,
        request: web.Request,
        rid: str,
        prompt: int,
        text: str,
        phase: str,
        failure: str | None,
        interval: int,
    ) -> web.StreamResponse:
        sent = 0
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        fails = failure not in (None, "is slow")
        ids: list[int] = TOKENIZER.encode(text)
        if not text.endswith((">", "]")) and text:
            ids.append(TOKENIZER.EOS)
        for n in range(1, len(ids) + 1):
            await asyncio.sleep(1.0 if failure == "is slow" else 0)
            if rid in self.aborted:
                return response
            if n == 3 and fails:
                await self._fail(request, response, str(failure))
                return response
            if n in (1, len(ids)) or n - sent >= interval:
                await self._chunk(response, ids, n, prompt, {"type": "stop"} if n == len(ids) else None, sent)
                self.chunks[phase], sent = self.chunks.get(phase, 0) + 1, n
        if fails:  # a commit, which decodes nothing
            await self._fail(request, response, str(failure))
        elif not ids:
            await self._chunk(response, ids, 0, prompt, {"type": "length"})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _chunk(
        self,
        response: web.StreamResponse,
        ids: list[int],
        n: int,
        prompt: int,
        finish: dict | None,
        sent: int = 0,
    ) -> None:
        meta = {
            "finish_reason": finish,
            "prompt_tokens": prompt,
            "cached_tokens": 0,
            "completion_tokens": n,
        }
        new = ids[sent:n] if self.incremental else ids[:n]
        data = {"text": TOKENIZER.decode(ids[:n]), "output_ids": new, "meta_info": meta}
        await response.write(f"data: {json.dumps(data)}\n\n".encode())

    async def _fail(self, request: web.Request, response: web.StreamResponse, failure: str) -> None:
        match failure:
            case "dies":
                assert request.transport is not None
                request.transport.abort()
            case "stops sending":
                await asyncio.sleep(3600)
            case "ends early":
                await response.write(b"data: [DONE]\n\n")
            case "aborts":
                await self._chunk(response, [5], 1, 1, {"type": "abort", "message": "scheduler restarts"})
            case "reports an error":
                await response.write(b'data: {"error": {"message": "KV cache is full", "code": 507}}\n\n')
            case "sends no JSON":
                await response.write(b"data: {not json\n\n")
            case "sends another protocol":
                await response.write(b'data: {"hello": 1}\n\n')
