"""Workers on flashinfer: the plan and the merge, with torch in place of flashinfer's kernels; on a GPU, with them."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.cascade import merge_states as flashinfer_merge_states
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sgl_apr.errors import LaunchError
from sgl_apr.server import hooks
from sgl_apr.server.cpu.attention import AprCpuAttention
from sgl_apr.server.shared_cache import flashinfer_attention, registration
from sgl_apr.server.shared_cache.forward_batch import rotation_of
from sgl_apr.server.shared_cache.views import BlockView, WorkerView
from tests.support.worker_views import SIZE, WorkerBatch, two_groups


class TorchDecodeWrapper:
    """flashinfer's decode wrapper: pages of one token, layout NHD, and sums of exponentials by their logarithm to base 2.

    What it is called with also has to suit the signatures of flashinfer.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        inspect.signature(BatchDecodeWithPagedKVCacheWrapper).bind(*arguments, **options)
        self.plans = 0

    def plan(self, *arguments: Any, **options: Any) -> None:
        inspect.signature(BatchDecodeWithPagedKVCacheWrapper._plan_impl).bind(self, *arguments, **options)
        indptr, indices, page_lengths, self.heads, self.kv_heads, self.dim, page = arguments
        assert page == 1
        assert indptr.dtype == indices.dtype == page_lengths.dtype == torch.int32
        assert indptr.device.type == page_lengths.device.type == "cpu"
        assert page_lengths.tolist() == [1] * (len(indptr) - 1)
        self.blocks = [indices[first:last].long() for first, last in pairwise(indptr.tolist())]
        self.plans += 1

    def forward_return_lse(self, q, paged_kv_cache, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inspect.signature(BatchDecodeWithPagedKVCacheWrapper.forward_return_lse).bind(
            self, q, paged_kv_cache, **options
        )
        assert q.shape == (len(self.blocks), self.heads, self.dim)
        assert q.is_contiguous()
        assert all(cache.shape[1:] == (self.kv_heads, self.dim) for cache in paged_kv_cache)
        outputs, sums = [], []
        for query, slots in zip(q, self.blocks, strict=True):
            keys, values = (
                x[slots].repeat_interleave(self.heads // self.kv_heads, 1) for x in paged_kv_cache
            )
            scores = torch.einsum("hd,khd->hk", query.float(), keys.float()) * options["sm_scale"]
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values.float()))
            sums.append(scores.logsumexp(-1) / math.log(2))
        return torch.stack(outputs).to(q.dtype), torch.stack(sums)


def torch_merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """flashinfer's `merge_states`."""
    assert list(inspect.signature(flashinfer_merge_states).parameters) == ["v", "s"]
    assert v.is_contiguous()
    assert s.is_contiguous()
    assert (v.shape[:3], s.dtype) == (s.shape, torch.float32)
    weights = (s * math.log(2)).softmax(1)
    return (v.float() * weights[..., None]).sum(1).to(v.dtype), torch.logsumexp(
        s * math.log(2), 1
    ) / math.log(2)


def pool_of(case: WorkerBatch, dtype: torch.dtype, device: str = "cpu") -> MHATokenToKVPool:
    _, kv_heads, dim = case.heads
    pool = MHATokenToKVPool(SIZE - 1, 1, dtype, kv_heads, dim, 2, device, False)
    for layer in range(2):
        for buffer, values in zip(pool.get_kv_buffer(layer), (case.key, case.value), strict=True):
            buffer.copy_(values)
    return pool


def backend_of(case: WorkerBatch, dtype: torch.dtype = torch.float32) -> FlashInferAttnBackend:
    """SGLang's backend, as far as workers need it. Its `__init__` needs a GPU."""
    heads, kv_heads, dim = case.heads
    backend = FlashInferAttnBackend.__new__(FlashInferAttnBackend)
    backend.__dict__ |= {
        "req_to_token_pool": SimpleNamespace(req_to_token=case.table),
        "token_to_kv_pool": pool_of(case, dtype),
        "indices_updater_decode": SimpleNamespace(
            num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=dim, data_type=dtype, q_data_type=dtype
        ),
        "kv_index_translator": SimpleNamespace(reads_are_translated=False),
        "workspace_buffer": torch.empty(0),
        "decode_backend": "fa2",
        "decode_use_tensor_cores": False,
        "decode_split_tile_size": None,
        "decode_uses_dequant_workspace": False,
        "num_wrappers": 1,
        "is_dllm_model": False,
        "worker_views": case.views,
    }
    layers = [SimpleNamespace(rotary_emb=case.rotary)]
    flashinfer_attention.keep_model_runner(None, backend, SimpleNamespace(model=layers))
    return backend


