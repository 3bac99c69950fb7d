"""How the guard is put in front of an application, and what it measures of a model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sgl_apr.errors import LaunchError
from sgl_apr.server.guard.install import UNKNOWN_TOKEN_CHARS, decode_token_ids, longest_token, replace_cors
from sgl_apr.server.guard.limits import GuardLimits

ORIGIN = "https://chat.example"


def application() -> Starlette:
    """An application with SGLang's CORS middleware."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_credentials=True)
    return app


async def allowed_origin(origins: tuple[str, ...]) -> str | None:
    app = application()
    replace_cors(app, GuardLimits(origins=origins))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        response = await client.get("/", headers={"origin": ORIGIN})
    return response.headers.get("access-control-allow-origin")


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [((), None), (("https://other.example",), None), ((ORIGIN,), ORIGIN), (("*",), "*")],
)
def test_pages_of_allowed_origins_read_answers(origins: tuple[str, ...], allowed: str | None):
    assert asyncio.run(allowed_origin(origins)) == allowed


def test_another_number_of_cors_middlewares_is_an_error():
    with pytest.raises(LaunchError, match="0 CORS middlewares, expected 1"):
        replace_cors(Starlette(), GuardLimits())


def test_the_longest_token():
    assert longest_token(SimpleNamespace(get_vocab=lambda: {"a": 0, "abc": 1})) == 3
    assert longest_token(SimpleNamespace()) == longest_token(None) == UNKNOWN_TOKEN_CHARS


@pytest.mark.parametrize(
    "value",
    [
        [],
        [0],
        [7] * 100,
        [1, True],
        [1, 2.0],
        [1, "2"],
        [1, None],
        [[1]],
        [-1],
        [2**70],
        "12",
        None,
        {"a": 1},
        5,
    ],
)
def test_token_ids_are_decoded_as_by_sglang(value: object):
    from sglang.api.v1.api_types import JsonContractError, decode_TokenIds

    original = getattr(decode_TokenIds, "__wrapped__", decode_TokenIds)
    results: list[object] = []
    for decode in (original, lambda ids: decode_token_ids(original, ids)):
        try:
            results.append(decode(value))
        except JsonContractError as error:
            results.append(str(error))
    assert results[0] == results[1]
