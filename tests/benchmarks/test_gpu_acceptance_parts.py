"""The parts of the first minutes on a GPU, as they run on a CPU: all of them are ok, and each of them can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.acceptance import parts as parts_module
from benchmarks.acceptance.configurations import CPU, CUDA, PARTS, Configuration
from benchmarks.acceptance.parts import Acceptance, RequestFailed
from benchmarks.acceptance.reference import Reference, make_checkpoint, make_weightless_checkpoint
from benchmarks.acceptance.speed import SpeedAcceptance
from benchmarks.common.in_process_scheduler import close_scheduler, make_scheduler
from benchmarks.common.worker_groups import WorkerGroupCase
from sgl_apr.engine.sglang_names import GROUP_PARAM
from sgl_apr.server.launch.defaults import as_flags
from tests.support.paths import ROOT
from tests.support.resolve_on_cuda import resolve_on_cuda

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def acceptance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acceptance]:
    """The parts on a scheduler whose ordinary requests are right."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    scheduler = make_scheduler(checkpoint)
    try:
        acceptance = Acceptance(scheduler, Configuration("test"), Reference(checkpoint, "float32"))
        assert acceptance.ordinary()["ok"]
        yield acceptance
    finally:
        close_scheduler(scheduler)


@pytest.mark.timeout(900)
def test_the_complete_run_on_a_cpu_is_ok():
    command = [sys.executable, "benchmarks/gpu_acceptance.py", "--device", "cpu", "--seconds", "800"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, check=False)
    *lines, verdict = map(json.loads, done.stdout.splitlines())
    assert verdict["verdict"] == "ok", (verdict, [line for line in lines if line["ok"] is not True])
    assert done.returncode == 0
    assert not verdict["not_supported"]
    assert [(line["configuration"], line["part"]) for line in lines] == [
        (configuration.name, part) for configuration in CPU for part in configuration.parts
    ]
    starts = {line["configuration"]: line for line in lines if line["part"] == "start"}
    assert starts["apr_cpu, pages of 16"]["page_size"] == 16
    assert starts["apr_cpu, Python core, bfloat16"]["core"] != starts["apr_cpu"]["core"]
    assert starts["apr_cpu, Python core, bfloat16"]["dtype"] == "torch.bfloat16"
    assert "apr_cpu: joined ok" in done.stderr


def test_ordinary_requests_that_are_wrong_are_not_ok(acceptance: Acceptance):
    head = acceptance.scheduler.tp_worker.model_runner.model.lm_head.weight
    noise = acceptance.noise
    head.data.mul_(1.2)
    try:
        assert acceptance.ordinary()["ok"] is False
    finally:
        head.data.div_(1.2)
        acceptance.noise = noise


@pytest.mark.parametrize("part", ["joined", "mixed", "pages"])
def test_joins_at_wrong_positions_are_not_ok(
    acceptance: Acceptance, part: str, monkeypatch: pytest.MonkeyPatch
):
    from sgl_apr.server.kv_join import positions

    assert acceptance.parts[part]()["ok"] is True
    monkeypatch.setattr(positions, "shift_positions", lambda *arguments, **options: None)
    figures = acceptance.parts[part]()
    assert figures["ok"] is False
    assert max(figures["error"]) > figures["limit"]


def test_joins_that_are_read_as_text_are_not_ok(acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch):
    request = Acceptance._request
    monkeypatch.setattr(Acceptance, "_request", lambda self, ids, new, layout=None: request(self, ids, new))
    assert acceptance.parts["joined"]()["ok"] is False


def test_joins_whose_branches_are_lost_are_not_ok(acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Acceptance, "_commit", lambda *arguments: None)
    with pytest.raises(RequestFailed, match="status 409"):
        acceptance.parts["joined"]()


@pytest.mark.parametrize("kind", ["group_think", "hogwild"])
def test_workers_that_do_not_see_each_other_are_not_ok(
    acceptance: Acceptance, kind: str, monkeypatch: pytest.MonkeyPatch
):
    assert acceptance.parts[kind]()["ok"] is True
    requests = WorkerGroupCase.requests

    def independent(case: WorkerGroupCase) -> list[Any]:
        made = requests(case)
        for request in made:
            del request.sampling_params.custom_params[GROUP_PARAM]
        return made

    monkeypatch.setattr(WorkerGroupCase, "requests", independent)
    assert acceptance.parts[kind]()["ok"] is False


