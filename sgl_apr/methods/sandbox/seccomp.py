"""The system calls that a program in the sandbox may make: those that an interpreter needs to read, compute and print."""

from __future__ import annotations

import ctypes
import struct

# All other calls are refused: new processes and threads, sockets, signals to others, changes to files. The numbers are
# those of x86_64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h); - means that the machine has no such call.
CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, lseek 8 62, close 3 57, fcntl 72 25, dup 32 23,
open 2 -, openat 257 56, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, futex 202 98,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, nanosleep 35 101, clock_nanosleep 230 115,
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getrandom 318 278, uname 63 160, sched_yield 24 124, exit 60 93, exit_group 231 94
"""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2  # of prctl
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of BPF
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
ALLOW, REFUSE, KILL = (
    0x7FFF0000,
    0x00050000 | 13,
    0x80000000,
)  # refused calls return EACCES, which Python handles


def numbers(machine: str) -> list[int]:
    """The numbers of the allowed calls on a machine.

    Raises:
        KeyError: If the machine is unknown.
    """
    column = 1 + list(ARCHITECTURES).index(machine) if machine in ARCHITECTURES else 0
    if not column:
        raise KeyError(machine)
    calls = (call.split()[column] for call in CALLS.strip().split(","))
    return [int(number) for number in calls if number != "-"]


def program(machine: str) -> bytes:
    """The filter as BPF code: 8 bytes per instruction; jumps count from the next instruction."""
    allowed = numbers(machine)
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL)]
    steps += [(LOAD, 0, 0, NUMBER)]
    steps += [(EQUAL, len(allowed) - k, 0, number) for k, number in enumerate(allowed)]
    steps += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def install(machine: str) -> None:
    """Allow only these calls from now on, for this process and all its children.

    Raises:
        OSError: If the kernel refuses the filter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    for step in ((NO_NEW_PRIVS, 1, 0, 0, 0), (SECCOMP, FILTER, ctypes.addressof(filter_), 0, 0)):
        if libc.prctl(*map(ctypes.c_ulong, step)):
            raise OSError(ctypes.get_errno(), "seccomp")
