"""The validation of requests with a layout, on a real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import torch
from sglang.srt.managers.io_struct import GenerateReqInput
from transformers import AutoModelForCausalLM

from sgl_apr.server.kv_join.cache_keys import lookup_cost
from sgl_apr.server.kv_join.validation import MAX_LOOKUP_COST, layout_of_request
from sgl_apr.server.launch.launcher import Server
from sgl_apr.trajectory.join_layout import LayoutError
from tests.server.kv_join.test_radix_cache import commit, expected, generate, prompt
from tests.server.launch.test_server import ask
from tests.server.test_stress import idle
from tests.support.processes import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

LAYOUT = [20, [[6], [3]], 3]
GOOD = json.dumps(LAYOUT)
IDS = prompt(LAYOUT, 21)
NEW = 8


@pytest.fixture(scope="module")
def model(untagged: Path) -> Path:
    return untagged


@pytest.fixture(scope="module")
def reference(model: Path):
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def joining(checked: Server) -> Server:
    """A server with the default flags."""
    return checked


async def post(session, url: str, path: str, body: dict) -> tuple[int, str]:
    async with session.post(url + path, json=body) as response:
        return response.status, await response.text()


def run(work) -> object:
    """The result of `work(session)`."""

    async def once() -> object:
        async with aiohttp.ClientSession() as session:
            return await work(session)

    return asyncio.run(once())


def native(layout: object = GOOD, ids: object = IDS, **fields: object) -> tuple[str, dict]:
    sampling = {"max_new_tokens": 2, **fields.pop("sampling", {})}  # type: ignore[dict-item]
    custom = {"custom_params": {"apr_layout": layout}}
    return "/generate", {"input_ids": ids, "sampling_params": custom | sampling, **fields}


def openai(**fields: object) -> tuple[str, dict]:
    return "/v1/completions", {"model": "m", "max_tokens": 2, "custom_params": {"apr_layout": GOOD}, **fields}


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
HOSTILE = {
    "no JSON": (native("[20, [["), "expected a layout as JSON"),
    "nested a hundred thousand deep": (native("[" * 50_000), "--apr-max-prompt-chars"),
    "a megabyte": (native("[" + "1," * 500_000 + "1]"), "--apr-max-prompt-chars"),
    "a list": (native(LAYOUT), "as JSON in a string"),
    "null": (native(None), "as JSON in a string"),
    "a number": (native(7), "as JSON in a string"),
    "an object": (native('{"a": 1}'), "expected a list"),
    "too long": (native("[20, [[6], [9]], 3]"), "has 38 tokens, expected the 32"),
    "too short": (native("[20, [[6], [1]], 3]"), "has 30 tokens, expected the 32"),
    "nothing after": (native("[20, [[6], [6]]]"), "one token after"),
    "negative": (native("[-3, [[26], [6]], 3]"), "found -3"),
    "huge": (native("[99999999999999999999, [[6], [3]], 3]"), "found 9999"),
    "huger": (native("[" + "9" * 5000 + ", [[6], [3]], 3]"), "expected a layout as JSON"),
    "a float": (native("[20.0, [[6], [3]], 3]"), "found 20.0"),
    "not a number": (native("[NaN, [[6], [3]], 3]"), "found nan"),
    "a bool": (native("[20, [[6], [true]], 3]"), "found True"),
    "a branch that is a run": (native("[20, [6, 3], 3]"), "expected a list"),
    "a block without branches": (native("[20, [], 12]"), "a branch in every block"),
    "seventeen deep": (native("[1, " + "[[0, " * 17 + "1" + "]]" * 17 + ", 30]"), "at most 16 deep"),
    "ten thousand branches": (native(json.dumps([20, [[0]] * 10_000, 12])), "--apr-max-prompt-chars"),
    "text": (native(ids=None, text="hello"), "input_ids instead of text"),
    "text and ids": (native(text="hello"), "input_ids instead of text"),
    "texts": (native(ids=None, text=["hello", "you"]), "input_ids instead of text"),
    "one of two prompts is shorter": (native(ids=[IDS, IDS[:5]]), "found 20"),
    "embeddings": (native(ids=None, input_embeds=[[0.1] * 128] * 32), "input_embeds"),
    "overridden embeddings": (native(positional_embed_overrides={"a": 1}), "set by the server"),
    "an image": (native(image_data="data:image/png;base64,AAAA"), "images, video or audio"),
    "log-probabilities of the prompt": (native(return_logprob=True, logprob_start_len=0), "computed again"),
    "of its last token": (native(return_logprob=True, logprob_start_len=31), "computed again"),
    "a session": (native(session_params={"id": "none"}), "--apr-allow-sessions"),
    "beams": (native(sampling={"beam_width": 4}), "beam search"),
    "parameters that are a list": (native(sampling={"custom_params": [1]}), "expected an object"),
    "parameters that are text": (native(sampling={"custom_params": "apr_layout"}), "expected an object"),
    "the namespace": (native(sampling={"custom_params": None}, extra_key="apr:00"), "cannot begin with"),
    "the namespace of one": (
        native(ids=[IDS, IDS], sampling={"custom_params": None}, extra_key=["a", "apr:"]),
        "cannot begin with",
    ),
    "completions, text": (openai(prompt="hello"), "input_ids instead of text"),
    "completions, too short": (openai(prompt=IDS[:9]), "found 20"),
    "completions, echoed": (openai(prompt=IDS, echo=True, logprobs=1), "computed again"),
    "completions, the namespace": (openai(prompt=IDS, custom_params=None, extra_key="apr:"), "cannot begin with"),
    "chat": (("/v1/chat/completions", CHAT | {"custom_params": {"apr_layout": GOOD}}), "expected a run of 0 to"),
    "chat, the namespace": (("/v1/chat/completions", CHAT | {"extra_key": "apr:1"}), "cannot begin with"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_requests_are_rejected(joining: Server, name: str):
    """With a reason, and the server still answers."""
    (path, body), reason = HOSTILE[name]

    async def work(session) -> tuple[tuple[int, str], dict]:
        return await post(session, joining.url, path, body), await generate(session, joining.url, IDS[:4], 1)

    (status, text), fine = run(work)
    assert (status, reason in text) == (400, True), (status, text)
    assert fine["status"] == 200


def test_a_joined_prompt_has_no_session():
    """Not even on a server with --apr-allow-sessions."""
    request = GenerateReqInput(input_ids=IDS, session_params={"id": "a"})
    with pytest.raises(LayoutError, match="cannot have a session"):
        layout_of_request(request, len(IDS))


def test_a_stream_contains_the_error(joining: Server):
    async def work(session) -> list[tuple[int, str]]:
        return [await post(session, joining.url, *native(x, stream=True)) for x in ("[", GOOD)]

    (_, malformed), (_, missing) = run(work)
    assert '"code":400' in malformed
    assert '"status_code":409' in missing


def test_joining_is_the_default_and_can_be_seen(joining: Server):
    assert ask(joining.url, "/server_info")["radix_cache_backend"] == "apr"


def test_a_batch_has_a_layout_for_each(joining: Server, reference):
    """One request with two joined prompts and an ordinary one; and two samples of one prompt."""
    other = [12, [[4], [4], [4]], 8]
    ids = [IDS, prompt(other, 22), prompt([32], 23)]
    layouts = [LAYOUT, other, None]
    greedy = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}

    async def work(session) -> tuple[list[dict], list[dict]]:
        for layout, one in zip(layouts[:2], ids, strict=False):
            await commit(session, joining.url, layout, one)
        sampling = [greedy | ({"custom_params": {"apr_layout": json.dumps(x)}} if x else {}) for x in layouts]
        _, several = await post(
            session, joining.url, "/generate", {"input_ids": ids, "sampling_params": sampling}
        )
        _, twice = await post(
            session, joining.url, "/generate", {"input_ids": IDS, "sampling_params": sampling[0] | {"n": 2}}
        )
        return json.loads(several), json.loads(twice)

    several, twice = run(work)
    outputs = [expected(reference, x or [32], one, NEW)[0] for x, one in zip(layouts, ids, strict=True)]
    assert [a["output_ids"] for a in several] == outputs
    assert [a["output_ids"] for a in twice] == [outputs[0]] * 2


def test_completions_join_too(joining: Server, reference):
    async def work(session) -> tuple[int, str]:
        await commit(session, joining.url, LAYOUT, IDS)
        body = openai(prompt=IDS, temperature=0, max_tokens=NEW, ignore_eos=True, return_token_ids=True)[1]
        return await post(session, joining.url, "/v1/completions", body)

    status, text = run(work)
    assert status == 200
    assert json.loads(text)["choices"][0]["token_ids"] == expected(reference, LAYOUT, IDS, NEW)[0]


def test_logit_processors_keep_their_own_parameters(joining: Server, reference):
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    likeliest = expected(reference, LAYOUT, IDS, 1)[0]

    async def work(session) -> tuple[dict, dict]:
        await commit(session, joining.url, LAYOUT, IDS)
        free = await generate(session, joining.url, IDS, 1, LAYOUT)
        custom = {"apr_layout": GOOD, "token_ids": likeliest}
        body = {
            "input_ids": IDS,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "custom_params": custom},
            "custom_logit_processor": DisallowedTokensLogitsProcessor.to_str(),
        }
        return free, json.loads((await post(session, joining.url, "/generate", body))[1])

    free, forbidden = run(work)
    assert free["output_ids"] == likeliest
    assert forbidden["output_ids"] != likeliest
    assert forbidden["meta_info"]["cached_tokens"] >= len(IDS) - LAYOUT[-1], "it was joined"


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_nothing_is_joined_across_namespaces(joining: Server, reference, name: str):
    """A LoRA adapter is part of SGLang's extra key."""
    ids = prompt(LAYOUT, 31 + len(name))

    async def work(session) -> tuple[list[int], dict]:
        one = {name: "one"}

        async def keep(layout: list, *ranges: tuple[int, int]) -> None:
            part = [i for first, last in ranges for i in ids[first:last]]
            assert (await generate(session, joining.url, part, 0, **one))["status"] == 200

        await keep(LAYOUT, (0, 26))
        await keep(LAYOUT, (0, 20), (26, 29))
        others = [
            (await generate(session, joining.url, ids, NEW, LAYOUT, **fields))["status"]
            for fields in ({}, {name: "another"}, {name: "one", "extra_key": "a", "cache_salt": "b"})
        ]
        return others, await generate(session, joining.url, ids, NEW, LAYOUT, **one)

    others, found = run(work)
    assert others == [409, 409, 409]
    assert found["output_ids"] == expected(reference, LAYOUT, ids, NEW)[0]


