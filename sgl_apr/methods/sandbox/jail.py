"""Isolates a process: no files except the standard library, no network, no other processes, limited memory. Linux only.

There are three nested processes, so that none outlives the parent. `outer` dies with its parent, and `init` with
`outer`. `init` is the first process of a process namespace: when it dies, the kernel kills all others in there. Only
the third process, `inner`, runs the code of a model.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from . import seccomp  # relative, because the isolated process imports only this folder
from .paths import MOUNTED, hide_host_paths
from .repl import Repl

CLONE_NEWUSER = 0x10000000
NAMESPACES = {
    "mount": 1 << 17,
    "cgroup": 1 << 25,
    "uts": 1 << 26,
    "ipc": 1 << 27,
    "pid": 1 << 29,
    "net": 1 << 30,
}
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MOUNT_FLAGS = {
    0x2: NO_SUID,
    0x4: NO_DEV,
    0x8: NO_EXEC,
    0x400: 1024,
    0x800: 2048,
    0x1000: 1 << 21,
}  # flags of statvfs: flags of mount
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MNT_DETACH, PR_SET_PDEATHSIG, CAPABILITY_VERSION = 2, 1, 0x20080522  # of umount2, prctl and capset
NOBODY = 65534  # a user that owns nothing
HOST_NAME = b"sandbox"  # what programs see as the name of the machine
ROOT = "/tmp"  # the new root is mounted over it, in a namespace of its own
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class ResourceLimits:
    """Limits of the isolated process.

    Attributes:
        memory: Bytes of address space.
        cpu: Seconds of CPU time in total.
        output: Characters of a block's output that are returned.
    """

    memory: int
    cpu: int
    output: int


def main(parent: int, limits: ResourceLimits) -> NoReturn:
    """Isolate this process and serve; print what does not work as one line of JSON.

    Args:
        parent: The id of the process that started this one.
        limits: Limits of the isolated process.
    """
    # The process that starts this one may let it inherit descriptors: uvloop, the event loop of servers, closes none.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(int(name))
    try:
        outer(parent, limits)
    except Exception as error:
        print(json.dumps({"error": f"{error}"}), flush=True)
    os._exit(1)


def outer(parent: int, limits: ResourceLimits) -> NoReturn:
    """Leave all namespaces, and wait for the processes in the new ones."""
    _die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    machine = os.uname().machine  # `platform` would keep the name of the host
    if machine not in PIVOT_ROOT:
        raise OSError(f"no list of system calls for {machine}, only for {', '.join(PIVOT_ROOT)}")
    user, group = os.geteuid(), os.getegid()
    _check("unshare", LIBC.unshare(sum(NAMESPACES.values()) | (CLONE_NEWUSER if user else 0)))
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _wait(_fork(lambda: init(machine, not user, limits)))


def init(machine: str, drop: bool, limits: ResourceLimits) -> NoReturn:
    """Be the first process of the namespace: mount only the library, give up all rights, and wait for `inner`."""
    _die_with_parent()
    for call in (LIBC.sethostname, LIBC.setdomainname):  # of the new UTS namespace
        _check("sethostname", call(HOST_NAME, len(HOST_NAME)))
    _new_root(machine)
    if drop:  # otherwise the user is one of its own namespace, without rights outside
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("=IiIIIIII", CAPABILITY_VERSION, 0, 0, 0, 0, 0, 0, 0)
    _check("capset", LIBC.capset(header[:8], header[8:]))
    _die_with_parent()  # again, because a change of rights resets it
    _wait(_fork(lambda: inner(machine, limits)))


def inner(machine: str, limits: ResourceLimits) -> NoReturn:
    """Serve with resource limits, and without system calls that reach outside.

    Messages pass through descriptors of their own. The descriptors 0, 1 and 2 lead nowhere, so that what a program
    or a library writes to them is lost.
    """
    hide_host_paths(os.path.dirname(os.__file__))
    resource_limits = {
        resource.RLIMIT_AS: limits.memory,
        resource.RLIMIT_CPU: limits.cpu,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in resource_limits.items():
        resource.setrlimit(limit, (value, value))
    received = os.fdopen(os.dup(0), encoding="utf-8")
    sent = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 0)  # standard error is /dev/null of the host
    os.dup2(2, 1)
    repl = Repl(received, sent, limits.output)
    try:
        seccomp.install(machine)
    except OSError as error:
        repl.send({"error": f"{error}"})
        os._exit(1)
    repl.serve()
    os._exit(0)


def _new_root(machine: str) -> None:
    """Change to a read-only file system with only the standard library at `MOUNTED`, without installed packages."""
    path = os.path.dirname(os.__file__)
    library = os.open(path, os.O_PATH)  # the next mount may hide it
    _mount("/", RECURSIVE | PRIVATE)
    _mount(ROOT, NO_SUID | NO_DEV | NO_EXEC, b"none", b"tmpfs", b"size=64k,nr_inodes=64,mode=755")
    target = ROOT + MOUNTED
    os.makedirs(target)
    _mount(target, BIND | RECURSIVE, f"/proc/self/fd/{library}".encode())
    os.close(library)
    for packages in ("site-packages", "dist-packages"):
        if os.path.isdir(hidden := f"{target}/{packages}"):
            _mount(hidden, READ_ONLY | NO_SUID | NO_DEV | NO_EXEC, b"none", b"tmpfs", b"size=4k,mode=755")
    current = os.statvfs(target).f_flag
    flags = sum(mount for statvfs, mount in MOUNT_FLAGS.items() if current & statvfs)
    _mount(target, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | flags)
    os.chdir(ROOT)
    _check("pivot_root", LIBC.syscall(PIVOT_ROOT[machine], b".", b"."))
    _check("umount2", LIBC.umount2(b".", MNT_DETACH))
    os.chdir("/")
    _mount("/", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | NO_EXEC)


def _mount(
    target: str, flags: int, source: bytes | None = None, kind: bytes | None = None, data: Any = None
) -> None:
    _check(f"mount {target}", LIBC.mount(source, target.encode(), kind, ctypes.c_ulong(flags), data))


def _die_with_parent() -> None:
    _check(
        "prctl", LIBC.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *map(ctypes.c_ulong, (0, 0, 0)))
    )


def _check(call: str, result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


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
    """Wait until a child has ended, with this process's own ends of its input and output closed."""
    os.close(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)
