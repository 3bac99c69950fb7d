"""Resolves server arguments as on a machine with an NVIDIA GPU, in a process of its own on any machine.

SGLang's own code decides everything. It is told about a GPU at the lowest place where Python can: the functions of
`torch.cuda` that ask the driver. SGLang's compiled kernels are loaded, so a library takes the place of the driver. It
exports the one function that they need to be loaded. Nothing runs on the GPU that is not there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

GIB = 2**30
DRIVER = "int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 100; }"


@dataclass(frozen=True)
class Resolved:
    """What a command line resolves to on a GPU.

    Attributes:
        error: The error that SGLang or this package raises, if it does. All other fields are then empty.
        attention: The attention backend and its reason, as in the ready line.
        backend: SGLang's attention backend.
        page_size: In tokens.
        cache: The radix cache backend.
        has_radix_cache: Whether SGLang keeps its radix cache on.
        printed: The lines of this package on standard error.
    """

    error: str = ""
    attention: str = ""
    backend: str = ""
    page_size: int = 0
    cache: str | None = None
    has_radix_cache: bool = True
    printed: tuple[str, ...] = ()


def resolve_on_cuda(cases: Sequence[tuple[str, Sequence[str]]], folder: Path) -> list[Resolved]:
    """Resolve command lines of `sgl-apr serve` in one process.

    Args:
        cases: The compute capability of the GPU, such as "9.0", and the flags.
        folder: An empty folder.
    """
    (folder / "driver.c").write_text(DRIVER)
    library = [str(folder / "libcuda.so.1"), str(folder / "driver.c")]
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", *library], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.resolve_on_cuda"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(cases), done.stderr[-3000:]
    return [Resolved(**result | {"printed": tuple(result["printed"])}) for result in results]


def pretend_to_have_a_gpu(capability: list[int]) -> None:
    """Let torch report one GPU. Its compute capability is what the list contains."""
    import torch

    def properties(device: Any = None) -> Any:
        major, minor = capability
        return types.SimpleNamespace(
            name="stand-in", major=major, minor=minor, total_memory=80 * GIB, multi_processor_count=132
        )

    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "stand-in",
        "get_device_capability": lambda device=None: tuple(capability),
        "get_device_properties": properties,
        "mem_get_info": lambda device=None: (80 * GIB, 80 * GIB),
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)


def main() -> None:
    cases = json.load(sys.stdin)
    capability = [0, 0]
    pretend_to_have_a_gpu(capability)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.utils import common

    from sgl_apr.server.launch.arguments import launch_arguments

    cached = [value for value in vars(common).values() if hasattr(value, "cache_clear")]
    for version, argv in cases:
        capability[:] = map(int, version.split("."))
        for function in cached:  # what SGLang knows about the GPU of the case before
            function.cache_clear()
        stderr, before = io.StringIO(), dict(os.environ)
        try:
            with contextlib.redirect_stderr(stderr):
                launched = launch_arguments(argv)
        except Exception as error:
            result = Resolved(error=f"{type(error).__name__}: {error}")
        else:
            view = resolving_view(launched.args)
            result = Resolved(
                attention=launched.attention,
                backend=view.attention_backend,
                page_size=view.page_size,
                cache=view.radix_cache_backend,
                has_radix_cache=not view.disable_radix_cache,
                printed=tuple(
                    line for line in stderr.getvalue().splitlines() if line.startswith("sgl-apr: ")
                ),
            )
        os.environ.clear()  # SGLang sets some variables by the GPU and the flags
        os.environ.update(before)
        print("RESULT", json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
