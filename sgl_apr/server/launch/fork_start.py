"""SGLang's processes as forks of the server's first one, which has imported what each of them would import again.

An import of SGLang takes 12 to 30 s of a core, so that a async_branches scheduler doubles the time that a server takes to
start. Only without an accelerator, whose state no fork survives, and only in a process of `main`: it has one thread
of ours, which holds no lock, and has computed nothing, so there is no pool of OpenMP threads to lose.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from typing import Any

from sgl_apr.server.hooks import hook_after, require_sglang


def fork_children(launcher: socket.socket) -> None:
    """Has SGLang fork from here on; no child holds `launcher`, whose end says that this process is gone."""
    hook_after("sglang.srt.entrypoints.engine:_set_envs_and_config", ["server_args"], _fork)
    require_sglang("sglang.srt.plugins.hook_registry:HookRegistry").apply_hooks()
    os.register_at_fork(after_in_child=launcher.close)


def _fork(result: Any, *arguments: Any, **options: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # SGLang has just asked for "spawn"
