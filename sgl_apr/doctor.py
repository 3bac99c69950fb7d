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

from sgl_apr.dialects import dialect, dialect_names
from sgl_apr.engine.http import HttpEngine
from sgl_apr.errors import AprError, EngineError, LaunchError
from sgl_apr.presets import dialect_for
from sgl_apr.server.main import SMALLEST
from sgl_apr.server.native import decode_kernel
from sgl_apr.server.plugin import SUPPORTED, check_version, has_accelerator
from sgl_apr.server.probe import Ask, Prompt, asker, send
from sgl_apr.server.selfcheck import IDS, check
from sgl_apr.tokenizer import Tokenizer

GIB = 2**30
LEAST_MEMORY = 2 * GIB  # a server of a tiny model takes as much on a CPU
NEEDED = ("torch", "transformers", "llguidance", "lark", "tokenizers", "aiohttp")
OPTIONAL = {"datasets": "for apr.to_dataset", "opentelemetry-api": "for traces"}
ENTRIES = {
    "sglang.srt.plugins": "sgl_apr.server.plugin:activate",
    "sglang.srt.platforms": "sgl_apr.server.plugin:platform",
}
OBEYED = re.compile(r"o?|ok[a-z]{0,4}")  # what SMALLEST lets through, cut anywhere
PREFIX = 48  # tokens that forks share

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


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether all that is needed works."""
    return all(f.state != "failed" for f in findings)


def installation() -> Iterator[Finding]:
    """What can be seen without a server."""
    yield Finding("python", "ok", platform.python_version())
    yield _sglang()
    for name in NEEDED:
        found = _version(name)
        yield Finding(name, "ok" if found else "failed", found or "not installed", f"pip install {name}")
    for name, what in OPTIONAL.items():
        found = _version(name)
        yield Finding(name, "ok" if found else "missing", found or "not installed", what)
    yield from map(_entry_point, ENTRIES)
    accelerator = has_accelerator()
    yield from _gpu() if accelerator else _cpu()
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
        return Finding("sglang", "failed", found or "not installed", f"pip install sglang=={SUPPORTED}")
    return Finding("sglang", "ok", found)


def _entry_point(group: str) -> Finding:
    wanted = ENTRIES[group]
    names = [e.name for e in entry_points(group=group) if e.value == wanted]
    allowed = os.environ.get("SGLANG_PLUGINS")
    if not names:
        return Finding(group, "failed", "SGLang would not find the plugin", "pip install sgl-apr")
    if group == "sglang.srt.plugins" and allowed and not set(names) & set(map(str.strip, allowed.split(","))):
        return Finding(group, "failed", f"SGLANG_PLUGINS={allowed}", f"add {names[0]} to it, or unset it")
    return Finding(group, "ok", ", ".join(names))


def _gpu() -> Iterator[Finding]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "an accelerator"
    yield Finding("accelerator", "ok", name)
    found = _version("flashinfer-python")
    yield Finding(
        "flashinfer",
        "ok" if found else "failed",
        found or "not installed",
        "pip install flashinfer-python, or serve with another --attention-backend",
    )


def _cpu() -> Iterator[Finding]:
    yield Finding("accelerator", "missing", "none: models run on the CPU")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    yield Finding(
        "C++ compiler",
        "ok" if compiler else "failed",
        compiler or "none",
        "torch compiles a kernel of SGLang with it: install g++",
    )
    kernel = decode_kernel()
    yield Finding(
        "decode kernel",
        "ok" if kernel else "missing",
        "compiled" if kernel else "could not be compiled",
        "decoding is slower without it: install a C compiler with OpenMP",
    )


def _memory() -> Finding:
    import psutil  # type: ignore[import-untyped]

    free = psutil.virtual_memory().available
    state: State = "ok" if free >= LEAST_MEMORY else "failed"
    return Finding("memory", state, f"{free / GIB:.1f} GiB free", "a server needs 2 GiB beside its model")


def serving(url: str, api_key: str | None = None) -> Iterator[Finding]:
    """What a running server can do; it is asked for some hundred tokens."""
    try:
        tokenizer, backend, joins = asyncio.run(_connected(url, api_key))
    except AprError as error:
        yield Finding("server", "failed", str(error), f"sgl-apr serve --model MODEL, and its URL for {url}")
        return
    yield Finding("server", "ok", f"{url}, grammars by {backend}")
    yield _reads(tokenizer)
    yield _tags(tokenizer)
    ask = asker(url, api_key)
    yield _tried("grammar", lambda: _obeys(ask, SMALLEST[backend]))
    yield _tried("fork", lambda: _reuses(ask))
    if joins:
        yield _tried("KV join", lambda: _joins(ask))
    else:
        hint = "branches join as text; serve with --radix-cache-backend apr for more"
        yield Finding("KV join", "missing", "the server's cache cannot", hint)


async def _connected(url: str, api_key: str | None) -> tuple[Tokenizer, str, bool]:
    async with await HttpEngine.connect(url, api_key=api_key) as engine:
        return engine.tokenizer, engine.grammar_backend, engine.joins_kv


def _tried(name: str, work: Callable[[], Finding]) -> Finding:
    try:
        return work()
    except EngineError as error:
        return Finding(name, "failed", str(error), "the server's log says more")


def _reads(tokenizer: Tokenizer) -> Finding:
    text = "If x < y, then <b>\n\u00fc\u4e2d</b>."
    if (found := tokenizer.decode(tokenizer.encode(text))) != text:
        return Finding("tokenizer", "failed", f"reads {text!r} as {found!r}", "a byte-level one is needed")
    eos = ", ".join(map(str, sorted(tokenizer.eos_ids)))
    return Finding("tokenizer", "ok", f"a reply ends with {eos}" if eos else "no token ends a reply")


def _tags(tokenizer: Tokenizer) -> Finding:
    whole = [
        name
        for name in dialect_names()
        if (tags := dialect(name).tags) and all(tokenizer.special(t) is not None for t in tags)
    ]
    default = dialect_for(tokenizer)
    found = f"{', '.join(whole)} as tokens" if whole else "of no dialect as tokens"
    hint = "" if default else "tags are spelled out, and dialect= has to be named"
    return Finding("tags", "ok" if whole else "missing", found, hint)


def _obeys(ask: Ask, grammar: str) -> Finding:
    answer = ask({"text": "a", "sampling_params": {"max_new_tokens": 8, "temperature": 1.0, "ebnf": grammar}})
    text = str(answer.get("text"))
    if not OBEYED.fullmatch(text):
        return Finding("grammar", "failed", f"{text!r} breaks {grammar!r}", "--grammar-backend llguidance")
    return Finding("grammar", "ok", f"{text!r} obeys {grammar!r}")


def _reuses(ask: Ask) -> Finding:
    prefix = tuple(random.choices(IDS, k=PREFIX))
    send(ask, [Prompt(prefix)], 0)
    cached = min(r.cached for r in send(ask, [Prompt((*prefix, i)) for i in IDS[:2]], 1))
    found = f"{cached} of {PREFIX} tokens before a fork are cached"
    if cached < PREFIX - 1:
        return Finding("fork", "failed", found, "serve without --disable-radix-cache, with --page-size 1")
    return Finding("fork", "ok", found)


def _joins(ask: Ask) -> Finding:
    checks = check(ask)
    missed = [c for c in checks if not c.ok]
    if missed:
        hint = "serve with --radix-cache-backend stock: branches join as text then"
        return Finding("KV join", "failed", "; ".join(map(str, missed)), hint)
    blind = [c.name for c in checks if c.blind]
    found = f"{len(checks) - len(blind)} identities hold: {', '.join(c.name for c in checks if not c.blind)}"
    return Finding("KV join", "ok", found, f"say nothing on this model: {', '.join(blind)}" if blind else "")
