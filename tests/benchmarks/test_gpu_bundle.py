"""The bundle for a machine without a network: what is packed is what SGLang imports there, and kernels of other GPUs are emptied."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks import gpu_bundle
from benchmarks.acceptance import bundle as bundle_module
from benchmarks.acceptance.bundle import Bundle, BundleError, installed_packages
from benchmarks.acceptance.fatbin import cubins, empty_cubins, is_for_capability, is_needed_flash_attention
from tests.support.paths import ROOT

HEADS_128 = b"_CollectiveMainloopFwdSm90ILi2EJNS7_ILi176EEESA_EEELi128ENS_10bfloat16_tEfNS_4arch4Sm90ELb0E"
HEADS_192 = b"_CollectiveMainloopFwdSm90ILi2ENS7_ILi192EEEEEELi128ENS_10bfloat16_tEfNS_4arch4Sm90ELb0E"
HEADS_64 = b"_CollectiveMainloopFwdSm90ILi2ENS7_ILi64EEEEEELi64ENS_10bfloat16_tEfNS_4arch4Sm90ELb0E"


def elf(containers: list[list[tuple[int, bytes]]]) -> bytes:
    """A shared library with nothing but its kernels: (GPU, code) for each entry of each container."""
    fatbin = b""
    for entries in containers:
        body = b"".join(
            struct.pack("<HHIQ", 2, 257, 64, len(code))
            + struct.pack("<IIIIQ", 0, 0, 0, arch, 0).ljust(48, b"\0")
            + code
            for arch, code in entries
        )
        fatbin += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
        fatbin += bytes(-len(fatbin) % 8)
    names, header = b"\0.nv_fatbin\0.shstrtab\0", 64
    place = header + len(fatbin)
    sections = [(0, 0, 0), (1, header, len(fatbin)), (12, place, len(names))]
    table = b"".join(struct.pack("<IIQQQQIIQQ", n, 1, 0, 0, at, size, 0, 0, 1, 0) for n, at, size in sections)
    head = bytearray(b"\x7fELF\x02\x01".ljust(header, b"\0"))
    struct.pack_into("<Q", head, 0x28, place + len(names))
    struct.pack_into("<HHH", head, 0x3A, 64, len(sections), 2)
    return bytes(head) + fatbin + names + table


def test_cubins_that_a_machine_does_not_need_are_emptied_in_place(tmp_path: Path):
    library = tmp_path / "library.so"
    before = elf(
        [
            [(80, b"A" * 24), (90, HEADS_128)],
            [(90, HEADS_192)],
            [(90, HEADS_64), (90, b"FlashAttnFwdCombine")],
        ]
    )
    library.write_bytes(before)
    found = list(cubins(before))
    assert [c.arch for c in found] == [80, 90, 90, 90, 90]
    left = empty_cubins(library, is_needed_flash_attention)
    after = library.read_bytes()
    assert left == len(HEADS_128) + len(b"FlashAttnFwdCombine")
    assert len(after) == len(before)
    for cubin, is_left in zip(found, (False, True, False, False, True), strict=True):
        code = after[cubin.first : cubin.first + cubin.size]
        assert code == (before[cubin.first : cubin.first + cubin.size] if is_left else bytes(cubin.size))
    assert list(cubins(after)) == found
    library.write_bytes(before)
    assert empty_cubins(library, is_for_capability(8)) == 24
    library.write_bytes(b"no library")
    with library.open("rb") as file, pytest.raises(ValueError, match="64-bit ELF"):
        list(cubins(file.read()))


def test_packages_of_the_machine_are_left_out(tmp_path: Path):
    listed = tmp_path / "there.txt"
    listed.write_text("torch==2.11.0\nHuggingFace_Hub==1.0\nlazy-loader @ file:///x\ntransformers==5.17.0\n")
    assert installed_packages(listed) == {"torch": "2.11.0", "huggingface-hub": "1.0", "lazy-loader": None}
    default = installed_packages(None)
    assert {"torch", "numpy", "tokenizers", "triton"} <= default.keys()
    assert not {"transformers", "sglang"} & default.keys()


def test_packages_of_the_machine_that_are_too_old_are_packed(tmp_path: Path):
    """The newest pydantic needs one version of pydantic-core. Torch is the machine's, whatever it is."""
    here = {"pydantic-core": bundle_module.metadata.version("pydantic-core"), "torch": "2.11.0"}
    for there, expected in (
        (here, []),
        (here | {"pydantic-core": "2.0"}, ["pydantic-core"]),
        ({"pydantic-core": None}, []),
    ):
        bundle = Bundle(tmp_path / "bundle", "3.11", 9, there)
        assert list(bundle._too_old("pydantic")) == expected
        assert list(bundle._too_old("sglang-kernel")) == []


