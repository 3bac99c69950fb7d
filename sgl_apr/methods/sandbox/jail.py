"""Shuts a process in: no files but Python's own, no network, no other processes, little memory. Linux only, no fallback.

Three processes, so that nothing outlives whoever asked: `outer` dies with its parent, `init` with `outer`, and with
`init`, the first of a process namespace, the kernel ends all that is in there. Only the third runs what a model wrote.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from . import seccomp  # relative: the process inside imports this folder alone
from .repl import Repl

NEW_USER = 0x10000000
NEW = {"mount": 1 << 17, "cgroup": 1 << 25, "uts": 1 << 26, "ipc": 1 << 27, "pid": 1 << 29, "net": 1 << 30}
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
KEPT = {0x2: NO_SUID, 0x4: NO_DEV, 0x8: NO_EXEC, 0x400: 1024, 0x800: 2048, 0x1000: 1 << 21}  # statvfs: mount
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
DETACH, PARENT_DIES, CAPABILITIES = 2, 1, 0x20080522  # of umount2, of prctl, the version of capset
DROP = 65534  # a user that owns nothing
ROOT = "/tmp"  # covered, in a namespace of its own
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class ResourceLimits:
    """memory: bytes of address space. cpu: seconds of it in all. output: characters kept of what a block prints."""

    memory: int
    cpu: int
    output: int


def main(parent: int, walls: ResourceLimits) -> NoReturn:
    """Shut in, then serve; what does not work is said in one line to who asked."""
    try:
        outer(parent, walls)
    except Exception as error:
        print(json.dumps({"error": f"{error}"}), flush=True)
    os._exit(1)


def outer(parent: int, walls: ResourceLimits) -> NoReturn:
    """Leave all namespaces, and wait for what goes on in the new ones."""
    _with_parent()
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    machine = platform.machine()
    if machine not in PIVOT_ROOT:
        raise OSError(f"no list of system calls for {machine}, only for {', '.join(PIVOT_ROOT)}")
    user, group = os.geteuid(), os.getegid()
    _check("unshare", LIBC.unshare(sum(NEW.values()) | (NEW_USER if user else 0)))
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{DROP} {user} 1", "gid_map": f"{DROP} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _wait(_fork(lambda: init(machine, not user, walls)))


def init(machine: str, drop: bool, walls: ResourceLimits) -> NoReturn:
    """Be the first process: see nothing but the library, give up all rights, and wait for the third."""
    _with_parent()
    _new_root(machine)
    if drop:  # else a user of its own namespace, who has never been more than they are outside
        os.setgroups([])
        os.setresgid(DROP, DROP, DROP)
        os.setresuid(DROP, DROP, DROP)
    header = struct.pack("=IiIIIIII", CAPABILITIES, 0, 0, 0, 0, 0, 0, 0)
    _check("capset", LIBC.capset(header[:8], header[8:]))
    _with_parent()  # anew, as it is forgotten where rights change
    _wait(_fork(lambda: inner(machine, walls)))


def inner(machine: str, walls: ResourceLimits) -> NoReturn:
    """Serve, behind limits and without system calls that lead out."""
    limits = {
        resource.RLIMIT_AS: walls.memory,
        resource.RLIMIT_CPU: walls.cpu,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    heard, said = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
    repl = Repl(heard, said, walls.output)
    seccomp.install(machine)
    repl.serve()
    os._exit(0)


def _new_root(machine: str) -> None:
    """A file system that holds the standard library, without what was installed into it, and takes no writes."""
    where = os.path.dirname(os.__file__)
    library = os.open(where, os.O_PATH)  # it may lie in what is covered next
    _mount("/", RECURSIVE | PRIVATE)
    _mount(ROOT, NO_SUID | NO_DEV | NO_EXEC, b"none", b"tmpfs", b"size=64k,nr_inodes=64,mode=755")
    os.makedirs(ROOT + where)
    _mount(ROOT + where, BIND | RECURSIVE, f"/proc/self/fd/{library}".encode())
    os.close(library)
    for packages in ("site-packages", "dist-packages"):
        if os.path.isdir(hidden := f"{ROOT}{where}/{packages}"):
            _mount(hidden, READ_ONLY | NO_SUID | NO_DEV | NO_EXEC, b"none", b"tmpfs", b"size=4k,mode=755")
    have = os.statvfs(ROOT + where).f_flag
    kept = sum(flag for has, flag in KEPT.items() if have & has)
    _mount(ROOT + where, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | kept)
    os.chdir(ROOT)
    _check("pivot_root", LIBC.syscall(PIVOT_ROOT[machine], b".", b"."))
    _check("umount2", LIBC.umount2(b".", DETACH))
    os.chdir("/")
    _mount("/", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | NO_EXEC)


def _mount(
    where: str, flags: int, what: bytes | None = None, kind: bytes | None = None, data: Any = None
) -> None:
    _check(f"mount {where}", LIBC.mount(what, where.encode(), kind, ctypes.c_ulong(flags), data))


def _with_parent() -> None:
    _check("prctl", LIBC.prctl(PARENT_DIES, ctypes.c_ulong(signal.SIGKILL), *map(ctypes.c_ulong, (0, 0, 0))))


def _check(what: str, result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _fork(work: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except Exception as error:
        print(json.dumps({"error": f"{error}"}), flush=True)
    os._exit(1)


def _wait(child: int) -> NoReturn:
    """Until it has ended, without holding on to what it is told and says."""
    os.close(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)
