"""The files of the bundle for a machine without a network (`benchmarks.gpu_bundle`)."""

from __future__ import annotations

import fnmatch
import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.acceptance.configurations import TREE_CORE_ENV
from benchmarks.acceptance.fatbin import empty_cubins, is_for_capability, is_needed_flash_attention

# What SGLang's scheduler imports on a Hopper card, with the attention backends of the configurations. Measured: an import
# with a pretended card, in which everything else was hidden.
NEEDED = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "annotated-doc", "annotated-types", "anyio", "apache-tvm-ffi", "attrs",
    "certifi", "cffi", "charset-normalizer", "click", "colorama", "compressed-tensors", "cuda-bindings", "cuda-core",
    "cuda-pathfinder", "dill", "distro", "einops", "fastapi", "filelock", "flashinfer-python", "frozenlist", "fsspec",
    "gguf", "h11", "httpcore", "httpx", "huggingface-hub", "idna", "interegular", "ipython", "jinja2",
    "jsonschema", "jsonschema-specifications", "lark", "lazy-loader", "llguidance", "loguru", "markupsafe", "ml-dtypes",
    "mpmath", "msgspec", "multidict", "networkx", "ninja", "numpy", "nvidia-ml-py", "openai", "opentelemetry-api",
    "opentelemetry-sdk", "opentelemetry-semantic-conventions", "orjson", "packaging", "partial-json-parser", "pillow",
    "platformdirs", "prometheus-client", "propcache", "protobuf", "psutil", "pybase64", "pydantic", "pydantic-core",
    "pygments", "python-multipart", "pyyaml", "pyzmq", "referencing", "regex", "requests", "rich", "rpds-py", "safetensors",
    "sentencepiece", "setproctitle", "setuptools", "sglang", "sglang-kernel", "sniffio", "starlette", "sympy",
    "tabulate", "tenacity", "tiktoken", "tokenizers", "torchvision", "tqdm", "traitlets", "transformers",
    "typing-extensions", "typing-inspection", "urllib3", "uvicorn", "uvloop", "xgrammar", "yarl",
)  # fmt: skip
OF_TORCH = frozenset({"torch", "torchvision"})  # they have to be the machine's
# Packed even if the machine has them: SGLang needs one version of the first, and a recent one of the second.
ALWAYS = frozenset({"transformers", "typing-extensions"})
CHECKOUT = (
    "sgl_apr",
    "grammars",
    "benchmarks",
    "tests/__init__.py",
    "tests/support",
    "pyproject.toml",
    "README.md",
)
# Files that are not needed, by package, as patterns of the complete path.
UNNEEDED = {
    "sglang": ("sglang/multimodal_gen/*", "sglang/test/*", "*.so"),  # SGLang's parts in Rust link its own torch
    "sglang-kernel": ("*.so",),  # added by `_add_kernels`
    "flashinfer-python": (
        "flashinfer/data/csrc/cake_*", "flashinfer/data/csrc/kda/*", "flashinfer/data/csrc/gdn/*",
        "flashinfer/data/csrc/blackwell*", "flashinfer/data/csrc/experimental/*", "flashinfer/data/cutlass/examples/*",
        "flashinfer/data/cutlass/python/*", "flashinfer/data/cutlass/test/*", "flashinfer/data/cccl/python/*",
    ),
}  # fmt: skip
PLATFORMS = (
    *(f"manylinux_2_{n}_x86_64" for n in (35, 34, 31, 28, 27, 24, 17, 12, 5)), "manylinux2014_x86_64", "manylinux1_x86_64"
)  # fmt: skip
RUN = f"""#!/bin/sh
# sh run.sh [--seconds 330]: the first minutes on a GPU. The lines of results are on stdout.
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/site:$here/checkout${{PYTHONPATH:+:$PYTHONPATH}}"
export {TREE_CORE_ENV}="${{{TREE_CORE_ENV}:-python}}"
exec "${{PYTHON:-python3}}" "$here/checkout/benchmarks/gpu_acceptance.py" "$@"
"""


