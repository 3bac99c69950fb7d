"""A server on two nodes, which are two processes of `sgl-apr serve` on this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from sgl_apr.server.constants import CACHE_SECRET_ENV
from sgl_apr.server.launch.preflight import free_port
from tests.server.kv_join.test_radix_cache import LAYOUTS, NEW, commit, expected, generate, prompt

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]
READY = "sgl-apr ready: "


@contextmanager
def nodes(model: Path, folder: Path, node_secrets: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a node for each secret. Their standard output is a pipe, and their log is a file in the folder."""
    cores = sorted(os.sched_getaffinity(0))
    address = f"127.0.0.1:{free_port()}"
    flags = ["--tp-size", "2", "--nnodes", str(len(node_secrets)), "--dist-init-addr", address]
    flags += ["--max-total-tokens", "2048", "--context-length", "512"]
    started: list[subprocess.Popen[str]] = []
    try:
        for rank, secret in enumerate(node_secrets):
            binding = f"{cores[0]}|{cores[-1]}"  # of the two ranks of the model, one on each node
            environment = {**os.environ, CACHE_SECRET_ENV: secret, "SGLANG_CPU_OMP_THREADS_BIND": binding}
            own = ["--node-rank", str(rank), "--port", str(free_port())]
            command = [
                str(Path(sys.executable).with_name("sgl-apr")),
                "serve",
                "--model",
                str(model),
                *own,
                *flags,
            ]
            with (folder / f"log{rank}").open("w") as log:
                started.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
                )
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def url_of(process: subprocess.Popen[str]) -> str:
    """The URL of a node, once it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(READY), line
    return line.removeprefix(READY).split()[0]


def test_two_nodes_with_one_secret_join(untagged: Path, tmp_path: Path):
    layout = LAYOUTS["nested"]
    ids = prompt(layout, 8)

    async def joined(url: str) -> dict:
        async with aiohttp.ClientSession() as session:
            await commit(session, url, layout, ids)
            return await generate(session, url, ids, NEW, layout)

    with nodes(untagged, tmp_path, [secrets.token_hex(32)] * 2) as started:
        url, _ = [url_of(process) for process in started]  # both are ready
        found = asyncio.run(joined(url))
    reference = AutoModelForCausalLM.from_pretrained(
        untagged, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert found["output_ids"] == expected(reference, layout, ids)[0]
    assert [process.returncode for process in started] == [0, 0], "they stop as one server does"


def test_two_nodes_with_different_secrets_do_not_start(untagged: Path, tmp_path: Path):
    with nodes(untagged, tmp_path, [secrets.token_hex(32), secrets.token_hex(32)]) as started:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.read() == "", "no node gets ready"
    for rank, process in enumerate(started):
        assert process.returncode == 1
        log = (tmp_path / f"log{rank}").read_text(errors="replace")
        last = log.strip().splitlines()[-1]
        assert "the nodes of this server have different secrets" in last
        assert CACHE_SECRET_ENV in last
