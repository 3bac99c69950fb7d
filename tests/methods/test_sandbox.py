"""The sandbox: what programs may and may not do, what ends them, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

import sgl_apr as apr
from sgl_apr.methods.sandbox import process, seccomp
from sgl_apr.methods.sandbox.process import RunResult, Sandbox, SandboxLimits

QUICK = SandboxLimits(seconds=5.0)


async def upper(texts: list[str], deep: bool) -> list[str]:
    return [f"{text.upper()}{'!' * deep}" for text in texts]


def ran(
    *blocks: str, limits: SandboxLimits = QUICK, answer: Any = upper, **variables: str
) -> list[RunResult]:
    """What each block comes to, in one sandbox."""

    async def all_of_them() -> list[RunResult]:
        async with Sandbox(variables, answer, limits) as sandbox:
            return [await sandbox.run(textwrap.dedent(block)) for block in blocks]

    return asyncio.run(all_of_them())


def printed(block: str, **options: Any) -> str:
    (found,) = ran(block, **options)
    return found.output.strip()


def test_blocks_share_what_they_make():
    one, two, three = ran("n = len(context)\nprint(n)", "FINAL(n + 1)", "FINAL_VAR('n')", context="abc")
    assert (one, two, three) == (RunResult("3\n"), RunResult("", "4"), RunResult("", "3"))


def test_values_are_read_by_their_names():
    async def read() -> list[str | None]:
        async with Sandbox({"context": "abc"}, upper, QUICK) as sandbox:
            await sandbox.run("found = [1, 2]")
            return [await sandbox.read_variable(name) for name in ("found", "context", "nothing")]

    assert asyncio.run(read()) == ["[1, 2]", "abc", None]


def test_programs_query_a_model():
    text = printed("""
        print(llm_query("one"), llm_query_batched(["two", "three"]), rlm_query("four"), rlm_query_batched(["5"]))
    """)
    assert text == "ONE ['TWO', 'THREE'] FOUR! ['5!']"


def test_time_stops_while_a_model_answers():
    async def slow(texts: list[str], deep: bool) -> list[str]:
        await asyncio.sleep(1.0)
        return texts

    assert printed("print(llm_query('a'))", answer=slow, limits=SandboxLimits(seconds=0.5)) == "a"


def test_errors_are_printed_and_nothing_is_lost():
    one, two, three = ran("x = 1\n1 / 0", "import sys\nsys.exit(3)", "print(x")
    assert one.output.endswith("ZeroDivisionError: division by zero\n")
    assert 'File "<repl>", line 2' in one.output
    assert "SystemExit: 3" in two.output
    assert "SyntaxError" in three.output
    assert ran("x = 1\n1 / 0", "print(x)")[1].output == "1\n"


def test_output_is_truncated():
    (found,) = ran("for _ in range(3000): print('x' * 999)", limits=SandboxLimits(output=50))
    assert found.output == "x" * 50 + "... + [2999950 chars...]"


# Writes to every descriptor, the one that messages pass through included.
WRITE = """import os
def write(data):
    for fd in range(32):
        try: os.write(fd, data)
        except OSError: pass"""

FORBIDDEN = [
    "open('/etc/passwd')",
    f"open({__file__!r})",
    "open('/proc/self/environ')",
    "open('/dev/null')",
    "open('/x', 'w')",
    "open('/tmp/x', 'w')",
    "open(os.__file__, 'a')",
    "os.mkdir('/x')",
    "os.unlink(os.__file__)",
    "os.chmod('/', 0o777)",
    "os.symlink('/', '/x')",
    "os.chroot('/')",
    "os.memfd_create('x')",
    "os.pipe()",
    "os.fork()",
    "os.execv(sys.executable, ['python'])",
    "os.kill(1, 9)",
    "os.kill(-1, 9)",
    "os.setuid(0)",
    "os.sched_setaffinity(0, {0})",
    "signal.setitimer(signal.ITIMER_REAL, 1)",
    "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    "subprocess.run(['true'])",
    "threading.Thread(target=print).start()",
    "multiprocessing.Process(target=print).start()",
    "socket.socket()",
    "socket.socket(socket.AF_UNIX)",
    "socket.socketpair()",
    "socket.create_connection(('127.0.0.1', 9), timeout=1)",
    "urllib.request.urlopen('http://127.0.0.1:9')",
]


def test_forbidden_actions_fail():
    names = "os, sys, signal, resource, subprocess, threading, multiprocessing, socket, urllib.request"
    tried = (
        f"try:\n    {each}\nexcept Exception as error:\n    print('refused', error)" for each in FORBIDDEN
    )
    _, *found = ran(f"import {names}", *tried)
    assert [
        each for each, said in zip(FORBIDDEN, found, strict=True) if not said.output.startswith("refused")
    ] == []


def test_no_files_are_visible():
    text = printed("""
        import os
        packages = os.path.join(os.path.dirname(os.__file__), "site-packages")
        print(os.listdir("/"), os.listdir(packages) if os.path.isdir(packages) else [], os.getpid())
        print({"PATH", "HOME", "PWD"} & {*os.environ})
    """)
    assert text == "['lib'] [] 2\nset()"


def test_no_signal_or_message_leaves_the_sandbox():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        text = printed(f"""
            import ctypes, struct
            libc = ctypes.CDLL(None, use_errno=True)
            fd = libc.socket(2, 1, 0)
            to = struct.pack("<H", 2) + struct.pack(">H", {port}) + bytes([127, 0, 0, 1]) + bytes(8)
            print(fd, libc.connect(fd, to, 16), libc.sendto(fd, b"x", 1, 0, to, 16))
        """)
        assert text == "-1 -1 -1"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of this machine")
def test_system_calls_by_their_numbers():
    names = {
        56: "clone", 57: "fork", 58: "vfork", 435: "clone3", 59: "execve", 322: "execveat", 41: "socket", 62: "kill",
        200: "tkill", 234: "tgkill", 101: "ptrace", 310: "process_vm_readv", 311: "process_vm_writev", 165: "mount",
        166: "umount2", 155: "pivot_root", 161: "chroot", 272: "unshare", 308: "setns", 425: "io_uring_setup",
        321: "bpf", 323: "userfaultfd", 250: "keyctl", 302: "prlimit64", 157: "prctl", 317: "seccomp", 319: "memfd",
        16: "ioctl", 29: "shmget", 240: "mq_open", 304: "open_by_handle_at", 298: "perf_event_open", 57 | 1 << 30: "x32",
    }  # fmt: skip
    text = printed(f"""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        for number in {list(names)}:
            ctypes.set_errno(0)
            print(libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno() == errno.EACCES)
    """)
    assert text.splitlines() == ["-1 True"] * len(names)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="code of this machine")
def test_system_calls_of_another_architecture_kill_the_process():
    one, two = ran(
        """
        import ctypes, mmap
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(bytes.fromhex("b802000000cd80c3"))  # mov eax, 2 (fork); int 0x80; ret
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
        """,
        "print('new')",
    )
    assert one.output == "it ended; its variables are lost"
    assert two.output == "new\n"


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("while True: pass", "it took more than 1 s"),
        ("import time\ntime.sleep(60)", "it took more than 1 s"),
        (
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            "it took more than 1 s",
        ),
        ("sum(range(10 ** 12))", "it took more than 1 s"),
        ("import os\nos._exit(0)", "it ended"),
        ("import ctypes\nctypes.string_at(0)", "it ended"),
        (f"{WRITE}\nwhile True: write(b'x' * 4096)", "wrote what is no message"),
        (f"{WRITE}\nwrite(b'[' * 100_000 + b'\\n')", "wrote what is no message"),
        (f"{WRITE}\nwrite(b'3\\n')", "wrote what is no message"),
        (f"{WRITE}\nwrite(b'null\\n')", "it ended"),
        (f"{WRITE}\nwrite(b'{{\"query\": [1]}}\\n')", "wrote what is no message"),
        (f'{WRITE}\nwrite(b\'{{"output": "forged", "chars": 6}}\\n\')', "wrote what is no message"),
        ("llm_query_batched('x' * 10_001)", "asked about more than 10000 texts"),
        ("import os\nos.closerange(0, 32)", "it ended"),
        (
            f"{WRITE}\nfor fd in range(3, 32):\n    try: os.read(fd, 1)\n    except OSError: pass",
            "it took more than 1 s",
        ),
    ],
)
def test_blocks_that_end_the_process(block: str, why: str):
    begun = time.monotonic()
    one, two, three = ran("x = 1", block, "print('x' in globals())", limits=SandboxLimits(seconds=1.0))
    assert one.output == ""
    assert why in two.output
    assert two.output.endswith("its variables are lost")
    assert three.output == "False\n", "the next has a new one"
    assert time.monotonic() - begun < 4


def test_memory_is_limited():
    one, two = ran("x = [bytearray(1 << 20) for _ in range(4096)]", "print('continues')")
    assert "MemoryError" in one.output
    assert two.output == "continues\n"
    with pytest.raises(apr.SandboxUnavailable, match="does not fit"):
        ran("", limits=SandboxLimits(memory=100 << 20), context="x" * (60 << 20))


def test_processor_time_is_limited_in_all():
    outputs = [found.output for found in ran(*["while True: pass"], limits=SandboxLimits(seconds=20, cpu=1))]
    assert outputs == ["it ended; its variables are lost"]


def test_a_fork_bomb_has_no_second_process():
    found = ran("""
        import os
        tries = 0
        while tries < 10_000:
            tries += 1
            try:
                os.fork()
            except OSError:
                continue
            break
        print(tries)
    """)
    assert found[0].output == "10000\n"


def test_what_is_written_to_standard_descriptors_is_lost():
    one, two, three = ran(
        'import os\nfor fd in (0, 1, 2): os.write(fd, b\'{"output": "forged", "chars": 6, "final": null}\\n\')\nprint(1)',
        "import os\nprint(os.read(0, 9), 2)",
        "print(3)",
    )
    assert [one.output, two.output, three.output] == ["1\n", "b'' 2\n", "3\n"]


FIND = """import gc
repl = next(o for o in gc.get_objects() if type(o).__name__ == "Repl")"""


@pytest.mark.parametrize("blocks", [1, 3])
def test_no_message_of_a_program_is_taken_for_a_later_answer(blocks: int):
    """Even one with the right id, which a program finds in its own memory: that is the answer of its own block only."""
    forge = f"{FIND}\nfor _ in range({blocks}): repl.send({{'output': 'forged', 'chars': 6, 'final': '0'}})"
    first, second, third = ran(forge, "print('second')", "print('third')")
    assert first == RunResult("forged", "0")
    assert second.output == "stopped: it wrote what is no message; its variables are lost"
    assert third == RunResult("third\n")


def test_an_answer_of_the_wrong_kind_ends_the_process():
    for fields in (
        "'output': 5, 'chars': 1",
        "'output': 'a', 'chars': 'many'",
        "'output': 'a', 'chars': 1, 'final': [1]",
    ):
        (found,) = ran(f"{FIND}\nrepl.send({{{fields}}})")
        assert found.output == "stopped: it wrote what is no message; its variables are lost"


def test_a_query_is_answered_once_and_to_its_own_program():
    one, two = ran(
        f"{FIND}\nrepl.send({{'query': ['forged'], 'deep': False}})\nprint(repl.received.readline())",
        "print('new')",
    )
    assert '"answers": ["FORGED"]' in one.output or "no message" in one.output
    assert two.output in ("new\n", "stopped: it wrote what is no message; its variables are lost")


def test_the_host_is_not_named():
    """In its name, in frames, in modules, in `sys`, and in errors."""
    text = printed("""
        import gc, json, os, platform, socket, sys, traceback, types
        print(os.uname().nodename, platform.node(), socket.gethostname())
        names, frame = set(), sys._getframe()
        while frame:
            names.add(frame.f_code.co_filename)
            names |= {str(value) for value in frame.f_globals.values() if isinstance(value, str)}
            names |= {str(value) for value in frame.f_locals.values() if isinstance(value, (str, dict))}
            frame = frame.f_back
        for o in gc.get_objects():
            if isinstance(o, types.CodeType):
                names.add(o.co_filename)
            if isinstance(o, types.FunctionType):
                names.add(o.__code__.co_filename)
            if isinstance(o, types.ModuleType):
                names |= {str(o), str(getattr(o, "__file__", "")), str(o.__spec__), str(getattr(o, "__path__", ""))}
        names |= {*sys.path, *map(str, sys.path_importer_cache), *sys.argv, *sys.orig_argv, sys.executable, sys.prefix}
        names |= {sys.base_prefix, sys.exec_prefix, str(dict(os.environ)), os.getcwd(), os.__file__}
        try:
            json.loads("{")
        except ValueError:
            names.add(traceback.format_exc())
        print("\\n".join(sorted(names)))
    """)
    first, *names = text.splitlines()
    assert first == "sandbox sandbox sandbox"
    assert any("/lib/python3" in name for name in names)
    for path in (
        sys.prefix,
        sys.base_prefix,
        str(Path(process.__file__).parent),
        str(Path.home()),
        sys.executable,
    ):
        assert [name for name in names if path in name] == []
    assert platform.node() not in text


def test_memory_files_and_mounts_of_the_host_are_out_of_reach():
    probes = [
        "os.listdir('/proc')", "os.listdir('/sys')", "os.listdir('/dev')", "open('/proc/self/maps')", "os.stat('/etc')",
        "os.open('..', os.O_RDONLY | os.O_DIRECTORY, dir_fd=0)", "os.listdir(0)", "os.readlink('/proc/self/exe')",
        "os.link(os.__file__, '/x')", "os.symlink('/etc/passwd', '/tmp/x')", "os.rename(os.__file__, '/x')",
        "os.truncate(os.__file__, 0)", "os.mkfifo('/x')", "os.mknod('/x')", "os.statvfs('/')", "os.sendfile(1, 0, 0, 1)",
        "os.eventfd(0)", "os.pidfd_open(1)", "os.posix_spawn('/bin/true', [], {})", "os.getgroups()", "os.sethostname",
        "os.ptsname", "os.openpty()", "os.setsid()", "os.nice(-5)", "os.setpriority(0, 0, -5)", "os.kill(os.getppid(), 0)",
    ]  # fmt: skip
    _, *found = ran(
        "import os",
        *(f"try:\n    print('reached', {p})\nexcept Exception as e: print('refused', e)" for p in probes),
    )
    reached = [p for p, result in zip(probes, found, strict=True) if not result.output.startswith("refused")]
    assert reached == []


@pytest.mark.parametrize("policy", [asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def test_inherited_descriptors_are_closed(policy: type[asyncio.AbstractEventLoopPolicy], tmp_path: Path):
    """Also under the event loop of a server, which lets processes inherit."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(policy())
    try:
        with secret.open() as file:
            os.set_inheritable(file.fileno(), True)
            text = printed("""
                import os
                open_ones = []
                for fd in range(3, 4096):
                    try:
                        open_ones.append(os.fstat(fd).st_mode & 0o170000)
                    except OSError:
                        pass
                print([mode in (0o010000, 0o140000) for mode in open_ones])
            """)
    finally:
        asyncio.set_event_loop_policy(before)
    assert text == "[True, True]", "the two channels of messages, pipes or sockets"