class BundleError(Exception):
    """A file for the bundle is missing, or is not for the machine."""


class Bundle:
    """The directory that is packed.

    Args:
        directory: Where to put the files. It must not exist, or be empty.
        python: The version of Python on the machine, as in "3.12".
        capability: The compute capability (major) of its GPU.
        installed: The packages that it has, with their versions as far as they are known.

    Attributes:
        sizes: Bytes by package.
        versions: Versions by package.
    """

    def __init__(
        self, directory: Path, python: str, capability: int, installed: Mapping[str, str | None]
    ) -> None:
        self.directory, self.python, self.capability, self.installed = (
            directory,
            python,
            capability,
            installed,
        )
        self.sizes: dict[str, int] = {}
        self.versions: dict[str, str] = {}

    def build(self, root: Path, kernels: Path | None) -> None:
        """Write all files.

        Args:
            root: The root of this repository.
            kernels: A wheel of sglang-kernel for the machine's torch, or None for what is installed here.

        Raises:
            BundleError: Something is missing.
        """
        if self.directory.exists() and any(self.directory.iterdir()):
            raise BundleError(f"{self.directory} is not empty")
        site = self.directory / "site"
        site.mkdir(parents=True, exist_ok=True)
        missing = [name for name in NEEDED if name not in self.installed]
        while missing:
            name = missing.pop()
            self._add_package(name, site)
            missing += [other for other in self._too_old(name) if other not in {*missing, *self.versions}]
        self._add_kernels(kernels, site)
        self._add_checkout(root, site)
        (self.directory / "run.sh").write_text(RUN)

    def largest(self, count: int) -> Mapping[str, int]:
        """The packages with the most bytes."""
        ordered = sorted(self.sizes.items(), key=lambda item: -item[1])
        return dict(ordered[:count])

    def _add_package(self, name: str, site: Path) -> None:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise BundleError(f"{name} is not installed in this environment") from None
        files = {str(f): Path(str(distribution.locate_file(f))) for f in distribution.files or ()}
        chosen = {path: file for path, file in files.items() if self._is_packed(name, path)}
        self.versions[name] = distribution.version
        if any(is_for_other_python(path, self.python) for path in chosen):
            chosen = self._downloaded(name, distribution.version, site)
        self.sizes[name] = 0
        for path, file in chosen.items():
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            self.sizes[name] += target.stat().st_size

    def _too_old(self, name: str) -> Iterator[str]:
        """Yield the packages of the machine that a package cannot use, and that can be packed."""
        for requirement in map(Requirement, metadata.requires(name) or ()):
            other = canonicalize_name(requirement.name)
            version = self.installed.get(other)
            is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if version is None or not is_needed or other in OF_TORCH or other not in NEEDED:
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                yield other

    def _is_packed(self, name: str, path: str) -> bool:
        outside = path.startswith("..") or "__pycache__" in path or path.endswith((".pyc", ".pyi"))
        return not outside and not any(fnmatch.fnmatch(path, p) for p in UNNEEDED.get(name, ()))

    def _downloaded(self, name: str, version: str, site: Path) -> dict[str, Path]:
        """Download the wheel for the machine's Python, and return its files."""
        folder = site.parent / ".wheels" / name
        tag = "cp" + self.python.replace(".", "")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
            "--python-version", self.python, "--implementation", "cp", "--abi", tag, "--abi", "abi3", "--abi", "none",
            *(word for platform in PLATFORMS for word in ("--platform", platform)), f"{name}=={version}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            last = done.stderr.strip().splitlines()[-1:] or ["nothing was downloaded"]
            raise BundleError(f"no wheel of {name} {version} for Python {self.python}: {last[0]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder / "files")
        files = {
            str(f.relative_to(folder / "files")): f for f in (folder / "files").rglob("*") if f.is_file()
        }
        return {path: file for path, file in files.items() if self._is_packed(name, path)}

    def _add_kernels(self, wheel: Path | None, site: Path) -> None:
        """Add the compiled part of sglang-kernel: the operators, and FlashAttention 3 for Hopper."""
        if "sglang-kernel" in self.installed:
            return
        operators = f"sgl_kernel/{'sm90' if self.capability == 9 else 'sm100'}/common_ops.abi3.so"
        names = [operators, *(["sgl_kernel/flash_ops.abi3.so"] if self.capability == 9 else [])]
        for name in names:
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if wheel is None:
                shutil.copyfile(str(metadata.distribution("sglang-kernel").locate_file(name)), target)
            else:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(name) as source,
                    target.open("wb") as file,
                ):
                    shutil.copyfileobj(source, file)
            is_flash_attention = name.endswith("flash_ops.abi3.so")
            needed = is_needed_flash_attention if is_flash_attention else is_for_capability(self.capability)
            left = empty_cubins(target, needed)
            if not left:
                raise BundleError(f"{name} has no kernel for compute capability {self.capability}")
            self.sizes[f"kernels of {target.stem}"] = left
        if wheel is not None:
            self.versions["compiled part of sglang-kernel"] = wheel.name.split("-")[1]

    def _add_checkout(self, root: Path, site: Path) -> None:
        """Add the repository's last commit, and what tells SGLang that this package is installed."""
        checkout = self.directory / "checkout"
        with tempfile.TemporaryFile() as file:
            command = ["git", "-C", str(root), "archive", "HEAD", *CHECKOUT]
            if subprocess.run(command, stdout=file, check=False).returncode:
                raise BundleError(f"{root} is no Git checkout")
            file.seek(0)
            with tarfile.open(fileobj=file) as archive:
                archive.extractall(checkout, filter="data")
        self.sizes["checkout"] = sum(f.stat().st_size for f in checkout.rglob("*") if f.is_file())
        distribution = metadata.distribution("sgl-apr")
        folder = site / f"sgl_apr-{distribution.version}.dist-info"
        folder.mkdir()
        for name in ("METADATA", "entry_points.txt"):
            (folder / name).write_text(distribution.read_text(name) or "")
        shutil.rmtree(self.directory / ".wheels", ignore_errors=True)