def test_a_lost_join_that_is_answered_is_not_ok(acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch):
    assert acceptance.refused()["ok"] is True
    request = Acceptance._request
    monkeypatch.setattr(Acceptance, "_request", lambda self, ids, new, layout=None: request(self, ids, new))
    assert acceptance.refused()["ok"] is False


def test_steps_without_graphs_are_not_ok_where_graphs_are_expected(acceptance: Acceptance, monkeypatch):
    assert acceptance.graphs()["ok"] is True
    monkeypatch.setitem(acceptance.steps.graphs, "decode", 1)
    assert acceptance.graphs()["ok"] is False


def test_slots_that_are_lost_are_not_ok(acceptance: Acceptance):
    assert acceptance.leak()["ok"] is True
    allocator = acceptance.scheduler.token_to_kv_pool_allocator
    slots = allocator.alloc(5)
    assert acceptance.leak()["ok"] is False
    allocator.free(slots)
    assert acceptance.leak()["ok"] is True


def test_a_join_or_a_group_that_slows_steps_down_is_not_ok_on_a_gpu(
    acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch
):
    speed = SpeedAcceptance(acceptance.scheduler, acceptance.configuration, None)
    times: dict[str, float] = {}
    monkeypatch.setattr(SpeedAcceptance, "_step_ms", lambda self, requests: times.get(requests, 10.0))
    monkeypatch.setattr(SpeedAcceptance, "_forks", lambda *arguments: "forks")
    monkeypatch.setattr(SpeedAcceptance, "_with_join", lambda *arguments: "joined")
    monkeypatch.setattr(SpeedAcceptance, "_workers", lambda self, kind, prefix: kind)
    for on_gpu in (True, False):
        speed.on_gpu = on_gpu
        for slow, part in (("joined", "speed"), ("group_think", "group_speed"), ("hogwild", "group_speed")):
            times.clear()
            assert speed.parts[part]()["ok"] is True
            times[slow] = 14.0
            assert speed.parts[part]()["ok"] is not on_gpu, slow


def test_a_backend_without_groups_is_reported_with_its_reason(acceptance: Acceptance, monkeypatch):
    monkeypatch.setattr(
        parts_module, "group_incompatibility", lambda *arguments: "--attention-backend triton"
    )
    with pytest.raises(parts_module.Refused, match="groups do not work with --attention-backend triton"):
        acceptance.group("hogwild")


def test_every_configuration_has_only_parts_that_exist():
    for configuration in (*CPU, *CUDA):
        kind: Any = SpeedAcceptance if "speed" in configuration.parts else Acceptance
        parts = kind.__new__(kind).parts
        assert set(configuration.parts) - {"start"} <= set(parts), configuration.name
        assert configuration.may_refuse <= set(configuration.parts), configuration.name
    assert set(PARTS) <= {part for c in CPU for part in c.parts}


def test_sglang_takes_the_flags_of_every_configuration_on_a_gpu(tmp_path: Path):
    """SGLang resolves them as on a Hopper card. On Blackwell its own choice needs pages of 64 tokens."""
    checkpoint = make_weightless_checkpoint(tmp_path / "checkpoint", large=True)
    defaults = {"radix_cache_backend": "apr", "schedule_policy": "lpm", "grammar_backend": "none"}
    commands = [as_flags({"model": checkpoint, **defaults, **configuration.flags}) for configuration in CUDA]
    (tmp_path / "driver").mkdir()
    cases = [("9.0", command) for command in commands] + [("10.0", commands[0])]
    results = resolve_on_cuda(cases, tmp_path / "driver")
    assert [result.error for result in results] == [""] * len(cases)
    *hopper, blackwell = results
    assert [(r.backend, r.page_size) for r in hopper] == [
        (c.flags.get("attention_backend", "fa3"), c.flags.get("page_size", 1)) for c in CUDA
    ]
    assert {(r.cache, r.has_radix_cache) for r in results} == {("apr", True)}
    assert (blackwell.backend, blackwell.page_size) == ("trtllm_mha", 64)


def test_the_script_runs_from_a_checkout_that_is_not_installed(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_acceptance.py"), "--device", "cpu", "--list"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(line)["configuration"] for line in listed.stdout.splitlines()] == [c.name for c in CPU]