def test_large_answers_end_the_process_without_harm():
    one, two = ran("FINAL('x' * (20 << 20))", "print('new')")
    assert "its variables are lost" in one.output
    assert two.output == "new\n"


def test_text_that_cannot_be_encoded_is_replaced():
    (found,) = ran("print('\\ud800')\nFINAL('\\udfff')")
    assert found == RunResult("?\n", "?")


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_nothing_is_left():
    async def once() -> list[int]:
        async with Sandbox({}, upper, QUICK) as sandbox:
            assert sandbox._process
            found = family(sandbox._process.pid)
            await sandbox.run("print(1)")
        return found

    pids = asyncio.run(once())
    assert len(pids) == 3
    assert gone(pids)


def test_nothing_is_left_after_cancelling():
    async def once() -> list[int]:
        async with Sandbox({}, upper, SandboxLimits(seconds=60)) as sandbox:
            assert sandbox._process
            found = family(sandbox._process.pid)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sandbox.run("while True: pass"), 0.3)
        return found

    assert gone(asyncio.run(once()))


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1])
def test_nothing_is_left_after_cancelling_at_the_start(after: float):
    before = family(os.getpid())

    async def once() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(after), Sandbox({}, upper, SandboxLimits(seconds=60)) as sandbox:
                await sandbox.run("while True: pass")

    asyncio.run(once())
    assert gone([pid for pid in family(os.getpid()) if pid not in before])


