"""A server of a model that reads images joins text, and refuses to join a prompt with an image."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from sgl_apr.server.launch.launcher import Server
from tests.server.kv_join.test_in_process import likeliest
from tests.server.kv_join.test_radix_cache import LAYOUTS, NEW, commit, generate, prompt
from tests.server.launch.test_server import ask
from tests.support.tiny_vl import random_qwen_vl

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(
    forked_server: type[Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    directory = random_qwen_vl(tmp_path_factory.mktemp("vision"))
    flags = {"max_total_tokens": 4096, "context_length": 1024}
    with forked_server(directory, log_path=directory / "log", **flags) as server:
        yield server, directory


def image() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (200, 30, 60)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_text_joins_among_requests_with_images(served: tuple[Server, Path]):
    server, directory = served
    assert ask(server.url, "/server_info")["radix_cache_backend"] == "apr"
    reference = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vision = {
        "text": "<|vision_start|><|image_pad|><|vision_end|> it shows",
        "image_data": image(),
        "sampling_params": {"temperature": 0, "max_new_tokens": 3 * NEW, "ignore_eos": True},
    }

    async def run(layout: list, ids: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            await commit(session, server.url, layout, ids)
            seen = asyncio.create_task(asyncio.to_thread(ask, server.url, "/generate", vision))
            joined = await generate(session, server.url, ids, NEW, layout)
            return joined, await seen

    for name in ("unequal", "nested"):
        layout, ids = LAYOUTS[name], prompt(LAYOUTS[name], 60)
        joined, seen = asyncio.run(run(layout, ids))
        assert joined["output_ids"] == likeliest(reference, True, layout, ids, joined["output_ids"])
        assert joined["meta_info"]["cached_tokens"] == len(ids) - layout[-1]
        assert len(seen["output_ids"]) == 3 * NEW


def test_a_prompt_with_an_image_does_not_join(served: tuple[Server, Path]):
    server, _ = served
    layout = LAYOUTS["one"]

    async def refused() -> dict[str, Any]:
        async with aiohttp.ClientSession() as session:
            return await generate(session, server.url, prompt(layout, 3), NEW, layout, image_data=image())

    answer = asyncio.run(refused())
    assert answer["status"] == 400
    assert "images, video or audio" in str(answer)
