"""Attention of the workers of groups on a GPU, by flashinfer: hooks on SGLang's backend "flashinfer".

The backend computes a batch that has workers as usual. Then the rows of the workers are replaced: flashinfer's decode
wrapper attends to each block as if it were a request, with the worker's query turned for the block, and returns the
logarithm (to base 2) of the sum of exponentials, by which `merge_states` merges what belongs to one worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgl_apr.server.hooks import has_accelerator, hook_after, hook_around, require_sglang
from sgl_apr.server.shared_cache.rotary import Rotation, Turns, pool_obstacle
from sgl_apr.server.shared_cache.view_plan import plan_views
from sgl_apr.server.shared_cache.views import WorkerView

_BACKEND = "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend"
_DECODE_PARAMETERS = ["q", "k", "v", "layer", "forward_batch", "save_kv_cache"]
_GRAPH_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner"
_MAX_BLOCK_THREADS = 1024  # of CUDA; `merge_states` has all heads of a row in one block of threads

_registered = False  # whether `register_hooks` has set the hooks in this process

# Attends to the blocks: queries [blocks, heads, dim] to (output of the same shape, float32 [blocks, heads] to base 2).
AttendBlocks = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# flashinfer's `merge_states`: [workers, parts, heads, dim] and [workers, parts, heads] without `parts`.
MergeStates = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """The blocks of all workers of a batch, as flashinfer takes a batch of requests with pages of one token.

    Attributes:
        indptr: [blocks + 1], int32, on the CPU: where the slots of each block begin in `indices`.
        indices: int32, on the device: the slots of all blocks.
        page_lengths: [blocks], int32, on the CPU: all 1.
        query_rows: [blocks], on the device: the row of the batch whose query reads the block.
        turns: How far this query is turned for it.
        places: [blocks], on the device: where the result is put, in [workers * parts].
        batch_rows: [workers], on the device: their rows of the batch.
        parts: Blocks of the worker that has the most.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    page_lengths: torch.Tensor
    query_rows: torch.Tensor
    turns: Turns
    places: torch.Tensor
    batch_rows: torch.Tensor
    parts: int

    @classmethod
    def from_views(
        cls, views: Sequence[WorkerView], req_to_token: torch.Tensor, rotation: Rotation
    ) -> BlockBatch:
        """Plan the blocks of a batch, without waiting for the device."""
        from sglang.srt.utils.common import async_h2d, is_pin_memory_available

        plan, device = plan_views(views), req_to_token.device
        readers = [reader for block in plan.blocks for reader in block.readers]
        slots = [
            req_to_token[block.row, block.first : block.last] for block in plan.blocks for _ in block.readers
        ]
        pin = is_pin_memory_available(device)
        # On the CPU, because flashinfer plans there and would wait for a copy; pinned, so that it can send them itself.
        lengths = torch.tensor([0, *map(len, slots)])
        indptr = lengths.cumsum(0).to(torch.int32)
        page_lengths = torch.ones(len(readers), dtype=torch.int32)
        rows = async_h2d(
            [[reader.batch_row for reader in readers], [reader.place for reader in readers]],
            dtype=torch.int64,
            device=device,
        )
        return cls(
            indptr=indptr.pin_memory() if pin else indptr,
            indices=torch.cat(slots).to(torch.int32),
            page_lengths=page_lengths.pin_memory() if pin else page_lengths,
            query_rows=rows[0],
            turns=rotation.turns([reader.turn for reader in readers], device),
            places=rows[1],
            batch_rows=async_h2d(list(plan.batch_rows), dtype=torch.int64, device=device),
            parts=plan.parts,
        )

    def replace_rows(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        rotation: Rotation,
        attend_blocks: AttendBlocks,
        merge_states: MergeStates,
    ) -> None:
        """Compute the attention of the workers in one layer.

        Args:
            query: [rows, heads, dim].
            output: [rows, heads, dim]. The rows of the workers are replaced.
            rotation: The model's rotary embedding.
            attend_blocks: Attends to each block with its query.
            merge_states: Merges the parts of each worker.
        """
        turned = rotation.turn_queries(query.index_select(0, self.query_rows), self.turns)
        attended, sums = attend_blocks(turned)
        size = len(self.batch_rows) * self.parts
        parts = attended.new_zeros(size, *attended.shape[1:]).index_copy_(0, self.places, attended)
        # A place without a block has no weight.
        weights = sums.new_full((size, sums.shape[1]), float("-inf")).index_copy_(0, self.places, sums)
        merged, _ = merge_states(parts.unflatten(0, (-1, self.parts)), weights.unflatten(0, (-1, self.parts)))
        output.index_copy_(0, self.batch_rows, merged.to(output.dtype))