@pytest.fixture
def torch_flashinfer(monkeypatch) -> None:
    """torch in place of the two functions of flashinfer, and of finding the rotary embedding of a model."""
    monkeypatch.setattr(
        flashinfer_attention,
        "make_decode_wrapper",
        lambda backend: TorchDecodeWrapper(backend.workspace_buffer, "NHD", backend=backend.decode_backend),
    )
    monkeypatch.setattr(flashinfer_attention, "merge_states", torch_merge_states)
    monkeypatch.setattr(
        flashinfer_attention.Rotation,
        "from_model",
        classmethod(lambda cls, model: cls.from_rotary_embedding(model[0].rotary_emb)),
    )


def layer_of(case: WorkerBatch, number: int = 0) -> Any:
    heads, _, dim = case.heads
    return SimpleNamespace(
        layer_id=number, tp_q_head_num=heads, head_dim=dim, scaling=dim**-0.5, logit_cap=0.0,
        k_scale_float=None, v_scale_float=None,
    )  # fmt: skip


def decode(
    case: WorkerBatch, backend: Any, dtype: torch.dtype = torch.float32, layers: int = 1
) -> torch.Tensor:
    """A forward pass through the hooks. Its rows are those of requests, as the stock backend computes them."""
    flashinfer_attention.plan_pass(None, backend, SimpleNamespace(forward_mode=ForwardMode.DECODE))
    stock = torch.stack([case.expected[row] for row in range(len(case.rows))]).to(dtype)
    for view in backend.worker_views:
        stock[view.batch_row] = float("nan")  # of what workers see, the stock backend knows nothing
    query = case.query.to(dtype).flatten(1)
    for number in range(layers):
        output = flashinfer_attention.forward_decode(
            lambda _backend, q, k, v, layer, batch, save_kv_cache=True: stock.clone().flatten(1),
            backend, query, None, None, layer_of(case, number), None, save_kv_cache=False,
        )  # fmt: skip
    return output.unflatten(1, case.heads[::2])


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 16), (8, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workers_between_requests(torch_flashinfer, heads, dtype):
    case = two_groups(heads)
    output = decode(case, backend_of(case, dtype), dtype)
    case.check(output, 2e-5 if dtype == torch.float32 else 4e-2)


def test_queries_that_are_not_turned_differ(torch_flashinfer):
    case = two_groups()
    backend = backend_of(case)
    backend.worker_views = [
        WorkerView(v.batch_row, tuple(BlockView(b.row, b.first, b.last, 0) for b in v.blocks))
        for v in case.views
    ]
    with pytest.raises(AssertionError):
        case.check(decode(case, backend))


def test_a_worker_that_lacks_blocks(torch_flashinfer):
    """A place without a block has no weight, and an empty block is none."""
    case = WorkerBatch((4, 2, 32))
    case.add_hogwild(0, 30, [7])
    case.add_hogwild(3, 50, [3, 1, 2])
    case.views[0] = WorkerView(
        0, (*case.views[0].blocks[:1], BlockView(2, 9, 9, 4), *case.views[0].blocks[1:])
    )
    case.check(decode(case, backend_of(case)))


def test_one_plan_for_all_layers_of_a_pass(torch_flashinfer):
    case = two_groups()
    backend = backend_of(case)
    case.check(decode(case, backend, layers=2))
    assert backend.apr_views._wrapper.plans == 1
    case.check(decode(case, backend))
    assert backend.apr_views._wrapper.plans == 2


def test_passes_without_workers_are_those_of_the_backend(torch_flashinfer):
    case = two_groups()
    backend = backend_of(case)
    decode(case, backend)
    backend.worker_views = []
    case.check(decode(case, backend), 0)
    backend.worker_views = case.views  # of the last decode batch: an extension has none
    flashinfer_attention.plan_pass(None, backend, SimpleNamespace(forward_mode=ForwardMode.EXTEND))
    assert backend.apr_views._blocks is None


def test_a_batch_with_workers_runs_without_graphs():
    views: list[WorkerView] = []
    backend = SimpleNamespace(worker_views=views)
    runner = SimpleNamespace(model_runner=SimpleNamespace(attn_backend=backend))
    for possible in (True, False):
        original = lambda _runner, _batch, possible=possible: possible  # noqa: E731
        assert flashinfer_attention.can_run_graph(original, runner, None) is possible
        backend.worker_views = [WorkerView(0, ())]
        assert flashinfer_attention.can_run_graph(original, runner, None) is False
        backend.worker_views = []
    runner.model_runner.attn_backend = SimpleNamespace()  # a backend that knows no workers
    assert flashinfer_attention.can_run_graph(lambda *_: True, runner, None) is True


@pytest.fixture
def targets(monkeypatch) -> list[str]:
    """The functions of SGLang that get hooks, with the real checks of them, on a machine as if with a GPU."""
    found: list[str] = []

    def hook(kind: str, path: str, parameters: list[str], function: Any) -> None:
        hooks.require_sglang(path, parameters)
        found.append(path.rpartition(":")[2])

    monkeypatch.setattr(hooks, "_hook", hook)
    monkeypatch.setattr(flashinfer_attention, "_registered", False)
    monkeypatch.setattr(flashinfer_attention, "has_accelerator", lambda: True)
    return found


def test_hooks_are_on_functions_that_sglang_has(targets, monkeypatch):
    flashinfer_attention.register_hooks()
    assert targets == [
        "FlashInferAttnBackend.__init__",
        "FlashInferAttnBackend.init_forward_metadata",
        "FlashInferAttnBackend.forward_decode",
        "DecodeCudaGraphRunner.can_run_graph",
    ]
    monkeypatch.setattr(FlashInferAttnBackend, "forward_decode", lambda self, query: query)
    with pytest.raises(LaunchError, match="forward_decode"):
        flashinfer_attention.register_hooks()


def test_without_a_gpu_there_are_no_hooks(targets, monkeypatch):
    monkeypatch.setattr(flashinfer_attention, "has_accelerator", lambda: False)
    flashinfer_attention.register_hooks()
    assert not targets


def test_backends_that_serve_workers(targets):
    supports = flashinfer_attention.attention_supports_views
    case = WorkerBatch((4, 2, 64))
    backend = backend_of(case)
    assert not supports(backend), "without the hooks it does not"
    flashinfer_attention.register_hooks()
    assert supports(backend)
    for change in (
        {"num_wrappers": 2},
        {"is_dllm_model": True},
        {"decode_uses_dequant_workspace": True},
        {"kv_index_translator": SimpleNamespace(reads_are_translated=True)},
        {"token_to_kv_pool": pool_of(case, torch.float8_e5m2)},
        {"indices_updater_decode": SimpleNamespace(num_qo_heads=129, head_dim=64)},
    ):
        other = backend_of(case)
        other.__dict__ |= change
        assert not supports(other), change

    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=None, token_to_kv_pool=pool_of(case, torch.float32)
    )
    assert supports(AprCpuAttention(runner))
    runner.token_to_kv_pool = None
    assert not supports(AprCpuAttention(runner))
    assert not supports(SimpleNamespace(token_to_kv_pool=pool_of(case, torch.float32)))