def installed_packages(file: Path | None) -> dict[str, str | None]:
    """The packages that a machine has, without those that are packed anyway.

    Args:
        file: What `pip list --format=freeze` printed there; a line may be a name without a version. Without it: torch,
            torchvision, and all that they and transformers need, as they are here.
    """
    if file is None:
        return {
            name: _installed_version(name)
            for name in _with_requirements({"torch", "torchvision", "transformers"})
            if name not in ALWAYS
        }
    packages: dict[str, str | None] = {}
    for line in file.read_text().splitlines():
        if match := re.match(r"([\w.-]+)(?:==(\S+))?", line.strip()):
            packages[canonicalize_name(match[1])] = match[2]
    return {name: version for name, version in packages.items() if name not in ALWAYS}


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _with_requirements(names: set[str]) -> Iterator[str]:
    """Yield packages and all that they need, without extras."""
    seen: set[str] = set()
    while names:
        name = names.pop()
        seen.add(name)
        yield name
        try:
            requirements = map(Requirement, metadata.requires(name) or ())
            needed = {
                canonicalize_name(r.name)
                for r in requirements
                if r.marker is None or r.marker.evaluate({"extra": ""})
            }
        except metadata.PackageNotFoundError:
            needed = set()
        names |= needed - seen


def is_for_other_python(path: str, python: str) -> bool:
    """Whether a file is an extension module that another version of Python was compiled with.

    Examples:
        >>> is_for_other_python("a/b.cpython-311-x86_64-linux-gnu.so", "3.12")
        True
        >>> is_for_other_python("a/b.abi3.so", "3.12")
        False
    """
    match = re.search(r"\.cpython-(\d+)-[\w-]+\.so$", path)
    return match is not None and match[1] != python.replace(".", "")
