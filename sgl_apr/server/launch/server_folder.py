"""A temporary folder for each server, so that nothing is left of it in the folders for temporary files.

SGLang makes sockets in the temporary folder and a segment in shared memory, and does not remove them. With
`--enable-metrics` it also makes a folder there. A server gets a folder of its own for all files, and its name is part
of the segment's. The launcher removes both after the last
process. The server does so if the launcher was killed, and the next launch if both were killed. Until then, a lock
shows that the folder is in use. Caches of compiled kernels stay in the temporary folder, for the next server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgl_apr.server.hooks import hook_around

FOLDER_ENV = "SGLANG_APR_FOLDER"  # the folder, for the processes of a server
METRICS_ENV = "PROMETHEUS_MULTIPROC_DIR"  # where the processes of a server write their metrics
METRICS_NAME = "metrics"
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
        return {FOLDER_ENV: str(self.path)}

    @contextmanager
    def used_by_this_process(self, *, metrics: bool = False) -> Iterator[None]:
        """Inside the block, an engine that this process launches uses the folder.

        Args:
            metrics: The engine writes metrics, which are in the folder until it is removed.
        """
        os.environ[FOLDER_ENV] = str(self.path)
        if metrics:
            keep_metrics_in(self.path)
        try:
            yield
        finally:
            os.environ.pop(FOLDER_ENV, None)

    def remove(self) -> None:
        """Remove the folder and the segments of shared memory. Does nothing the second time."""
        remove_folder(self.path)
        if os.environ.get(METRICS_ENV) == str(self.path / METRICS_NAME):  # the next engine makes its own
            del os.environ[METRICS_ENV]
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _base_folder() -> Path:
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) + len(PREFIX) + 9 > MAX_PATH_LENGTH and os.access("/tmp", os.W_OK):
        return Path("/tmp")
    return base


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
    folder = os.environ.get(FOLDER_ENV)
    return Path(folder) if folder else None


def keep_metrics_in(folder: Path) -> None:
    """Let the processes of a server write their metrics into its folder, unless the environment names another.

    SGLang makes a folder for them that is left if the server is killed.
    """
    if METRICS_ENV not in os.environ:
        metrics = folder / METRICS_NAME
        metrics.mkdir(exist_ok=True)
        os.environ[METRICS_ENV] = str(metrics)


def register_hooks() -> None:
    """Let SGLang make its sockets in the server's folder, and name the segment after it, if there is one."""
    hook_around("sglang.srt.server_args:PortArgs.init_new", ["server_args"], _make_ports)
    reporter = "sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter"
    hook_around(f"{reporter}._init_fpm", [], _in_folder)


def _make_ports(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    ports = _in_folder(original, *args, **options)
    if folder := this_servers_folder():
        ports.instance_id = f"{folder.name}-{ports.instance_id}"
    return ports


def _in_folder(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of SGLang's start, which makes temporary files."""
    folder = this_servers_folder()
    if folder is None:
        return original(*args, **options)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        return original(*args, **options)
    finally:
        tempfile.tempdir = before
