"""The process of one configuration: it starts the scheduler, runs the parts, and reports each on stdout.

It prints one JSON object a line: `{"begins": part}` before each part, then the part's figures. It waits for a line on stdin
before it starts the scheduler, so that its imports can overlap with the configuration before it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.acceptance.configurations import Configuration, configurations

PACKAGES = ("sglang", "sglang-kernel", "flashinfer-python", "transformers", "triton")
Report = Callable[[dict[str, Any]], None]


def main(name: str, device: str, parts: Sequence[str], noise: float | None, folder: str) -> int:
    """Run the parts of a configuration.

    Args:
        name: The configuration.
        device: "cuda" or "cpu".
        parts: Those that are still to be run, without `start`.
        noise: The mean error of ordinary requests, if it is known.
        folder: A directory for temporary files, which the process that started this one removes.

    Returns:
        The exit status: 0 if all parts ran, whatever they found; 1 if one raised an exception, after which no
        other was run.
    """
    report = _reporter()
    _import_everything()
    report({"ready": True})
    if not sys.stdin.readline():
        return 0  # the process that started this one is gone
    checkpoint = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=folder))
    return _run(configurations(device)[name], device, checkpoint, parts, noise, report)


def _reporter() -> Report:
    """Return what writes to stdout. Whatever else is printed there goes to stderr."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=output, flush=True)


def _import_everything() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()  # first, as in SGLang's own processes
    import transformers.models.llama.modeling_llama  # noqa: F401

    import benchmarks.acceptance.speed  # noqa: F401


def _run(
    configuration: Configuration,
    device: str,
    folder: Path,
    parts: Sequence[str],
    noise: float | None,
    report: Report,
) -> int:
    started: list[Any] = []

    def start() -> dict[str, Any]:
        acceptance = _start(configuration, device, folder, noise)
        started.append(acceptance)
        return describe(acceptance.scheduler, device)

    if not run_part("start", start, configuration, report) or not started:
        return 1
    (acceptance,) = started
    runs = (run_part(name, acceptance.parts[name], configuration, report) for name in parts)
    return 0 if all(runs) else 1


def _start(configuration: Configuration, device: str, folder: Path, noise: float | None) -> Any:
    from benchmarks.acceptance.parts import Acceptance, Refused
    from benchmarks.acceptance.reference import Reference, make_checkpoint, make_weightless_checkpoint
    from benchmarks.acceptance.speed import SpeedAcceptance
    from benchmarks.common.in_process_scheduler import make_scheduler

    timed = "speed" in configuration.parts
    if timed:
        make_weightless_checkpoint(folder, large=device == "cuda")
    else:
        make_checkpoint(folder)
    try:
        scheduler = make_scheduler(folder, overlap=configuration.overlap, **configuration.flags)
    except ValueError as error:
        if "does not work with" in str(error):  # the cache that joins
            raise Refused(str(error)) from error
        raise
    if timed:
        return SpeedAcceptance(scheduler, configuration, None)
    dtype = str(scheduler.model_config.dtype).removeprefix("torch.")
    return Acceptance(scheduler, configuration, Reference(folder, dtype), noise)


def run_part(
    name: str, work: Callable[[], dict[str, Any]], configuration: Configuration, report: Report
) -> bool:
    """Run one part and report its figures.

    Returns:
        Whether the scheduler can still be used: it cannot after an exception that nobody expected.
    """
    from benchmarks.acceptance.parts import Refused, RequestFailed

    report({"begins": name})
    began, usable = time.monotonic(), True
    try:
        figures = work()
    except Refused as error:
        figures = {"ok": None if name in configuration.may_refuse else False, "not supported": str(error)}
    except RequestFailed as error:
        figures = {"ok": False, "failed": str(error)}
    except Exception as error:
        traceback.print_exc()
        figures, usable = {"ok": False, "failed": f"{type(error).__name__}: {error}"[:2000]}, False
    report({"part": name, **figures, "seconds": round(time.monotonic() - began, 1)})
    return usable


def describe(scheduler: Any, device: str) -> dict[str, Any]:
    """Describe the card, the versions, and what SGLang has chosen."""
    import torch
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import get_exec

    from sgl_apr.server.kv_join.compatibility import attention_backends

    runner, cache = scheduler.tp_worker.model_runner, scheduler.tree_cache
    graphs = get_exec().graph.cuda_graph_config
    return {
        "card": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in PACKAGES},
        "cache": type(cache).__name__,
        "core": type(cache.tree_core).__name__,
        "attention_backends": attention_backends(resolving_view(scheduler.server_args)),
        "attention": type(runner.attn_backend).__name__,
        "page_size": scheduler.page_size,
        "dtype": str(scheduler.model_config.dtype),
        "kv_cache": str(runner.kv_cache_dtype),
        "graphs": [str(graphs.decode.backend), str(graphs.prefill.backend)] if graphs else None,
        "overlap": bool(scheduler.enable_overlap),
        "ok": type(cache).__name__ == "KvJoinRadixCache",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