def test_it_dies_with_its_parent():
    code = """
        import asyncio
        from sgl_apr.methods.sandbox.process import SandboxLimits, Sandbox

        async def main():
            async with Sandbox({}, None, SandboxLimits(seconds=60)) as sandbox:
                print(sandbox._process.pid, flush=True)
                await sandbox.run("while True: pass")

        asyncio.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        pids = family(int(parent.stdout.readline()))
        assert len(pids) == 3
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    assert gone(pids)


def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process.sys, "platform", "darwin")
    with pytest.raises(apr.SandboxUnavailable, match="Linux namespaces, found darwin"):
        ran("print(1)")


def test_other_machines_are_refused():
    with pytest.raises(KeyError):
        seccomp.program("riscv64")
    for machine in seccomp.ARCHITECTURES:
        numbers = seccomp.numbers(machine)
        assert len({*numbers}) == len(numbers)
        assert len(seccomp.program(machine)) == 8 * (len(numbers) + 6)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights that only root has")
def test_a_kernel_that_refuses_is_an_error_and_nothing_runs(tmp_path: Path):
    code = """
        import asyncio
        from sgl_apr.methods.sandbox.process import Sandbox

        async def main():
            async with Sandbox({}, None) as sandbox:
                print(await sandbox.run("print('ran')"))

        asyncio.run(main())
    """
    command = [
        "setpriv",
        "--bounding-set=-all",
        "--inh-caps=-all",
        sys.executable,
        "-c",
        textwrap.dedent(code),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "SandboxUnavailable: programs cannot be isolated here: [Errno 1] unshare" in done.stderr
    assert "ran" not in done.stdout


def test_a_sandbox_that_does_not_respond_is_unavailable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process.sys, "executable", "/bin/true")
    with pytest.raises(apr.SandboxUnavailable, match="it ended"):
        ran("print(1)")


PROMISES = {
    "names": "import os, sys; print(os.uname().nodename, sys.path, os.getpid(), os.getppid(), dict(os.environ))",
    "users": "import os; print(os.getuid(), os.geteuid(), os.getgid(), os.getegid())",
    "files": "import os; print(os.listdir('/'), sorted(os.listdir('/lib')), os.getcwd())",
    "passwords": "print(open('/etc/shadow').read())",
    "write": "open('/x', 'w')",
    "library": "import os; open(os.__file__, 'a')",
    "link": "import os; os.symlink('/etc', '/x')",
    "processes": "import os; os.fork()",
    "signals": "import os; os.kill(1, 9)",
    "network": "import socket; socket.socket()",
    "threads": "import threading; threading.Thread(target=print).start()",
    "limits": "import resource as r; print([r.getrlimit(k) for k in range(16)])",
    "raised limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))",
    "memory": "x = bytearray(1 << 30)",
    "descriptors": "import os\nfor fd in range(3, 32):\n    try: print(os.fstat(fd).st_mode)\n    except OSError: pass",
    "output": "print('x' * 100_000)",
    "stray output": "import os; os.write(1, b'{}\\n'); print(1)",
    "ptrace": "import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))",
    "mount": "import ctypes; print(ctypes.CDLL(None).mount(b'none', b'/', b'tmpfs', 0, None))",
    "unshare": "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))",
    "rights": "import ctypes; l = ctypes.CDLL(None); print(l.setuid(0), l.setgid(0), l.prctl(38, 0, 0, 0, 0))",
    "host name": "import ctypes; print(ctypes.CDLL(None).sethostname(b'x', 1))",
    "queries": "print(llm_query('a'))",
    "time": "while True: pass",
    "after": "print('new')",
}  # fmt: skip
PROMISES_SCRIPT = """
import asyncio, json, sys
from sgl_apr.methods.sandbox.process import Sandbox, SandboxLimits

