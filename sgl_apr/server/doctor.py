"""What an installation and a server of it can do, row by row; how KV joins agree with a model is in `doctor_join`."""

from __future__ import annotations

import asyncio
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal

from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG
from sgl_apr.errors import AprError, EngineError, LaunchError
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.server.cpu.kernel import decode_kernel
from sgl_apr.server.hooks import check_version, has_accelerator
from sgl_apr.server.kv_join.probe import GenerateClient, ProbePrompt, make_client, send_prompts
from sgl_apr.server.kv_join.selfcheck import PROBE_TOKEN_IDS, check_identities
from sgl_apr.server.launch.main import WARMUP_GRAMMARS
from sgl_apr.tokenizer import Tokenizer

GIB = 2**30
MIN_FREE_MEMORY = 2 * GIB  # a server of a tiny model takes as much on a CPU
REQUIRED_PACKAGES = ("torch", "transformers", "llguidance", "lark", "tokenizers", "aiohttp")
OPTIONAL_PACKAGES = {"datasets": "for apr.to_dataset", "opentelemetry-api": "for traces"}
PLUGIN_ENTRY_POINTS = {
    "sglang.srt.plugins": "sgl_apr.server.plugin:activate",
    "sglang.srt.platforms": "sgl_apr.server.plugin:platform",
}
GRAMMAR_OUTPUT = re.compile(r"o?|ok[a-z]{0,4}")  # what SMALLEST lets through, cut anywhere
PREFIX_TOKENS = 48  # tokens that forks share
ROUND_TRIP_TEXT = "If x < y, then <b>\n\u00fc\u4e2d</b>."  # what a tokenizer has to read as it is

State = Literal["ok", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: what was looked at, whether it works, what was found, and what to do if it does not.

    What is "missing" can be done without.
    """

    name: str
    state: State
    found: str
    hint: str = ""


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether all that is needed works."""
    return all(f.state != "failed" for f in findings)


def _row(name: str, works: object, found: str, hint: str, otherwise: State = "failed") -> Finding:
    return Finding(name, "ok", found) if works else Finding(name, otherwise, found, hint)


def check_installation() -> Iterator[Finding]:
    """What can be seen without a server."""
    yield Finding("python", "ok", platform.python_version())
    yield _sglang()
    for name in REQUIRED_PACKAGES:
        found = _version(name)
        yield _row(name, found, found or "not installed", f"pip install {name}")
    for name, what in OPTIONAL_PACKAGES.items():
        found = _version(name)
        yield _row(name, found, found or "not installed", what, "missing")
    yield from map(_entry_point, PLUGIN_ENTRY_POINTS)
    yield from _gpu() if has_accelerator() else _cpu()
    yield _memory()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sglang() -> Finding:
    found = _version("sglang")
    try:
        check_version()
    except (LaunchError, PackageNotFoundError):
        return Finding(
            "sglang", "failed", found or "not installed", f"pip install sglang=={SUPPORTED_SGLANG}"
        )
    return Finding("sglang", "ok", found)


def _entry_point(group: str) -> Finding:
    wanted = PLUGIN_ENTRY_POINTS[group]
    names = {e.name for e in entry_points(group=group) if e.value == wanted}
    if not names:
        return Finding(group, "failed", f"no {wanted}: SGLang would not load it", "pip install sgl-apr")
    named = ", ".join(names)
    allowed = os.environ.get("SGLANG_PLUGINS") if group == "sglang.srt.plugins" else None
    if allowed and not names & set(map(str.strip, allowed.split(","))):
        return Finding(group, "failed", f"SGLANG_PLUGINS={allowed}", f"add {named} to it, or unset it")
    return Finding(group, "ok", named)


def _gpu() -> Iterator[Finding]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA, but something else"
    yield Finding("accelerator", "ok", name)
    found = _version("flashinfer-python")
    hint = "pip install flashinfer-python, or serve with another --attention-backend"
    yield _row("flashinfer", found, found or "not installed", hint)


def _cpu() -> Iterator[Finding]:
    yield Finding("accelerator", "missing", "none: models run on the CPU")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    yield _row("C++ compiler", compiler, compiler or "none", "SGLang has a kernel compiled: install g++")
    kernel = decode_kernel()
    found = "compiled" if kernel else "could not be compiled"
    hint = "decoding is slower without it: install a C compiler with OpenMP"
    yield _row("decode kernel", kernel, found, hint, "missing")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    hint = f"a server takes {MIN_FREE_MEMORY / GIB:g} GiB beside its model"
    return _row("memory", free >= MIN_FREE_MEMORY, f"{free / GIB:.1f} GiB free", hint)


def check_server(url: str, api_key: str | None = None) -> Iterator[Finding]:
    """What a running server can do; it is asked for some hundred tokens."""
    try:
        tokenizer, backend, joins = asyncio.run(_connected(url, api_key))
    except AprError as error:
        yield Finding("server", "failed", str(error), f"sgl-apr serve --model MODEL, and its URL for {url}")
        return
    yield Finding("server", "ok", f"{url}, grammars by {backend}")
    yield _reads(tokenizer)
    yield _tags(tokenizer)
    ask = make_client(url, api_key)
    yield _tried("grammar", lambda: _obeys(ask, WARMUP_GRAMMARS[backend]))
    yield _tried("fork", lambda: _reuses(ask))
    if joins:
        yield _tried("KV join", lambda: _joins(ask))
    else:
        hint = "branches are joined as text; sgl-apr serve says at start-up why"
        yield Finding("KV join", "missing", "not in this server's cache", hint)


async def _connected(url: str, api_key: str | None) -> tuple[Tokenizer, str, bool]:
    async with await HttpEngine.connect(url, api_key=api_key) as engine:
        return engine.tokenizer, engine.grammar_backend, engine.joins_kv


def _tried(name: str, work: Callable[[], Finding]) -> Finding:
    try:
        return work()
    except EngineError as error:
        return Finding(name, "failed", str(error), "the server's log says more")


def _reads(tokenizer: Tokenizer) -> Finding:
    found = tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)).strip()
    eos = ", ".join(map(str, sorted(tokenizer.eos_ids)))
    good = f"reads what it has written; a reply ends with {eos or 'no token'}"
    bad = f"reads {ROUND_TRIP_TEXT!r} as {found!r}"
    return _row(
        "tokenizer",
        found == ROUND_TRIP_TEXT,
        good if found == ROUND_TRIP_TEXT else bad,
        "a byte-level one is needed",
    )


