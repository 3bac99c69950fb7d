"""Requests that a client may send to stop or delay a server, and the sockets that never finish one."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

GENERATE, COMPLETIONS, TOKENIZE, APR = "/generate", "/v1/completions", "/v1/tokenize", "/apr/generate"
Request = tuple[str, bytes]


def generate(sampling: dict[str, Any] | None = None, **fields: Any) -> Request:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 4, **(sampling or {})}, **fields}
    return GENERATE, json.dumps(body).encode()


def generate_ids(ids: Any, **fields: Any) -> Request:
    return GENERATE, json.dumps(
        {"input_ids": ids, "sampling_params": {"max_new_tokens": 4}, **fields}
    ).encode()


def post(path: str, **fields: Any) -> Request:
    return path, json.dumps(fields).encode()


def combined_schema(parts: int) -> str:
    return json.dumps(
        {
            "allOf": [
                {"anyOf": [{"type": "string", "pattern": f"a{i}"}, {"type": "integer"}]} for i in range(parts)
            ]
        }
    )


def chained_schema(length: int) -> str:
    """A schema of definitions that each refer to the next."""
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return json.dumps({"$defs": definitions, "allOf": [{"$ref": "#/$defs/d0"}]})


def chained_rules(length: int) -> str:
    """A grammar whose rules each have the next one twice."""
    rules = [f"r{i} ::= r{i + 1} r{i + 1} | r{i + 1}" for i in range(length)]
    return "\n".join(["root ::= r0", *rules, f'r{length} ::= "a"'])


def refused(size: int = 1) -> dict[str, Request]:
    """Requests that a server has to refuse, by what is wrong. `size` scales the large ones."""
    long_text, ids = "a b " * (500_000 * size), list(range(200)) * (5000 * size)
    return {
        "n": generate({"n": 1_000_000}),
        "n of completions": post(COMPLETIONS, model="default", prompt="a", n=1_000_000),
        "best_of": post(COMPLETIONS, model="default", prompt="a", best_of=1_000_000),
        "n of chats": post("/v1/chat/completions", model="default", messages=[{"role": "user", "content": "a"}], n=10**6),
        "n of messages": post("/v1/messages", model="x", max_tokens=1, n=10**6, messages=[{"role": "user", "content": "a"}]),
        "n of vertex": post("/vertex_generate", instances=[{"text": "a"}], parameters={"sampling_params": {"n": 10**6}}),
        "prompts": generate(text=["a"] * 2000),
        "prompts times n": generate({"n": 100}, text=["a"] * 20),
        "prompts of completions": post(COMPLETIONS, model="default", prompt=["a"] * 2000),
        "prompts of ids": generate_ids([[1]] * 2000),
        "documents": post("/v1/rerank", query="a", documents=["a"] * 2000),
        "items": post("/v1/score", query="a", items=["a"] * 2000, label_token_ids=[1], model="x"),
        "inputs": post("/v1/embeddings", input=["a"] * 2000, model="x"),
        "beam": generate({"beam_width": 100_000}),
        "long text": generate(text=long_text),
        "long text of completions": post(COMPLETIONS, model="default", prompt=long_text),
        "long text of tokenize": post(TOKENIZE, prompt=long_text),
        "long text of apr": post(APR, prompt=long_text),
        "long text of chats": post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": long_text}]),
        "long text of ollama": post("/api/generate", model="x", prompt=long_text),
        "many ids": generate_ids(ids),
        "many ids of apr": post(APR, input_ids=ids),
        "many ids of completions": post(COMPLETIONS, model="default", prompt=ids),
        "keys": post(APR, prompt="a", **{f"key{i}": 1 for i in range(60_000)}),
        "keys of sampling": generate({f"key{i}": 1 for i in range(60_000)}),
        "lists": (GENERATE, b'{"text": "a", "x": [' + b"[]," * (600_000 * size) + b"[]]}"),
        "batch of many ids": generate_ids([[1] * 1000] * 1020),
        "messages": post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": 5}] * 5000),
        "messages that are numbers": post("/v1/chat/completions", model="x", messages=[1] * 100_000),
        "tools that are numbers": post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": "a"}], tools=[1] * 100_000),
        "sampling_params that are numbers": generate(sampling_params=[1] * 100_000),
        "vectors": generate(text=None, input_embeds=[[0.5] * 500] * 500),
        "depth": (GENERATE, b'{"text": "a", "x": ' + b"[" * 500 + b"]" * 500 + b"}"),
        "stop_regex": generate({"stop_regex": "(?:.|.)*!"}),
        "stop_regex of completions": post(COMPLETIONS, model="default", prompt="a", stop_regex=["(?:.|.)*!"]),
        "stop_regex of chats": post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": "a"}], stop_regex="a"),
        "stop_regex by another name": generate({"stop_regex_strs": ["a"], "is_normalized": True}),
        "schema": generate({"json_schema": combined_schema(200)}),
        "long regex": generate({"regex": "|".join(f"a{i}" for i in range(20_000))}),
        "top_k": generate({"top_k": 2**31}),
        "top_k of completions": post(COMPLETIONS, model="default", prompt="a", top_k=2**40),
        "streamed top_k": generate({"top_k": 2**31}, stream=True),
        "top_k of ollama": post("/api/generate", model="x", prompt="a", options={"top_k": 2**40}, stream=False),
        "empty prompt": generate(text=""),
        "empty prompts": generate(text=["a", ""]),
        "streamed empty prompt": generate(text="", stream=True),
        "id above": generate_ids([10**6]),
        "id below": generate_ids([-1]),
        "ids of completions": post(COMPLETIONS, model="default", prompt=[10**6]),
        "bias above": generate({"logit_bias": {"1000000": 1.0}}),
        "infinite bias": generate({"logit_bias": {"5": 3e38}, "temperature": 1e-5}),
        "penalty": generate({"repetition_penalty": 1e-300}),
        "top_p": generate({"top_p": 1e-300}),
        "temperature": generate({"temperature": 1e308}),
        "logprob_start_len": generate(return_logprob=True, logprob_start_len=-5),
        "late logprob_start_len": generate(return_logprob=True, logprob_start_len=10**6),
        "list of logprob_start_len": generate(return_logprob=True, logprob_start_len=[1]),
        "top_logprobs": generate(return_logprob=True, top_logprobs_num=10**9),
        "list of top_logprobs": generate(return_logprob=True, top_logprobs_num=[5]),
        "logprobs of completions": post(COMPLETIONS, model="default", prompt="a", logprobs=10**9),
        "token_ids_logprob": generate(return_logprob=True, token_ids_logprob=[10**9]),
        "lora_id": generate(lora_id=["x"]),
        "overrides": generate(positional_embed_overrides=5),
        "session": generate(session_params={"foo": 1}),
        "session of a server": generate(session_params={"id": "a"}),
        "session that replaces": generate(session_params={"id": "a", "rid": "p", "replace": True}),
        "session of completions": post(COMPLETIONS, model="default", prompt="a", session_params={"id": "a"}),
        "session of chats": post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": "a"}], session_params={"id": "a"}),
        "session of vertex": post("/vertex_generate", instances=[{"text": "a"}], parameters={"session_params": {"id": "a"}}),
        "open_session": post("/open_session", capacity_of_str_len=1000),
        "named open_session": post("/open_session", capacity_of_str_len=1000, session_id="a", timeout=1.0),
        "close_session": post("/close_session", session_id="a"),
        "batch of stop ids": generate({"stop_token_ids": [1] * 900_000}, text=["a"] * 30),
        "batch of some stop ids": generate({"stop_token_ids": [1] * 4000}, text=["a"] * 1000),
        "batch of stops": generate({"stop": ["ab " * 1300] * 16}, text=["a"] * 100),
        "n of stops": generate({"stop": ["ab " * 1300] * 16, "n": 128}),
        "list of stops": generate(text=["a"] * 100, sampling_params=[{"stop": ["ab " * 1300] * 16}] * 100),
        "batch of salts": generate(text=["a"] * 100, extra_key="ab " * 8000),
        "custom_params": generate({"custom_params": {"a": ["b" * 20_000] * 4}}),
        "batch of custom_params": generate({"custom_params": {"a": ["b" * 20_000] * 3}}, text=["a"] * 100),
        "deep schema": generate({"json_schema": '{"allOf":[1],"x":' + "[" * 1000 + "]" * 1000 + "}"}),
        "chain of references": generate({"json_schema": chained_schema(500)}),
        "health check": generate(rid="HEALTH_CHECK_x"),
        "health checks": generate(text=["a", "b"], rid=["c", "HEALTH_CHECK_x"]),
        "health check of chats": post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": "a"}], rid="HEALTH_CHECK_x"),
        "health check of responses": post("/v1/responses", model="x", input="a", request_id="HEALTH_CHECK_x"),
        "health check of vertex": post("/vertex_generate", instances=[{"text": "a"}], parameters={"rid": "HEALTH_CHECK_x"}),
        "rules": generate({"ebnf": chained_rules(600)}),
        "many grammars": generate(text=["a"] * 9, sampling_params=[{"ebnf": chained_rules(i + 2)} for i in range(9)]),
        "sampling_params": generate(sampling_params=[]),
        "list of sampling_params": generate(sampling_params=[{}]),
        "list of rid": generate(rid=["a"]),
        "rid of embeddings": post("/v1/embeddings", input=["a", "b"], model="x", rid="a"),
    }  # fmt: skip


def half_sent(url: str, path: str = GENERATE, length: int = 1000) -> socket.socket:
    """Open a connection and send a request without the end of its body."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 80))
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + b'{"text": ')
    return connection


def half_sent_headers(url: str) -> socket.socket:
    """Open a connection and send a request without the end of its headers."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 80))
    connection.sendall(b"POST /generate HTTP/1.1\r\nHost: ")
    return connection