def test_compiled_parts_for_another_python_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "msgspec.whl", "w") as wheel:
            wheel.writestr("msgspec/_core.cpython-399-x86_64-linux-gnu.so", b"code")
            wheel.writestr("msgspec/__init__.pyi", b"types")
        return subprocess.CompletedProcess(command, 0, "", "")

    bundle = Bundle(tmp_path / "bundle", "3.99", 9, {})
    monkeypatch.setattr(bundle_module.subprocess, "run", download)
    bundle._add_package("msgspec", tmp_path / "bundle" / "site")
    assert [p.name for p in (tmp_path / "bundle" / "site" / "msgspec").iterdir()] == [
        "_core.cpython-399-x86_64-linux-gnu.so"
    ]
    (command,) = commands
    assert command[command.index("--python-version") + 1] == "3.99"
    assert command[-1].startswith("msgspec==")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such version")
    monkeypatch.setattr(bundle_module.subprocess, "run", lambda *a, **o: failed)
    with pytest.raises(BundleError, match=r"no wheel of orjson .* for Python 3\.99: ERROR: no such version"):
        bundle._add_package("orjson", tmp_path / "bundle" / "site")


def test_a_file_over_the_limit_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bundle_module, "NEEDED", ("lark", "sglang-kernel"))
    monkeypatch.setattr(bundle_module, "CHECKOUT", ("pyproject.toml",))
    everything = tmp_path / "there.txt"
    everything.write_text("sglang-kernel==1\n")
    command = ["-o", str(tmp_path / "b.tar.xz"), "--installed", str(everything), "--json"]
    assert gpu_bundle.main(command) == 0
    size = json.loads(capsys.readouterr().out)["mib"]
    assert 0.05 < size < 1
    assert gpu_bundle.main([*command, "--max-mib", "0.01"]) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert gpu_bundle.main([*command, "--directory", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bundle_and_torch_are_enough_to_run(tmp_path: Path):
    """All other packages of this environment are hidden: the bundle runs with those that it takes to be there."""
    bundle = Bundle(
        tmp_path / "bundle", f"{sys.version_info[0]}.{sys.version_info[1]}", 9, installed_packages(None)
    )
    bundle.build(ROOT, None)
    assert min(size for name, size in bundle.sizes.items() if name.startswith("kernels of")) > 2**20
    there = tmp_path / "there"
    there.mkdir()
    link_packages(there, installed_packages(None))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SGLANG", "VIRTUAL"))
    }
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", str(tmp_path / "bundle" / "run.sh"), "--device", "cpu", "--only", "apr_cpu", "--seconds", "500"],
        cwd=tmp_path, env=environment | {"PYTHON": str(python), "PYTHONPATH": str(there)}, capture_output=True, text=True,
        timeout=550, check=False,
    )  # fmt: skip
    *lines, verdict = map(json.loads, done.stdout.splitlines())
    assert verdict["verdict"] == "ok", (verdict, lines, done.stderr)
    assert lines[0]["core"] == "UnifiedTreeCore", "in Python"


def link_packages(folder: Path, names: Iterable[str]) -> None:
    """Make a folder of packages of this environment."""
    from importlib import metadata

    for name in names:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for top in {f.parts[0] for f in distribution.files or () if f.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
