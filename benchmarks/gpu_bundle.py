"""Packs what the first minutes on a GPU need into one file, for a machine that has torch, CUDA and no network.

python -m benchmarks.gpu_bundle [-o gpu-bundle.tar.xz] [--installed FILE] [--python 3.12] [--torch 2.11.0]
                                [--kernels WHEEL] [--capability 9] [--max-mib 64] [--directory DIR] [--json]

The file holds a checkout, SGLang, and the packages that SGLang imports and the machine does not have. Packages come from
this environment; where one has compiled parts for another Python, its wheel is downloaded with pip. docs/gpu.md explains
what to do with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.acceptance.bundle import Bundle, BundleError, installed_packages

ROOT = Path(__file__).resolve().parents[1]


def pack(directory: Path, target: Path) -> None:
    """Pack a directory into one file. `xz` is used where there is one, since it can use several cores."""
    try:
        with target.open("wb") as output:
            tar = subprocess.Popen(["tar", "-C", str(directory), "-c", "."], stdout=subprocess.PIPE)
            subprocess.run(["xz", "-6", "-T0"], stdin=tar.stdout, stdout=output, check=True)
            if tar.wait():
                raise BundleError("tar failed")
    except FileNotFoundError:
        with tarfile.open(target, "w:xz") as archive:
            archive.add(directory, ".")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file, and return 1 if it is too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("gpu-bundle.tar.xz"), help="default: %(default)s")
    add(
        "--installed", type=Path, metavar="FILE",
        help="what `pip list --format=freeze` prints on the machine (default: torch, torchvision and what they and transformers need)",
    )  # fmt: skip
    add(
        "--python",
        default=f"{sys.version_info[0]}.{sys.version_info[1]}",
        help="of the machine (default: %(default)s)",
    )
    add(
        "--kernels",
        type=Path,
        metavar="WHEEL",
        help="a wheel of sglang-kernel that is built for the machine's torch",
    )
    add(
        "--capability",
        type=int,
        default=9,
        help="compute capability (major) of its GPU (default: %(default)s)",
    )
    add("--max-mib", type=float, default=64.0, help="the largest file (default: %(default)s)")
    add("--directory", type=Path, help="write the files there, and pack nothing")
    add("--json", action="store_true", help="print the sizes as JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="sgl-apr-bundle-") as temporary:
        directory = options.directory or Path(temporary) / "bundle"
        bundle = Bundle(directory, options.python, options.capability, installed_packages(options.installed))
        try:
            bundle.build(ROOT, options.kernels)
        except BundleError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        result = {"unpacked_mib": _mib(sum(bundle.sizes.values())), "packages": bundle.versions}
        result |= {"largest_mib": {name: _mib(size) for name, size in bundle.largest(12).items()}}
        if options.directory is None:
            pack(directory, options.out)
            size = options.out.stat().st_size / 2**20
            result |= {"file": str(options.out), "mib": round(size, 1), "limit_mib": options.max_mib}
            result["ok"] = size <= options.max_mib
    print(json.dumps(result, indent=None if options.json else 2))
    return 0 if result.get("ok", True) else 1


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
