"""Empties kernels in a shared library that a machine does not need, so that the library packs small.

A library that nvcc has linked holds, for each source file, one container with a cubin (machine code) for each kind of GPU. The
driver loads a cubin when one of its kernels is launched. Cubins that are overwritten with zeros keep their place, so nothing
else in the library changes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CONTAINER_MAGIC = 0xBA55ED50
_CONTAINER, _ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQ")
_ARCH_OFFSET = 28  # of an entry, from its begin
_SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True, slots=True)
class Cubin:
    """One entry of a container.

    Attributes:
        arch: The GPU for which it is, as in `90` for compute capability 9.0.
        first: Where its machine code begins in the file.
        size: Bytes of machine code.
    """

    arch: int
    first: int
    size: int


def cubins(data: bytes | mmap.mmap) -> Iterator[Cubin]:
    """Yield the entries of all containers of a 64-bit ELF file, in order.

    Raises:
        ValueError: The file is no such file.
    """
    for first, size in _sections(data, b".nv_fatbin"):
        place, end = first, first + size
        while place + _CONTAINER.size <= end:
            magic, _, header, length = _CONTAINER.unpack_from(data, place)
            if magic != CONTAINER_MAGIC:
                place += 8  # padding
                continue
            place += header
            last = place + length
            while place < last:
                _, _, entry_header, entry_size = _ENTRY.unpack_from(data, place)
                (arch,) = struct.unpack_from("<I", data, place + _ARCH_OFFSET)
                yield Cubin(arch, place + entry_header, entry_size)
                place += entry_header + entry_size
            place = (last + 7) // 8 * 8


def _sections(data: bytes | mmap.mmap, name: bytes) -> Iterator[tuple[int, int]]:
    """Yield (begin, size) of the sections with a name."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("expected a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, table + number * entry) for number in range(count)]
    for section in sections:
        begin = sections[names][4] + section[0]
        if data[begin : begin + len(name) + 1] == name + b"\0":
            yield section[4], section[5]


def empty_cubins(library: Path, is_needed: Callable[[int, bytes], bool]) -> int:
    """Overwrite cubins of a file with zeros.

    Args:
        library: The file. It is changed in place.
        is_needed: Receives the GPU of a cubin and its machine code, with the mangled names of its kernels.

    Returns:
        Bytes of machine code that are left.
    """
    left = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for cubin in list(cubins(data)):
            end = cubin.first + cubin.size
            if is_needed(cubin.arch, data[cubin.first : end]):
                left += cubin.size
            else:
                data[cubin.first : end] = bytes(cubin.size)
    return left


def is_for_capability(capability: int) -> Callable[[int, bytes], bool]:
    """Return what accepts the cubins for a compute capability (major)."""
    return lambda arch, code: arch // 10 == capability


def is_needed_flash_attention(arch: int, code: bytes) -> bool:
    """Whether a cubin of FlashAttention 3 is for Hopper, in bfloat16, with heads of 128 dimensions, or for all of them."""
    if arch != 90:
        return False
    if b"FlashAttnFwdCombine" in code or b"prepare_varlen" in code:
        return True
    # The names hold the tile, then the head dimension of the values and the type: 192 is a tile of other heads.
    return b"Li128ENS_10bfloat16_tEfNS_4arch4Sm90" in code and b"ILi192EEE" not in code
