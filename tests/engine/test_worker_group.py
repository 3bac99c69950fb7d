"""Groups of workers over HTTP: what is sent, the chunks of several workers, their errors, aborts, and who refuses them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

import sgl_apr as apr
from sgl_apr.engine.base import GroupRequest, Request, Result
from sgl_apr.engine.routing import dp_rank
from sgl_apr.engine.sequential import SequentialEngine
from sgl_apr.engine.worker_group import GROUP_SETTINGS, group_kinds
from tests.support.fake_sglang_server import TOKENIZER, SglangServer

SETTINGS = {"radix_cache_backend": "apr", "page_size": 1, "attention_backend": "apr_cpu"}
Chunks = Callable[["GroupServer", dict], AsyncIterator[dict]]


def chunk(index: int, ids: list[int], finish: dict | None = None, **meta: Any) -> dict:
    info = {
        "finish_reason": finish,
        "prompt_tokens": 5,
        "cached_tokens": 3,
        "completion_tokens": len(ids),
        **meta,
    }
    return {"index": index, "output_ids": ids, "text": "", "meta_info": info}


class GroupServer(SglangServer):
    """Answers a batch with chunks of a script; a string in place of a chunk is sent as it is, None breaks off."""

    def __init__(self, chunks: Chunks, **info: Any) -> None:
        super().__init__(info={**SETTINGS, **info})
        self.chunks_of, self.body = chunks, {}

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for data in self.chunks_of(self, self.body):
            if data is None:
                assert request.transport
                request.transport.abort()
                return response
            await response.write(f"data: {json.dumps(data)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


def group_of(*headers: str, kind: Any = "group_think", **options: Any) -> GroupRequest:
    requests = tuple(
        Request(f"apr-x-{k}", (1, 2, 3, *header.encode()), 4, **options) for k, header in enumerate(headers)
    )
    return GroupRequest(kind, requests, 3, "\n" if kind == "hogwild" else None)


@asynccontextmanager
async def connected(server: GroupServer) -> AsyncIterator[apr.HttpEngine]:
    async with server.running() as url, await apr.HttpEngine.connect(url, tokenizer=TOKENIZER) as engine:
        yield engine


def decode(
    server: GroupServer, group: GroupRequest
) -> tuple[list[Result | apr.EngineError], list[list[int]], list[tuple[int, Any]]]:
    """The outcomes of a group, the ids that arrived for each worker, and the order in which workers ended."""

    async def run() -> Any:
        received: list[list[int]] = [[] for _ in group.requests]
        ended: list[tuple[int, Any]] = []
        async with connected(server) as engine:
            outcomes = await engine.group(
                group, [own.extend for own in received], lambda *end: ended.append(end)
            )
            assert not engine._active_rids
        return list(outcomes), received, ended

    return asyncio.run(asyncio.wait_for(run(), 20))


async def in_step(server: GroupServer, body: dict) -> AsyncIterator[dict]:
    yield chunk(1, [7])
    yield chunk(0, [5])
    yield chunk(0, [5, 6], {"type": "stop"}, output_token_logprobs=[[-0.5, 5, None], [-1.5, 6, None]])
    yield chunk(1, [7, 8, 9, 10], {"type": "length"})


def test_one_batch_and_a_result_for_each_worker():
    server = GroupServer(in_step)
    outcomes, received, ended = decode(
        server, group_of("a", "bb", sampling={"temperature": 0.5}, logprobs=True)
    )
    assert [(r.token_ids, r.finish, r.cached_tokens) for r in outcomes if isinstance(r, Result)] == [
        ((5, 6), "stop", 3), ((7, 8, 9, 10), "length", 3),
    ]  # fmt: skip
    assert outcomes[0].logprobs == (-0.5, -1.5)  # type: ignore[union-attr]
    assert received == [[5, 6], [7, 8, 9, 10]]
    assert ended == [(0, outcomes[0]), (1, outcomes[1])]
    body = server.body
    assert body["rid"] == ["apr-x-0", "apr-x-1"]
    assert body["input_ids"] == [[1, 2, 3, 97], [1, 2, 3, 98, 98]]
    assert body["return_logprob"]
    assert [s["custom_params"]["apr_group"] for s in body["sampling_params"]] == [
        {"kind": "group_think", "worker": k, "workers": 2, "prompt_tokens": 3, "position_range": 2 + 4 + 1}
        for k in (0, 1)
    ]
    assert all(s["temperature"] == 0.5 and s["max_new_tokens"] == 4 for s in body["sampling_params"])
    decode(server, group_of("a", "b", kind="hogwild"))
    assert [s["custom_params"]["apr_group"] for s in server.body["sampling_params"]] == [
        {"kind": "hogwild", "worker": k, "workers": 2, "prompt_tokens": 3, "step_end": "\n"} for k in (0, 1)
    ]


def test_a_chunk_may_have_more_ids_than_it_counts():
    """SGLang's chunks of a batch refer to a list that grows while they wait."""

    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[dict]:
        logprobs = [[-1.0, 5, None], [-2.0, 6, None], [-3.0, 7, None]]
        yield chunk(0, [5, 6], completion_tokens=1, output_token_logprobs=logprobs[:2])
        yield chunk(0, [5, 6, 7], completion_tokens=2, output_token_logprobs=logprobs)
        yield chunk(0, [5, 6, 7], {"type": "stop"}, output_token_logprobs=logprobs)

    (result,), received, _ = decode(GroupServer(chunks), group_of("a", logprobs=True))
    assert isinstance(result, Result)
    assert (result.token_ids, result.logprobs, received) == ((5, 6, 7), (-1.0, -2.0, -3.0), [[5, 6, 7]])


