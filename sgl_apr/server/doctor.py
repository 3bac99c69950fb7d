"""Checks what an installation and a running server can do. `kv_join.drift` measures what KV joins do to a model."""

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
from sgl_apr.engine.http_client import get_json
from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG
from sgl_apr.errors import AprError, EngineError, LaunchError
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.server.cpu.kernel import decode_kernel
from sgl_apr.server.hooks import check_version, has_accelerator
from sgl_apr.server.kv_join.probe import GenerateClient, ProbePrompt, make_client, send_prompts
from sgl_apr.server.kv_join.selfcheck import PROBE_TOKEN_IDS, check_identities
from sgl_apr.server.launch.warmup import WARMUP_GRAMMARS
from sgl_apr.tokenizer import Tokenizer

GIB = 2**30
MIN_FREE_MEMORY = 2 * GIB  # what a server of a tiny model takes on a CPU
REQUIRED_PACKAGES = ("torch", "transformers", "llguidance", "lark", "tokenizers", "aiohttp")
OPTIONAL_PACKAGES = {"datasets": "for apr.to_dataset", "opentelemetry-api": "for traces"}
PLUGIN_ENTRY_POINTS = {
    "sglang.srt.plugins": "sgl_apr.server.plugin:activate",
    "sglang.srt.platforms": "sgl_apr.server.plugin:platform",
}
GRAMMAR_OUTPUT = re.compile(r"o?|ok[a-z]{0,4}")  # what WARMUP_GRAMMARS allow, cut anywhere
STATS_TIMEOUT_S = 10.0  # seconds
PREFIX_TOKENS = 128  # tokens that forks share: complete pages of any size that SGLang uses
# A tokenizer has to encode and decode this without changes.
ROUND_TRIP_TEXT = "If x < y, then <b>\n\u00fc\u4e2d</b>."

State = Literal["ok", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: Whether it works. "missing" means that it is optional and not there.
        found: What was found.
        hint: What to do if it does not work.
    """

    name: str
    state: State
    found: str
    hint: str = ""


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Return whether everything that is required works."""
    return all(f.state != "failed" for f in findings)


def _row(name: str, works: object, found: str, hint: str, otherwise: State = "failed") -> Finding:
    return Finding(name, "ok", found) if works else Finding(name, otherwise, found, hint)


def check_installation() -> Iterator[Finding]:
    """Check what can be checked without a server."""
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
    target = PLUGIN_ENTRY_POINTS[group]
    names = {e.name for e in entry_points(group=group) if e.value == target}
    if not names:
        return Finding(
            group, "failed", f"{target} is missing: SGLang would not load it", "pip install sgl-apr"
        )
    listed = ", ".join(names)
    allowed = os.environ.get("SGLANG_PLUGINS") if group == "sglang.srt.plugins" else None
    if allowed and not names & set(map(str.strip, allowed.split(","))):
        return Finding(group, "failed", f"SGLANG_PLUGINS={allowed}", f"add {listed} to it, or unset it")
    return Finding(group, "ok", listed)


def _gpu() -> Iterator[Finding]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "another accelerator than CUDA"
    yield Finding("accelerator", "ok", name)
    found = _version("flashinfer-python")
    hint = "pip install flashinfer-python: SGLang uses slower kernels without it"
    yield _row("flashinfer", found, found or "not installed", hint, "missing")


def _cpu() -> Iterator[Finding]:
    yield Finding("accelerator", "missing", "none: models run on the CPU")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    yield _row("C++ compiler", compiler, compiler or "none", "install g++: SGLang compiles a kernel")
    kernel = decode_kernel()
    found = "compiled" if kernel else "could not be compiled"
    hint = "install a C compiler with OpenMP: decoding is slower without the kernel"
    yield _row("decode kernel", kernel, found, hint, "missing")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    hint = f"a server takes {MIN_FREE_MEMORY / GIB:g} GiB in addition to its model"
    return _row("memory", free >= MIN_FREE_MEMORY, f"{free / GIB:.1f} GiB free", hint)


def check_server(url: str, api_key: str | None = None) -> Iterator[Finding]:
    """Check what a running server can do. The requests decode some hundred tokens."""
    try:
        tokenizer, backend, joins, groups = asyncio.run(_connect(url, api_key))
    except AprError as error:
        hint = "start a server with sgl-apr serve --model MODEL, and pass its URL"
        yield Finding("server", "failed", str(error), hint)
        return
    yield Finding("server", "ok", f"{url}, grammars by {backend}")
    if attention := _attention(url, api_key):
        yield Finding("attention", "ok", attention)
    yield _check_tokenizer(tokenizer)
    yield _check_tags(tokenizer)
    client = make_client(url, api_key)
    yield _run_check("grammar", lambda: _check_grammar(client, WARMUP_GRAMMARS[backend]))
    yield _run_check("fork", lambda: _check_fork(client))
    if joins:
        yield _run_check("KV join", lambda: _check_join(client))
    else:
        hint = "branches are joined as text; sgl-apr serve prints the reason when it starts"
        yield Finding("KV join", "missing", "not in this server's cache", hint)
    if groups:
        yield Finding("worker groups", "ok", " and ".join(groups))
    else:
        hint = "group_think and hogwild are emulated by chunks; docs/limits.md has the modes"
        yield Finding("worker groups", "missing", "this server decodes none", hint)


async def _connect(url: str, api_key: str | None) -> tuple[Tokenizer, str, bool, list[str]]:
    async with await HttpEngine.connect(url, api_key=api_key) as engine:
        return engine.tokenizer, engine.grammar_backend, engine.joins_kv, sorted(engine.groups)


def _attention(url: str, api_key: str | None) -> str:
    """Return the attention backend of a server, and why on a GPU. Empty if the server is not one of this package."""
    try:
        stats = get_json(f"{url.rstrip('/')}/apr/stats", api_key=api_key, timeout=STATS_TIMEOUT_S)
    except EngineError:
        return ""
    return str(stats.get("attention", "")) if isinstance(stats, dict) else ""


def _run_check(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except EngineError as error:
        return Finding(name, "failed", str(error), "see the server's log")


def _check_tokenizer(tokenizer: Tokenizer) -> Finding:
    found = tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)).strip()
    eos = ", ".join(map(str, sorted(tokenizer.eos_ids)))
    good = f"decodes what it encodes; a reply ends with {f'token {eos}' if eos else 'no token'}"
    bad = f"decodes {ROUND_TRIP_TEXT!r} as {found!r}"
    return _row(
        "tokenizer",
        found == ROUND_TRIP_TEXT,
        good if found == ROUND_TRIP_TEXT else bad,
        "a byte-level one is needed",
    )