class FlashInferViews:
    """What SGLang's backend "flashinfer" needs for workers: a decode wrapper of its own, and the plan of a pass.

    Args:
        backend: The backend.
        rotation: The rotary embedding of its model.
    """

    def __init__(self, backend: Any, rotation: Rotation) -> None:
        self._backend = backend
        self._rotation = rotation
        self._wrapper = make_decode_wrapper(backend)
        self._blocks: BlockBatch | None = None

    def plan(self, views: Sequence[WorkerView]) -> None:
        """Plan a forward pass. Without views, it has no workers."""
        self._blocks = None
        if not views:
            return
        backend, sizes = self._backend, self._backend.indices_updater_decode
        table = backend.req_to_token_pool.req_to_token
        self._blocks = blocks = BlockBatch.from_views(views, table, self._rotation)
        self._wrapper.plan(
            blocks.indptr, blocks.indices, blocks.page_lengths,
            sizes.num_qo_heads, sizes.num_kv_heads, sizes.head_dim, 1,
            q_data_type=sizes.q_data_type, kv_data_type=sizes.data_type, non_blocking=True,
            fixed_split_size=backend.decode_split_tile_size, disable_split_kv=False,
        )  # fmt: skip

    def attend(self, query: torch.Tensor, output: torch.Tensor, layer: Any) -> None:
        """Replace the rows of workers in the output of a layer.

        Args:
            query: [rows, heads * dim].
            output: [rows, heads * dim].
            layer: SGLang's `RadixAttention`.
        """
        if self._blocks is None:
            return
        cache = self._backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)

        def attend_blocks(turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            attended, sums = self._wrapper.forward_return_lse(
                turned.contiguous(), cache, sm_scale=layer.scaling, logits_soft_cap=layer.logit_cap,
                k_scale=layer.k_scale_float, v_scale=layer.v_scale_float,
            )  # fmt: skip
            return attended, sums

        shape = (-1, layer.tp_q_head_num, layer.head_dim)
        self._blocks.replace_rows(
            query.reshape(shape), output.view(shape), self._rotation, attend_blocks, merge_states
        )


def make_decode_wrapper(backend: Any) -> Any:
    """Make flashinfer's decode wrapper as SGLang's backend makes its own, in the same workspace."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    return BatchDecodeWithPagedKVCacheWrapper(
        backend.workspace_buffer,
        "NHD",
        backend=backend.decode_backend,
        use_tensor_cores=backend.decode_use_tensor_cores,
    )


def merge_states(parts: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over several blocks.

    Args:
        parts: [workers, parts, heads, dim].
        sums: [workers, parts, heads], the logarithms to base 2 of the sums of exponentials, in float32.

    Returns:
        [workers, heads, dim] and [workers, heads].
    """
    from flashinfer.cascade import merge_states as merge

    merged, total = merge(parts, sums)
    return merged, total


def attention_supports_views(attn_backend: Any) -> bool:
    """Return whether an attention backend of SGLang reads `worker_views`: apr_cpu does, and flashinfer on a GPU."""
    from sgl_apr.server.cpu.attention import AprCpuAttention

    if pool_obstacle(getattr(attn_backend, "token_to_kv_pool", None)):
        return False
    if isinstance(attn_backend, AprCpuAttention):
        return True
    if not _registered or type(attn_backend) is not require_sglang(_BACKEND):
        return False
    sizes = attn_backend.indices_updater_decode
    threads = sizes.head_dim // max(8, sizes.head_dim // 32) * sizes.num_qo_heads
    return not (
        attn_backend.num_wrappers > 1  # sliding windows or cross attention
        or attn_backend.is_dllm_model
        or attn_backend.decode_uses_dequant_workspace
        or attn_backend.kv_index_translator.reads_are_translated
        or threads > _MAX_BLOCK_THREADS
    )


def register_hooks() -> None:
    """Let SGLang's backend "flashinfer" serve workers, on a machine with a GPU.

    Raises:
        LaunchError: SGLang's functions are not as expected.
    """
    global _registered
    if not has_accelerator():
        return
    hook_after(f"{_BACKEND}.__init__", ["model_runner"], keep_model_runner)
    hook_after(f"{_BACKEND}.init_forward_metadata", ["forward_batch"], plan_pass)
    hook_around(f"{_BACKEND}.forward_decode", _DECODE_PARAMETERS, forward_decode)
    hook_around(f"{_GRAPH_RUNNER}.can_run_graph", ["forward_batch"], can_run_graph)
    _registered = True


def keep_model_runner(
    _result: None, backend: Any, model_runner: Any, *_arguments: Any, **_options: Any
) -> None:
    """Keep the backend's model runner: the model is loaded after the backend is made."""
    backend.apr_model_runner = model_runner


def plan_pass(_result: Any, backend: Any, forward_batch: Any) -> None:
    """Plan the workers of a forward pass, after the backend has planned it."""
    views = getattr(backend, "worker_views", ()) if forward_batch.forward_mode.is_decode() else ()
    attention: FlashInferViews | None = getattr(backend, "apr_views", None)
    if attention is None and views:
        rotation = Rotation.from_model(backend.apr_model_runner.model)
        attention = backend.apr_views = FlashInferViews(backend, rotation)
    if attention is not None:
        attention.plan(views)


def forward_decode(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Take the place of the backend's method: it computes every row, and the rows of workers are replaced."""
    output = original(backend, q, k, v, layer, *arguments, **options)
    attention: FlashInferViews | None = getattr(backend, "apr_views", None)
    if attention is not None:
        attention.attend(q, output, layer)
    return output


def can_run_graph(original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
    """Run a batch with workers without a CUDA graph: the blocks that they read differ from step to step."""
    views = getattr(runner.model_runner.attn_backend, "worker_views", ())
    return not views and original(runner, forward_batch)
