"""Starts SGLang's scheduler in the test process, once for each configuration in a row."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.in_process_scheduler import close_scheduler, make_scheduler, memory_state

TREE_CORE = "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"
# SGLang then checks in every step that each slot has one owner, and each row.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


class Schedulers:
    """One scheduler at a time, which is replaced when a test needs another configuration.

    Attributes:
        model: The directory of the model.
        starts: How many schedulers have been started.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self.starts = 0
        self._scheduler: Any = None
        self._configuration: tuple[Any, ...] = ()
        self._before: dict[str, str | None] = {}

    def get(self, *, overlap: bool = True, core: str = "rust", **flags: Any) -> Any:
        """A scheduler with these options: the one that runs, or a new one.

        Args:
            overlap: As in `make_scheduler`.
            core: SGLang's implementation of the radix tree, "rust" or "python".
            flags: As in `make_scheduler`.
        """
        configuration = (overlap, core, tuple(sorted(flags.items())))
        if self._scheduler is None or configuration != self._configuration:
            self.close()
            self._set_environment({**STRICT, TREE_CORE: core})
            self._scheduler = make_scheduler(self.model, overlap=overlap, **flags)
            self._configuration = configuration
            self.starts += 1
        return self._scheduler

    def memory(self) -> tuple[int, int] | None:
        """The free slots and rows of the scheduler that runs, if one does."""
        return None if self._scheduler is None else memory_state(self._scheduler)

    def close(self) -> None:
        """Close the scheduler that runs."""
        if self._scheduler is not None:
            close_scheduler(self._scheduler)
            self._scheduler = None
        self._set_environment(self._before)
        self._before = {}

    def _set_environment(self, values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            self._before.setdefault(name, os.environ.get(name))
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