def _check_tags(tokenizer: Tokenizer) -> Finding:
    single_token = [
        name
        for name in dialect_names()
        if (tags := dialect(name).tags) and all(tokenizer.special_token_id(t) is not None for t in tags)
    ]
    if not single_token:
        hint = "tags are spelled out; pass dialect="
        return Finding("tags", "missing", "no dialect has all its tags as single tokens", hint)
    default = dialect_for(tokenizer)
    choice = f"{default.name} is the default" if default else "there is no default: pass dialect="
    return Finding("tags", "ok", f"as single tokens: {', '.join(single_token)}; {choice}")


def _check_grammar(client: GenerateClient, grammar: str) -> Finding:
    answer = client(
        {"text": "a", "sampling_params": {"max_new_tokens": 8, "temperature": 1.0, "ebnf": grammar}}
    )
    text = str(answer.get("text"))
    return _row(
        "grammar", GRAMMAR_OUTPUT.fullmatch(text), f"{grammar} gave {text!r}", "--grammar-backend llguidance"
    )


def _check_fork(client: GenerateClient) -> Finding:
    prefix = tuple(random.choices(PROBE_TOKEN_IDS, k=PREFIX_TOKENS))
    send_prompts(client, [ProbePrompt(prefix)], 0)
    branches = [ProbePrompt((*prefix, i)) for i in PROBE_TOKEN_IDS[:2]]
    cached = min(reply.cached for reply in send_prompts(client, branches, 1))
    found = f"{cached} of {PREFIX_TOKENS} tokens before a fork are cached"
    return _row("fork", cached >= PREFIX_TOKENS - 1, found, "serve without --disable-radix-cache")


def _check_join(client: GenerateClient) -> Finding:
    checks = check_identities(client)
    failed = [c for c in checks if not c.ok]
    if failed:
        hint = "serve with --radix-cache-backend stock: branches are then joined as text"
        return Finding("KV join", "failed", "; ".join(map(str, failed)), hint)
    found = f"these identities hold: {', '.join(c.name for c in checks if not c.is_uninformative)}"
    unknown = [c.name for c in checks if c.is_uninformative]
    if unknown:
        found += f"; this model does not show whether these hold: {', '.join(unknown)}"
    return Finding("KV join", "ok", found)