def test_a_server_whose_attention_cannot_turn_queries_refuses_hogwild():
    pool = pool_of(WorkerBatch((4, 2, 64)), torch.float32)
    runner = SimpleNamespace(attn_backend=SimpleNamespace(token_to_kv_pool=pool), token_to_kv_pool=pool)
    with pytest.raises(ValueError, match=r"^SimpleNamespace over a MHATokenToKVPool"):
        rotation_of(runner)


def test_groups_come_with_the_hooks_on_flashinfer(targets, monkeypatch):
    monkeypatch.setattr(registration, "hook_after", lambda *arguments: None)
    monkeypatch.setattr(registration, "hook_around", lambda *arguments: None)
    registration.register_hooks()
    assert "FlashInferAttnBackend.forward_decode" in targets


@pytest.mark.gpu
@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels_of_flashinfer(dtype, tensor_cores):
    """The same plan with flashinfer's kernels. Eight heads share a key where tensor cores are used."""
    case = two_groups((8, 1, 128) if tensor_cores else (8, 4, 64))
    case.key.nan_to_num_(0)
    case.value.nan_to_num_(0)
    backend = backend_of(case, dtype)
    backend.token_to_kv_pool = pool_of(case, dtype, "cuda")
    backend.req_to_token_pool.req_to_token = case.table.cuda()
    backend.workspace_buffer = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    backend.decode_use_tensor_cores = tensor_cores
    attention = flashinfer_attention.FlashInferViews(backend, case.rotation)
    attention.plan(case.views)
    expected = torch.stack([case.expected[row] for row in range(len(case.rows))])
    output = expected.to("cuda", dtype).flatten(1)
    for view in case.views:
        output[view.batch_row] = float("nan")
    attention.attend(case.query.to("cuda", dtype).flatten(1), output, layer_of(case))
    case.check(output.cpu().unflatten(1, case.heads[::2]), 4e-2)
