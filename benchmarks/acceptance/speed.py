"""The time of a decode step in the shape of an 8B model: forks, a batch with a joined request, and groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import median
from typing import Any

from benchmarks.acceptance.parts import Acceptance, Figures, Refused
from benchmarks.common.in_process_scheduler import run_requests
from benchmarks.common.worker_groups import WorkerGroupCase
from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.shared_cache.compatibility import group_incompatibility
from sgl_apr.trajectory.join_layout import Layout, token_count

BATCH, STEPS, WARM_STEPS = (
    16,
    96,
    16,
)  # the first and the last steps are not counted: the batch is not complete
WORKERS, POSITION_RANGE = 4, 256
FORK_WIDTHS = (1, 4, 16)
JOINED: Layout = (100, ((60,), (40,)), 4)
MAX_JOINED_RATIO = 1.05  # above, a joined request takes the overlap from its whole batch
MAX_GROUP_RATIO = {"group_think": 1.10, "hogwild": 1.35}


class SpeedAcceptance(Acceptance):
    """Times on one scheduler with weights of any value. Limits count on a GPU only, where nothing else runs."""

    @property
    def parts(self) -> Mapping[str, Callable[[], Figures]]:
        return {
            "speed": self.speed,
            "group_speed": self.group_speed,
            "synchronisations": self.synchronisations,
        }

    def speed(self) -> Figures:
        """Time steps of forks of a prefix, and of a batch with and without a joined request, three times in turn."""
        prefix, joined = self._prefix(), self._draw(token_count(JOINED))
        self._commit(JOINED, joined)
        self._step_ms(self._forks(prefix, 2))
        forks = {width: self._step_ms(self._forks(prefix, width)) for width in FORK_WIDTHS}
        without, with_joined = [], []
        for _ in range(3):
            without.append(self._step_ms(self._forks(prefix, BATCH)))
            with_joined.append(self._step_ms(self._with_join(prefix, joined)))
        ratio = median(with_joined) / median(without)
        return {
            "forks_ms": forks, "sixteen_ms": without, "one_of_them_joined_ms": with_joined, "ratio": round(ratio, 3),
            "limit": MAX_JOINED_RATIO if self.on_gpu else None, "graphs": self.steps.graphs, "passes": self.steps.passes,
            "ok": not self.on_gpu or ratio <= MAX_JOINED_RATIO,
        }  # fmt: skip

    def group_speed(self) -> Figures:
        """Time steps of groups, in turn with as many independent requests."""
        from sglang.srt.arg_groups.overrides import resolving_view

        scheduler, prefix = self.scheduler, self._prefix()
        figures: Figures = {"ok": True}
        for kind, limit in MAX_GROUP_RATIO.items():
            what = group_incompatibility(resolving_view(scheduler.server_args), scheduler.model_config, kind)
            if what is not None:
                figures[kind] = {"not supported": f"groups do not work with {what}"}
                continue
            alone, group = [], []
            for _ in range(3):
                alone.append(self._step_ms(self._forks(prefix, WORKERS)))
                group.append(self._step_ms(self._workers(kind, prefix)))
            ratio = median(group) / median(alone)
            figures[kind] = {
                "independent_ms": alone, "group_ms": group, "ratio": round(ratio, 3),
                "limit": limit if self.on_gpu else None,
            }  # fmt: skip
            figures["ok"] &= not self.on_gpu or ratio <= limit
        if all("not supported" in figures[kind] for kind in MAX_GROUP_RATIO):
            raise Refused(figures["group_think"]["not supported"])
        return figures

    def synchronisations(self) -> Figures:
        """Count how often the host waits for the GPU, with and without a joined request in the batch."""
        import torch

        prefix, joined = self._prefix(), self._draw(token_count(JOINED))
        self._commit(JOINED, joined)

        def count(requests: Sequence[Any]) -> int:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    run_requests(self.scheduler, [(0, request) for request in requests])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return sum("synchroniz" in str(warning.message) for warning in caught)

        without, with_joined = count(self._forks(prefix, BATCH)), count(self._with_join(prefix, joined))
        # A few are part of a join's prefill. One for each step would be `STEPS` more.
        return {
            "sixteen": without,
            "one_of_them_joined": with_joined,
            "steps": STEPS,
            "ok": with_joined - without < STEPS // 2,
        }

    @cached_property
    def on_gpu(self) -> bool:
        """Whether the limits count, and the prefix is long."""
        return has_accelerator()

    def _prefix(self) -> list[int]:
        prefix = self._draw(2000 if self.on_gpu else 200)
        self._run([self._request(prefix, 0)])
        return prefix

    def _forks(self, prefix: list[int], width: int) -> list[Any]:
        return [self._request(prefix + self._draw(4), STEPS) for _ in range(width)]

    def _with_join(self, prefix: list[int], joined: list[int]) -> list[Any]:
        return [self._request(joined, STEPS, JOINED), *self._forks(prefix, BATCH - 1)]

    def _workers(self, kind: Any, prefix: list[int]) -> list[Any]:
        self._requests += 1
        headers = [self._draw(4) for _ in range(WORKERS)]
        name, steps = f"group{self._requests:04}", [STEPS] * WORKERS
        return WorkerGroupCase(name, kind, prefix, headers, steps, POSITION_RANGE).requests()

    def _step_ms(self, requests: Sequence[Any]) -> float:
        """The median milliseconds of a decode step."""
        run = run_requests(self.scheduler, [(0, request) for request in requests])
        short = [r.rid for r in requests if len(run.requests[r.rid].output_ids) != STEPS]
        if short:
            raise RuntimeError(f"not all tokens were decoded: {', '.join(short)}")
        seconds = run.round_seconds[WARM_STEPS:-WARM_STEPS]
        return round(median(seconds) * 1e3, 3)
