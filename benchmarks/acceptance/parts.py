"""The parts of a configuration: what each of them sends to the scheduler, and what must come back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from benchmarks.acceptance.configurations import Configuration
from benchmarks.acceptance.reference import VOCABULARY, Reference
from benchmarks.common.in_process_scheduler import SchedulerRun, make_request, memory_state, run_requests
from benchmarks.common.worker_groups import WorkerGroupCase, reference_rows
from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.server.shared_cache.compatibility import group_incompatibility
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM, Layout, commit_prompts, token_count

NEW_TOKENS = 48
PROMPT_TOKENS, HEADERS = 60, (3, 4, 5)  # of a group
# Flat, nested, and long.
LAYOUTS: tuple[Layout, ...] = (
    (20, ((7,), (3,)), 3),
    (20, ((7, ((2,), (4,)), 2), (5,)), 3),
    (300, ((200,), (150,), (250,)), 6),
)
# For pages of several tokens: branches that end within a page, at its end, and before the first one ends.
PAGE_LAYOUTS: tuple[Layout, ...] = (
    (64, ((64,), (32,)), 64),
    (70, ((5,), (90,), (1,)), 2),
    (3, ((2,), (4,)), 1),
    (130, ((66, ((3,), (70,)), 2), (17,)), 5),
)
# In nats: the mean error of an ordinary request's log-probabilities. Measured with transformers: 0.008 in bfloat16.
MAX_NOISE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
# Also in nats: how much a joined request may differ in addition to twice the noise.
TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-3}
CONTROLS = {"group_think": "blind", "hogwild": "unturned"}

Figures = dict[str, Any]


class Refused(Exception):
    """SGLang or this package refuses what a part needs. The message says why."""


class RequestFailed(Exception):
    """A request ended with an error."""


@dataclass
class StepCounter:
    """Counts the forward passes of a model runner, and how many of them were CUDA graphs, by kind."""

    graphs: dict[str, int] = field(default_factory=lambda: {"decode": 0, "extend": 0})
    passes: dict[str, int] = field(default_factory=lambda: {"decode": 0, "extend": 0})

    def attach(self, runner: Any) -> None:
        """Count the passes of this runner from now on."""
        forward = runner.forward

        def counted(batch: Any, *arguments: Any, **options: Any) -> Any:
            kind = "decode" if batch.forward_mode.is_decode() else "extend"
            output = forward(batch, *arguments, **options)
            self.passes[kind] += 1
            self.graphs[kind] += bool(output.can_run_graph)
            return output

        runner.forward = counted


class Acceptance:
    """The parts, on one scheduler.

    Args:
        scheduler: From `make_scheduler`.
        configuration: What it was started with.
        reference: The same model in float32, unless only times are measured.
        noise: The mean error of ordinary requests, if a process before this one has measured it.
    """

    def __init__(
        self,
        scheduler: Any,
        configuration: Configuration,
        reference: Reference | None,
        noise: float | None = None,
    ) -> None:
        self.scheduler, self.configuration, self._reference = scheduler, configuration, reference
        self.noise = noise
        self.dtype = str(scheduler.model_config.dtype).removeprefix("torch.")
        self.steps = StepCounter()
        self.steps.attach(scheduler.tp_worker.model_runner)
        self.memory = memory_state(scheduler)
        self._random, self._requests = random.Random(4), 0

    @property
    def parts(self) -> Mapping[str, Callable[[], Figures]]:
        """What each part measures, without `start`. Each returns its figures, among them `ok`."""
        return {
            "ordinary": self.ordinary,
            "joined": lambda: self.joined(LAYOUTS),
            "mixed": lambda: self.joined(LAYOUTS, others=8),
            "pages": lambda: self.joined(PAGE_LAYOUTS),
            "group_think": lambda: self.group("group_think"),
            "hogwild": lambda: self.group("hogwild"),
            "refused": self.refused,
            "graphs": self.graphs,
            "leak": self.leak,
        }

    def ordinary(self) -> Figures:
        """Decode prompts without a join. Their error is what the precision is worth."""
        prompts = [self._draw(token_count(layout)) for layout in LAYOUTS]
        run, requests = self._run([self._request(ids, NEW_TOKENS) for ids in prompts])
        errors, others = [], []
        for request, ids, other in zip(requests, prompts, (*prompts[1:], prompts[0]), strict=True):
            errors.append(self._error(run, request, ids))
            others.append(self._error(run, request, [*other, *ids][: len(ids)]))
        self.noise = fmean(errors)
        apart = fmean(others) > self.configuration.separation * self.noise
        limit = MAX_NOISE[self.dtype] if self._has_exact_cache else None
        return {
            "error": _rounded(errors), "limit": limit, "error_with_other_prompts": _rounded(others),
            "ok": apart and (limit is None or self.noise < limit),
        }  # fmt: skip

    def joined(self, layouts: Sequence[Layout], others: int = 0) -> Figures:
        """Decode after joins, and compare with the mask and positions of the layouts.

        Args:
            layouts: Those of the prompts.
            others: How many ordinary prompts are prefilled meanwhile.
        """
        prompts = [self._draw(token_count(layout)) for layout in layouts]
        for layout, ids in zip(layouts, prompts, strict=True):
            self._commit(layout, ids)
        joins = [self._request(ids, NEW_TOKENS, layout) for layout, ids in zip(layouts, prompts, strict=True)]
        ordinary = [self._request(self._draw(200), 4) for _ in range(others)]
        due = [(0, join) for join in joins] + [(2 + 3 * k, request) for k, request in enumerate(ordinary)]
        run = run_requests(self.scheduler, due)
        errors, as_text, again = [], [], []
        for request, layout, ids in zip(joins, layouts, prompts, strict=True):
            _check_finished(run, request.rid)
            errors.append(self._error(run, request, ids, layout))
            as_text.append(self._error(run, request, ids))
            again.append(token_count(layout[:-1]) - run.requests[request.rid].cached_tokens)
        figures = self._verdict(errors, "error_as_text", as_text)
        if others:
            served = sum(len(run.requests[request.rid].output_ids) == 4 for request in ordinary)
            figures |= {"others_served": served, "ok": figures["ok"] and served == others}
        return figures | {"computed_again": again, "ok": figures["ok"] and not any(n > 0 for n in again)}

    def group(self, kind: Any) -> Figures:
        """Decode a group of three workers, and compare each with the tokens that it sees.

        Args:
            kind: "group_think" or "hogwild".
        """
        from sglang.srt.arg_groups.overrides import resolving_view

        scheduler = self.scheduler
        what = group_incompatibility(resolving_view(scheduler.server_args), scheduler.model_config, kind)
        if what is not None:
            raise Refused(f"groups do not work with {what}")
        prompt, headers = self._draw(PROMPT_TOKENS), [self._draw(count) for count in HEADERS]
        self._run([self._request(prompt, 0)])
        self._requests += 1
        case = WorkerGroupCase(
            f"group{self._requests:04}",
            kind,
            prompt,
            headers,
            [NEW_TOKENS] * len(headers),
            position_range=256,
        )
        run = run_requests(self.scheduler, case.due())
        errors: dict[str | None, list[float]] = {}
        for control in (None, CONTROLS[kind]):
            rows = reference_rows(case, run, self.reference.model, control=control)
            errors[control] = [
                _difference(
                    _check_finished(run, case.rid(worker)), [float(row[k, t]) for k, t in enumerate(output)]
                )
                for worker, (row, output) in enumerate(zip(rows, case.outputs(run), strict=True))
            ]
        return self._verdict(errors[None], f"error_{CONTROLS[kind]}", errors[CONTROLS[kind]])

    def refused(self) -> Figures:
        """Send a join whose branches are not cached, then an ordinary request."""
        layout: Layout = (10, ((5,), (5,)), 2)
        join = self._request(self._draw(token_count(layout)), 4, layout)
        run = run_requests(self.scheduler, [(0, join)])
        status = run.finish_reason(join.rid).get("status_code")
        run, (request,) = self._run([self._request(self._draw(30), 4)])
        served = len(run.requests[request.rid].output_ids) == 4
        return {
            "status": status and int(status),
            "next_served": served,
            "ok": status == CACHE_MISS_STATUS and served,
        }

    def graphs(self) -> Figures:
        """Report how many forward passes were CUDA graphs. Decode steps have to be, unless graphs are disabled."""
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend

        steps, disabled = self.steps, check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)
        as_expected = (steps.graphs["decode"] > 0) is not disabled
        return {
            "expected": not disabled,
            **{kind: f"{steps.graphs[kind]} of {steps.passes[kind]}" for kind in steps.passes},
            "ok": as_expected and all(steps.passes.values()),
        }

    def leak(self) -> Figures:
        """Compare the slots and rows that are free or can be evicted with those at the start."""
        after = memory_state(self.scheduler)
        return {"before": self.memory, "after": after, "ok": after == self.memory}

    @property
    def reference(self) -> Reference:
        assert self._reference is not None, "the weights are not those of a checkpoint"
        return self._reference

    @property
    def _has_exact_cache(self) -> bool:
        return self.scheduler.server_args.kv_cache_dtype in ("auto", "bf16", "bfloat16")

    def _verdict(self, errors: list[float], control: str, others: list[float]) -> Figures:
        """Compare errors with the noise, and with those of a control."""
        if self.noise is None:
            raise RuntimeError("the error of ordinary requests was not measured")
        error, limit = fmean(errors), 2 * self.noise + TOLERANCE[self.dtype]
        return {
            "error": _rounded(errors), "limit": round(limit, 6), control: _rounded(others),
            "ok": error < limit and fmean(others) > self.configuration.separation * error,
        }  # fmt: skip

    def _draw(self, count: int) -> list[int]:
        return self._random.choices(VOCABULARY, k=count)

    def _request(self, ids: Sequence[int], new: int, layout: Layout | None = None) -> Any:
        self._requests += 1
        params = {LAYOUT_PARAM: json.dumps(layout)} if layout else None
        return make_request(f"request{self._requests:04}", ids, new, params, logprobs=new > 0)

    def _run(self, requests: Sequence[Any]) -> tuple[SchedulerRun, Sequence[Any]]:
        run = run_requests(self.scheduler, [(0, request) for request in requests])
        for request in requests:
            _check_finished(run, request.rid)
        return run, requests

    def _commit(self, layout: Layout, ids: Sequence[int]) -> None:
        """Bring the branches of a prompt into the cache."""
        for ranges, own in commit_prompts(layout):
            self._run([self._request([t for first, last in ranges for t in ids[first:last]], 0, own)])

    def _error(
        self, run: SchedulerRun, request: Any, ids: Sequence[int], layout: Layout | None = None
    ) -> float:
        """The mean error of a request's log-probabilities, for a prompt and a layout, in nats."""
        req = run.requests[request.rid]
        output = list(req.output_ids)
        last = layout[-1] if layout else len(ids)
        assert isinstance(last, int)
        complete = (*(layout or (0,))[:-1], last + len(output) - 1)
        return _difference(req, self.reference.logprobs(ids, complete, output))


def _check_finished(run: SchedulerRun, rid: str) -> Any:
    """Return a request, or raise the error with which it ended."""
    reason = run.finish_reason(rid)
    if reason.get("type") == "abort":
        raise RequestFailed(f"{rid} ended with status {reason.get('status_code')}: {reason.get('message')}")
    return run.requests[rid]


def _difference(req: Any, expected: Sequence[float]) -> float:
    computed = req.logprob.output_token_logprobs_val
    return fmean(abs(float(a) - b) for a, b in zip(computed, expected, strict=True))


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]