def _tags(tokenizer: Tokenizer) -> Finding:
    whole = [
        name
        for name in dialect_names()
        if (tags := dialect(name).tags) and all(tokenizer.special_token_id(t) is not None for t in tags)
    ]
    if not whole:
        return Finding("tags", "missing", "of no dialect as tokens", "they are spelled out; name a dialect=")
    default = dialect_for(tokenizer)
    said = f"{default.name} is the default" if default else "none is the default: name a dialect="
    return Finding("tags", "ok", f"as tokens: {', '.join(whole)}; {said}")


def _obeys(ask: GenerateClient, grammar: str) -> Finding:
    answer = ask({"text": "a", "sampling_params": {"max_new_tokens": 8, "temperature": 1.0, "ebnf": grammar}})
    text = str(answer.get("text"))
    return _row(
        "grammar", GRAMMAR_OUTPUT.fullmatch(text), f"{grammar} gave {text!r}", "--grammar-backend llguidance"
    )


def _reuses(ask: GenerateClient) -> Finding:
    prefix = tuple(random.choices(PROBE_TOKEN_IDS, k=PREFIX_TOKENS))
    send_prompts(ask, [ProbePrompt(prefix)], 0)
    cached = min(
        r.cached for r in send_prompts(ask, [ProbePrompt((*prefix, i)) for i in PROBE_TOKEN_IDS[:2]], 1)
    )
    found = f"{cached} of {PREFIX_TOKENS} tokens before a fork are cached"
    return _row(
        "fork", cached >= PREFIX_TOKENS - 1, found, "serve without --disable-radix-cache, with --page-size 1"
    )


def _joins(ask: GenerateClient) -> Finding:
    checks = check_identities(ask)
    missed = [c for c in checks if not c.ok]
    if missed:
        hint = "serve with --radix-cache-backend stock: branches join as text then"
        return Finding("KV join", "failed", "; ".join(map(str, missed)), hint)
    found = f"these hold: {', '.join(c.name for c in checks if not c.is_uninformative)}"
    blind = [c.name for c in checks if c.is_uninformative]
    return Finding("KV join", "ok", f"{found}; not to be seen: {', '.join(blind)}" if blind else found)