def test_beams_of_others_do_not_matter(joining: Server, reference):
    """Beams have rows in the batch without a request of their own."""
    beams = {"max_new_tokens": 48, "beam_width": 4}

    async def work(session) -> list:
        await commit(session, joining.url, LAYOUT, IDS)
        body = {"input_ids": prompt([32], 41), "sampling_params": beams}
        return await asyncio.gather(
            post(session, joining.url, "/generate", body),
            *(generate(session, joining.url, IDS, 24, LAYOUT) for _ in range(3)),
        )

    (status, _), *joined = run(work)
    assert status == 200
    assert [a["output_ids"] for a in joined] == [expected(reference, LAYOUT, IDS, 24)[0]] * 3


def test_no_request_is_left_running(joining: Server, model: Path):
    until(lambda: idle(joining.url))
    log = (model / "log").read_text(errors="replace")
    assert "leak" not in log.lower()
    assert "Traceback" not in log


def test_the_lookup_cost_of_a_layout_is_bounded():
    """The key of every branch contains all tokens before the fork, so a short layout can be costly to look up."""
    layout = [100_000, [[1]] * 1000, 5]
    assert lookup_cost(layout) > MAX_LOOKUP_COST

    params = SimpleNamespace(beam_width=None, custom_params={"apr_layout": json.dumps(layout)})
    with pytest.raises(LayoutError, match="expected at most"):
        layout_of_request(SimpleNamespace(return_logprob=False, sampling_params=params), 101_005)


@pytest.mark.slow
def test_a_server_without_the_cache_refuses_layouts(model: Path):
    log = model / "stock.log"
    with Server(model, log_path=log, disable_radix_cache=True, context_length=512) as server:
        assert ask(server.url, "/server_info")["radix_cache_backend"] is None

        async def work(session) -> tuple[tuple[int, str], dict]:
            return await post(session, server.url, *native()), await generate(session, server.url, IDS, 1)

        (status, text), fine = run(work)
    assert (status, "does not join" in text, fine["status"]) == (400, True, 200)
    message = "branches are not joined in the KV cache: that does not work with --disable-radix-cache"
    assert [line for line in log.read_text().splitlines() if line.startswith("sgl-apr: ")] == [
        f"sgl-apr: {message}"
    ]