async def upper(texts, deep):
    return [text.upper() for text in texts]

async def main():
    async with Sandbox({"context": "abc"}, upper, SandboxLimits(seconds=1.0)) as sandbox:
        print(json.dumps([(await sandbox.run(block)).output for block in json.loads(sys.stdin.read())]))

asyncio.run(main())
"""


def promises(user: int | None) -> dict[str, str]:
    """What the sandbox lets each program do, when it is started by a user; None: by the one who runs the tests."""
    site = Path(apr.__file__).parents[1], Path(pytest.__file__).parents[1]
    options: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    done = subprocess.run(
        [shared_python(), "-c", PROMISES_SCRIPT],
        input=json.dumps([*PROMISES.values()]), capture_output=True, text=True, check=False, cwd="/",
        env={"PYTHONPATH": os.pathsep.join(map(str, site))}, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(PROMISES, json.loads(done.stdout), strict=True))


def shared_python() -> str:
    """An interpreter of this version that every user can run, such as the system's."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        command = [
            path,
            "-c",
            "import os, sys; print(os.access(os.__file__, os.R_OK), *sys.version_info[:2])",
        ]
        try:
            options: dict[str, Any] = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **options)
        except OSError:
            continue
        if done.stdout.split() == ["True", *map(str, sys.version_info[:2])]:
            return path
    pytest.skip("no interpreter of this version that another user can run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_root_and_an_ordinary_user_get_the_same_promises():
    root, user = promises(None), promises(65534)
    assert {name: (root[name], user[name]) for name in PROMISES if root[name] != user[name]} == {}
    assert root["names"].startswith("sandbox ['/lib/python3.")
    assert root["users"] == "65534 65534 65534 65534\n"
    assert root["queries"] == "A\n"
    assert root["after"] == "new\n"
    refused = (
        "passwords",
        "write",
        "library",
        "link",
        "processes",
        "signals",
        "network",
        "threads",
        "raised limits",
    )
    assert [name for name in refused if "Error: " not in root[name]] == []
    assert {root[name].strip() for name in ("ptrace", "mount", "unshare", "host name")} == {"-1"}


def test_an_ordinary_user_gets_the_promises():
    found = promises(65534 if os.geteuid() == 0 else None)
    assert found["users"] == "65534 65534 65534 65534\n"
    assert found["rights"] == "-1 -1 -1\n"
    assert found["after"] == "new\n"
