"""The first minutes on a GPU: whether joins and groups of workers are computed there as they should be, and how fast.

python benchmarks/gpu_acceptance.py [--device cuda|cpu] [--seconds 330] [--only NAME ...] [--json] [--list]

Each configuration of SGLang runs in a process of its own: SGLang's scheduler with its event loop, without a server and
without a network. Each part prints one line of JSON on stdout as soon as it is there, and its progress on stderr. A part that
fails, hangs or takes its process with it does not stop the others. The last line is the verdict. With `--json` everything is
one JSON object at the end instead.

Results are compared with transformers in float32 on the same rounded weights. Exit status: 0 if every part is ok, 1 if
one is not or was not reached in time, 2 if nothing could run. docs/gpu.md explains every line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, from a checkout that need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.acceptance.configurations import configurations
from benchmarks.acceptance.driver import AcceptanceRun, Line, Report
from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG


def obstacle(device: str) -> str | None:
    """What keeps this machine from running anything, or None."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        return "sglang is not installed, nor on PYTHONPATH"
    if installed != SUPPORTED_SGLANG:
        return f"sglang {installed} is installed, expected {SUPPORTED_SGLANG}"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "torch finds no GPU (--device cpu needs none)"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the configurations, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--seconds", type=float, default=330.0, help="when to end (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help="these configurations")
    add("--json", action="store_true", help="one JSON object at the end instead of a line for each part")
    add("--list", action="store_true", help="print the configurations and their parts, and run nothing")
    options = parser.parse_args(argv)
    known = configurations(options.device)
    if unknown := sorted(set(options.only or ()) - known.keys()):
        parser.error(f"--only {unknown[0]!r}, expected one of {', '.join(known)}")
    chosen = [c for c in known.values() if not options.only or c.name in options.only]
    if options.list:
        for configuration in chosen:
            print(json.dumps({"configuration": configuration.name, "parts": configuration.parts}))
        return 0
    report = Report(show=lambda line: None if options.json else print(json.dumps(line), flush=True))
    if why := obstacle(options.device):
        verdict: Line = {"verdict": "could not run", "ok": False, "device": options.device, "why": why}
    else:
        with tempfile.TemporaryDirectory(prefix="sgl-apr-acceptance-") as folder:
            capability = _capability(options.device)
            AcceptanceRun(chosen, options.device, options.seconds, report, capability).run(Path(folder))
        verdict = report.verdict(options.device)
    print(json.dumps(_as_object(report.lines, verdict) if options.json else verdict), flush=True)
    return 2 if verdict["verdict"] == "could not run" else int(not verdict["ok"])


def _capability(device: str) -> int | None:
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_capability()[0])


def _as_object(lines: Sequence[Line], verdict: Mapping[str, Any]) -> Line:
    missed = [f"{kind}: {name}" for kind in ("failed", "not_reached") for name in verdict.get(kind, ())]
    return {**verdict, "rows": list(lines), "missed": missed}


if __name__ == "__main__":
    sys.exit(main())
