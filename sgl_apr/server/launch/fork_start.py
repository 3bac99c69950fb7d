"""Starts SGLang's processes as forks of the server's first process, which has already imported SGLang.

Importing SGLang takes about 10 s of a core, so a scheduler that imports it again doubles the start-up time of a
server. This is done only without an accelerator, whose state does not survive a fork, and only in the process of
`sgl_apr.server.launch.main`. That process has one thread of ours, which holds no lock, and it has computed nothing
yet, so there is no pool of OpenMP threads to lose. The environment variable `SGLANG_APR_FORK_START=0` switches it off.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
from typing import Any

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import FORK_START_ENV
from sgl_apr.server.hooks import hook_after, is_enabled, require_sglang

logger = logging.getLogger(__name__)


def fork_children(launcher: socket.socket) -> None:
    """Let SGLang fork its processes from now on, unless `FORK_START_ENV` is "0" or SGLang is not as expected.

    Args:
        launcher: The socket to the launcher. Its end tells the launcher that this process is gone, so children
            close their copy.
    """
    if not is_enabled(FORK_START_ENV):
        return
    try:
        hook_after("sglang.srt.entrypoints.engine:_set_envs_and_config", ["server_args"], _use_fork)
    except LaunchError as error:
        logger.warning("each process of the server imports SGLang again: %s", error)
        return
    require_sglang("sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks")()
    os.register_at_fork(after_in_child=launcher.close)


def _use_fork(result: Any, *arguments: Any, **options: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # SGLang has just set "spawn"
