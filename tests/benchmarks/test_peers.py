"""The thread-pool orchestrator of benchmarks.runtime.peers makes the same replies as the runtime, by the same requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

import sgl_apr as apr
from benchmarks.runtime import peers
from benchmarks.runtime.thread_pool import DIALECT, Reply, ThreadPoolOrchestrator, make_plan

TOKENIZER = apr.ByteTokenizer(DIALECT.tags)
OPTIONS = peers.OPTIONS | {"budget": apr.Budget(tokens=400, width=3, branch_tokens=40, outline_chars=8)}
FORK = (
    "so <Parallel>\n<Outlines>\n"
    + "".join(f"<Outline>{k}: o{k}</Outline>\n" for k in (1, 2, 3))
    + "</Outlines>"
)
PROMPTS = ["one?", "no end?", "lost?"]


def script(_: apr.Request | None, prompt: str) -> apr.Reply:
    if prompt.endswith("lost?"):
        return apr.Reply("<Parallel>\n<Outlines>\n<Outline>1: " + "x" * 500)
    if prompt.endswith("?"):
        return apr.Reply(FORK)
    if prompt.endswith("2:"):
        return apr.Reply(" never closed" * 9)
    if prompt.endswith(":"):
        return apr.Reply(" short.\n</Thread>")
    return apr.Reply(
        "<Conclusion>c</Conclusion>\n</Parallel>\nend" + ("less" * 99 if "no end" in prompt else "")
    )


class Completions(BaseHTTPRequestHandler):
    """Answers `/v1/completions` from the script, and keeps the bodies."""

    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        request = apr.Request(
            "r", tuple(TOKENIZER.encode(body["prompt"])), body["max_tokens"], grammar=body["ebnf"],
            stop_ids=tuple(body["stop_token_ids"]),
        )  # fmt: skip
        result = asyncio.run(apr.ScriptedEngine(script, TOKENIZER).decode(request))
        usage = {
            "prompt_tokens": result.prompt_tokens, "completion_tokens": len(result.token_ids), "total_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 1},
        }  # fmt: skip
        choice = {"index": 0, "finish_reason": result.finish, "text": TOKENIZER.decode(result.token_ids)}
        answer = json.dumps(
            {
                "id": "c",
                "object": "text_completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def replies() -> Iterator[tuple[list[Reply], list[dict[str, Any]]]]:
    """The replies of the orchestrator, and the bodies of its requests."""
    Completions.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    plan = asyncio.run(make_plan(TOKENIZER, OPTIONS))
    pool = ThreadPoolOrchestrator(f"http://127.0.0.1:{server.server_port}", plan, len(PROMPTS))
    try:
        yield pool.run(PROMPTS), Completions.bodies
    finally:
        pool.close()
        server.shutdown()
        server.server_close()
        thread.join()


def run_scripted(prompt: str) -> tuple[apr.Trajectory, list[apr.Request]]:
    engine = apr.ScriptedEngine(script, TOKENIZER)
    return asyncio.run(apr.areason(engine, prompt, DIALECT, pacing=None, **OPTIONS)), engine.requests


@pytest.mark.parametrize("index", [0, 1])
def test_both_clients_send_the_same_and_reply_the_same(
    index: int, replies: tuple[list[Reply], list[dict[str, Any]]]
):
    made, bodies = replies
    trajectory, requests = run_scripted(PROMPTS[index])
    reply = peers.from_trajectory(trajectory)
    assert (made[index].text, made[index].decoded) == (reply.text, reply.decoded)
    assert made[index].is_valid
    assert reply.is_valid

    def sent(prompt: str, *rest: object) -> tuple[object, ...]:
        return prompt, *rest

    by_runtime = {sent(TOKENIZER.decode(r.input_ids), r.max_tokens, r.grammar, r.stop_ids) for r in requests}
    by_pool = {
        sent(b["prompt"], b["max_tokens"], b["ebnf"], tuple(b["stop_token_ids"]))
        for b in bodies
        if b["prompt"].startswith(PROMPTS[index])
    }
    assert by_pool == by_runtime
    assert len(by_pool) == made[index].requests == reply.requests - 1 == 5, "the runtime commits"


def test_a_reply_whose_fork_is_cut_is_lost(replies: tuple[list[Reply], list[dict[str, Any]]]):
    reply = replies[0][2]
    assert not reply.is_valid
    assert (reply.requests, len(reply.decoded)) == (1, 1)


def measured(
    seconds: list[float], decoded: list[tuple[int, ...]], text: str = "7", wall_s: float = 9.0
) -> peers.Measured:
    made = [
        Reply(text, s, (s / 2, s / 4, s / 4), d, 5, 100, 60) for s, d in zip(seconds, decoded, strict=True)
    ]
    return peers.Measured(made, wall_s, {"client": 1.234})


def test_replies_of_other_lengths_are_not_compared():
    runtime = measured([1.0, 3.0, 50.0], [(1, 2), (3,), (9,)])
    pool = measured([2.0, 4.0, 1.0], [(1, 2), (3,), (8,)], wall_s=6.0)
    assert peers.compare(runtime, pool) == {
        "wall_ratio": 1.5, "reply_ratio": 0.667, "compared": 2, "same_text": 3,
    }  # fmt: skip
    lost = measured([2.0, 4.0, 1.0], [(1, 2), (3,), (8,)], text="<Parallel>")
    assert peers.compare(runtime, lost)["reply_ratio"] is None
    assert pool.figures() == {
        "wall_s": 6.0, "phases_s": [1.17, 0.58, 0.58], "cpu_s": {"client": 1.23}, "valid": 3, "prefilled_tokens": 120,
        "cached_tokens": 180, "decoded_tokens": 14, "requests": 15,
    }  # fmt: skip


def test_medians_and_bars():
    rounds = [
        {"reply_ratio": r, "wall_ratio": 1.1, "compared": 12, "same_text": 10} for r in (1.2, 0.9, None, 1.0)
    ]
    results = peers.summarize(rounds)
    assert results == {"reply_ratio": 1.0, "wall_ratio": 1.1, "compared": 12, "same_text": 10}
    assert peers.missed(results) == []
    assert peers.missed(results | {"reply_ratio": 1.01}) == ["reply_ratio 1.01 > 1.0"]
    assert peers.missed(results | {"compared": 0}) == ["no reply has as many tokens from both clients"]