def test_incremental_chunks_have_the_new_ids_only():
    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[dict]:
        yield chunk(0, [5, 6], completion_tokens=2)
        yield chunk(0, [7], completion_tokens=3)
        yield chunk(0, [8, 9], {"type": "stop"}, completion_tokens=5)

    (result,), _, _ = decode(GroupServer(chunks), group_of("a"))
    assert result.token_ids == (5, 6, 7, 8, 9)  # type: ignore[union-attr]


def test_an_error_stays_with_its_worker():
    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[dict]:
        yield chunk(0, [5])
        yield chunk(1, [7], {"type": "abort", "message": "worker group: gone", "status_code": 503})
        yield chunk(0, [5, 6], {"type": "stop"})

    outcomes, received, _ = decode(GroupServer(chunks), group_of("a", "b"))
    assert isinstance(outcomes[0], Result)
    assert isinstance(outcomes[1], apr.EngineError)
    assert outcomes[1].status == 503
    assert "worker group: gone" in str(outcomes[1])
    assert received == [[5, 6], [7]]


def test_what_ends_the_response_ends_those_that_run():
    async def broken(server: GroupServer, body: dict) -> AsyncIterator[Any]:
        yield chunk(0, [5], {"type": "stop"})
        yield chunk(1, [7])
        yield None

    async def complaint(server: GroupServer, body: dict) -> AsyncIterator[Any]:
        yield chunk(0, [5], {"type": "stop"})
        yield {"error": {"message": "out of memory", "code": 507}}

    for chunks, message in ((broken, "broke off"), (complaint, "507: out of memory")):
        outcomes, _, ended = decode(GroupServer(chunks), group_of("a", "b"))
        assert isinstance(outcomes[0], Result)
        assert message in str(outcomes[1])
        assert [k for k, _ in ended] == [0, 1]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"error": {"message": "worker group: too long", "code": 400}}, "400: worker group: too long"),
        (None, "broke off"),
        (chunk(2, [5]), "index"),
        ({**chunk(0, [5]), "index": None}, "index"),
        ("", "chunk"),
    ],
)
def test_a_group_that_fails_before_any_worker_has_ended(last: Any, message: str):
    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[Any]:
        yield chunk(0, [5])
        yield last

    with pytest.raises(apr.EngineError, match=message):
        decode(GroupServer(chunks), group_of("a", "b"))


def test_a_chunk_after_the_end_of_its_worker_is_an_error():
    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[Any]:
        yield chunk(0, [5], {"type": "stop"})
        yield chunk(0, [5, 6])

    outcomes, _, _ = decode(GroupServer(chunks), group_of("a", "b"))
    assert "a worker that has not ended" in str(outcomes[1])


def test_one_worker_is_aborted_and_the_other_goes_on():
    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[Any]:
        yield chunk(0, [5])
        yield chunk(1, [7])
        while "apr-x-1" not in server.aborted:
            await asyncio.sleep(0.01)
        yield chunk(1, [7, 8], {"type": "abort", "message": "Aborted"})
        yield chunk(0, [5, 6], {"type": "stop"})

    async def run() -> None:
        server = GroupServer(chunks)
        async with connected(server) as engine:
            aborted: list[Any] = []

            def abort(ids: Any) -> None:
                if not aborted:
                    aborted.append(asyncio.create_task(engine.abort("apr-x-1")))

            first, second = await engine.group(group_of("a", "b"), [None, abort])
            assert isinstance(first, Result)
            assert "aborted the request" in str(second)
        assert server.aborted == {"apr-x-1"}

    asyncio.run(asyncio.wait_for(run(), 20))


