"""A temporary folder for each server, so that nothing is left of it in the folders for temporary files.

SGLang makes files and sockets in the temporary folder and a segment in shared memory, and removes few of them. All
processes of a server get a folder of their own for them, and its name is part of the segment's. The launcher removes
both after the last process. The server does so if the launcher was killed, and the next launch if both were killed.
Until then, a lock shows that the folder is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgl_apr.server.hooks import hook_after

PREFIX = "sgl-apr-server-"
# Where SGLang makes files outside the temporary folder. Their names contain its instance id.
OUTSIDE = (Path("/dev/shm"), Path("/tmp"))
LOCK_NAME = "lock"
# The path of a Unix socket has at most 107 bytes on Linux and 103 on macOS. Names in the folder have about 12.
MAX_PATH_LENGTH = 85


class ServerFolder:
    """A temporary folder that exists until `remove`.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        base = _base_folder()
        remove_abandoned(base)
        # The lock is taken before the folder has the name that `remove_abandoned` looks for.
        new = Path(tempfile.mkdtemp(prefix="sgl-apr-new-", dir=base))
        self._lock = lock_folder(new)
        self.path = base / new.name.replace("sgl-apr-new-", PREFIX)
        new.rename(self.path)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the processes of the server."""
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _torch_cache()
        return {"TMPDIR": str(self.path), "TORCHINDUCTOR_CACHE_DIR": cache}

    @contextmanager
    def used_by_this_process(self) -> Iterator[None]:
        """Inside the block, make the temporary files of this process and its children in the folder."""
        variables = self.environment
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        tempdir, tempfile.tempdir = tempfile.tempdir, None
        try:
            yield
        finally:
            tempfile.tempdir = tempdir
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def remove(self) -> None:
        """Remove the folder and the segments of shared memory. Does nothing the second time."""
        remove_folder(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _base_folder() -> Path:
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) + len(PREFIX) + 9 > MAX_PATH_LENGTH and os.access("/tmp", os.W_OK):
        return Path("/tmp")
    return base


def _torch_cache() -> str:
    """Where torch keeps compiled kernels by default: it derives that from the temporary folder, too."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{user}")


def lock_folder(folder: Path) -> int | None:
    """Mark a folder as used by this process, and by those that it forks.

    Returns:
        The open lock file. None if the folder is gone.
    """
    try:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def remove_folder(folder: Path) -> None:
    """Remove a server's folder, and what SGLang has named after it elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
    for outside in OUTSIDE:
        for path in outside.glob(f"sglang_load*{folder.name}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def remove_abandoned(base: Path) -> None:
    """Remove the folders of this user's servers whose processes were all killed."""
    for folder in base.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # it was removed meanwhile, or is no folder of a server
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            remove_folder(folder)
        finally:
            os.close(lock)


def this_servers_folder() -> Path | None:
    """Return the folder of the server that this process belongs to, or None."""
    folder = Path(os.environ.get("TMPDIR", ""))
    return folder if folder.name.startswith(PREFIX) else None


def register_hooks() -> None:
    """Let SGLang's instance id contain the name of the server's folder, if it has one."""
    hook_after("sglang.srt.server_args:PortArgs.init_new", ["server_args"], _name_instance)


def _name_instance(ports: Any, *_: Any, **__: Any) -> None:
    if folder := this_servers_folder():
        ports.instance_id = f"{folder.name}-{ports.instance_id}"