def test_cancelling_aborts_all_workers():
    async def chunks(server: GroupServer, body: dict) -> AsyncIterator[Any]:
        yield chunk(0, [5])
        await asyncio.sleep(30)

    async def run() -> None:
        server = GroupServer(chunks)
        async with connected(server) as engine:
            started = asyncio.Event()
            work = asyncio.create_task(engine.group(group_of("a", "b"), [lambda ids: started.set(), None]))
            await started.wait()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
        assert server.aborted == {"apr-x-0", "apr-x-1"}

    asyncio.run(asyncio.wait_for(run(), 20))


def test_all_workers_go_to_one_rank():
    server = GroupServer(in_step, dp_size=4)
    decode(server, group_of("a", "b"))
    assert server.body["routed_dp_rank"] == dp_rank("apr-x", 4)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, {"group_think", "hogwild"}),
        ({"attention_backend": "triton"}, {"group_think"}),
        ({"attention_backend": "fa3", "decode_attention_backend": "flashinfer"}, {"group_think", "hogwild"}),
        ({"attention_backend": "flashinfer", "decode_attention_backend": "fa3"}, {"group_think"}),
        ({"radix_cache_backend": None}, set()),
        ({"page_size": 16}, set()),
        ({"pp_size": 2}, set()),
        ({"enable_mixed_chunk": True}, set()),
        ({"enable_dp_attention": True}, set()),
        ({"speculative_algorithm": "NGRAM"}, set()),
    ],
)
def test_the_kinds_that_a_server_decodes(change: dict, kinds: set):
    assert group_kinds({**dict.fromkeys(GROUP_SETTINGS), **SETTINGS, **change}) == kinds


def test_who_decodes_no_groups_refuses_them():
    async def run() -> None:
        server = GroupServer(in_step, page_size=64)
        async with connected(server) as engine:
            assert not engine.groups
            with pytest.raises(apr.UnsupportedEngine, match="does not decode groups of kind group_think"):
                await engine.group(group_of("a", "b"))
        assert not server.body
        sequential = SequentialEngine(apr.ScriptedEngine(lambda request, prompt: "", groups=["group_think"]))
        assert not sequential.groups
        with pytest.raises(apr.UnsupportedEngine, match="one request at a time"):
            await sequential.group(group_of("a", "b"))
        with pytest.raises(apr.UnsupportedEngine, match="hogwild"):
            await apr.ScriptedEngine(lambda request, prompt: "", groups=["group_think"]).group(
                group_of("a", "b", kind="hogwild")
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "crowd"}, "expected group_think or hogwild"),
        ({"requests": ()}, "at least one worker"),
        ({"prompt_tokens": 0}, "at least one worker, and a prompt"),
        ({"step_end": "x"}, "step_end is for Hogwild!"),
        ({"kind": "hogwild", "step_end": ""}, "not empty"),
        ({"prompt_tokens": 4}, "worker 0 has 4 tokens, expected a header after the 4"),
        ({"requests": (Request("a", (1, 2), 1), Request("a", (1, 3), 1))}, "the same request id"),
        (
            {"requests": (Request("a", (1, 2, 3, 4), 1), Request("b", (2, 2, 3, 4), 1))},
            "worker 1 begins with another",
        ),
        ({"requests": (Request("a", (1, 2, 3, 4), 0),)}, "worker 0 may decode 0 tokens"),
        ({"requests": (Request("a", (1, 2, 3, 4), 1, layout=(4,)),)}, "worker 0 has a layout"),
        (
            {"requests": (Request("a", (1, 2, 3, 4), 1), Request("b", (1, 2, 3, 4), 1, logprobs=True))},
            "worker 1 has other logprobs",
        ),
    ],
)
def test_requests_that_do_not_fit_together(change: dict, message: str):
    valid = group_of("a", "b")
    fields = {"kind": valid.kind, "requests": valid.requests, "prompt_tokens": 3, "step_end": None, **change}
    with pytest.raises(apr.AprError, match=message):
        GroupRequest(**fields)
