"""The positions of joined requests: no step waits for the device, and every token has its own noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_apr.server.kv_join import positions
from sgl_apr.server.kv_join.joined_prefix import JoinedPrefix
from sgl_apr.server.kv_join.positions import sample_unshifted, shift_positions

OFFSETS = [0, -5, -2]
LENGTHS = [4, 1, 3]  # of the extensions of three requests
ON_HOST = torch.device("cpu")
ON_DEVICE = torch.device("meta")  # has no data, so reading a value there raises an error


class Operations(TorchDispatchMode):
    """Records the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operation.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return operation(*args, **(kwargs or {}))


def scheduled(offsets: list[int]) -> SimpleNamespace:
    """A batch of the scheduler."""
    nodes = [JoinedPrefix((), None, "apr:", 0, offset) if offset else object() for offset in offsets]
    return SimpleNamespace(reqs=[SimpleNamespace(last_node=node) for node in nodes])


def forward_batch(
    start: list[int], decode: bool, device: torch.device, mrope: bool = False
) -> SimpleNamespace:
    flat = torch.tensor(start, dtype=torch.int64).to(device)
    batch = SimpleNamespace(
        positions=flat,
        mrope_positions=flat.repeat(3, 1) if mrope else None,
        forward_mode=SimpleNamespace(is_decode=lambda: decode),
    )
    if not decode:
        batch.extend_seq_lens = torch.tensor(LENGTHS, dtype=torch.int32).to(device)
        batch.extend_seq_lens_cpu = LENGTHS
    return batch


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is copied to the device. A copy that the host would have to wait for is an error."""
    made: list[tuple] = []
    positions._offsets_on_device.cache_clear()
    stock_copy, stock_tensor = positions.async_h2d, torch.tensor

    def copy(values: list[int], **options: Any) -> torch.Tensor:
        made.append(tuple(values))
        return stock_copy(values, **options)

    def tensor(*values: Any, device: Any = None, **options: Any) -> torch.Tensor:
        assert device is None, "a copy from pageable memory: the host waits until it is done"
        return stock_tensor(*values, **options)

    monkeypatch.setattr(positions, "async_h2d", copy)
    monkeypatch.setattr(torch, "tensor", tensor)
    return made


@pytest.mark.parametrize("mrope", [False, True])
def test_a_decode_step_only_adds(copies: list[tuple], mrope: bool):
    """Neither a copy to the device nor a value from it, unless the requests of the batch have changed."""
    for step in range(5):
        batch = forward_batch([9, 30 + step, 41 + step], True, ON_DEVICE, mrope)
        with Operations() as operations:
            shift_positions(batch, None, scheduled(OFFSETS))
        if step:
            assert operations.names == ["add"] * (2 if mrope else 1)
    assert copies == [tuple(OFFSETS)]
    shift_positions(forward_batch([9, 50], True, ON_DEVICE), None, scheduled(OFFSETS[:2]))
    assert copies == [tuple(OFFSETS), tuple(OFFSETS[:2])]


def test_an_extension_reads_nothing_from_the_device(copies: list[tuple]):
    batch = forward_batch([0] * sum(LENGTHS), False, ON_DEVICE)
    with Operations() as operations:
        shift_positions(batch, None, scheduled(OFFSETS))
    assert not {"_local_scalar_dense", "item"} & set(operations.names)
    assert copies == [tuple(OFFSETS)]


def test_an_ordinary_batch_is_left_as_it_is(copies: list[tuple]):
    batch = forward_batch([9, 30, 41], True, ON_DEVICE)
    before = batch.positions
    with Operations() as operations:
        shift_positions(batch, None, scheduled([0, 0, 0]))
    assert batch.positions is before
    assert (operations.names, copies) == ([], [])


@pytest.mark.parametrize("mrope", [False, True])
@pytest.mark.parametrize(
    ("decode", "start", "shifted"),
    [
        (True, [9, 30, 41], [9, 25, 39]),
        (True, [9, 30, 41, 7], [9, 25, 39, 7]),  # a row of a beam
        (False, [5, 6, 7, 8, 30, 40, 41, 42], [5, 6, 7, 8, 25, 38, 39, 40]),
    ],
)
def test_every_token_of_a_joined_request_is_shifted(
    decode: bool, start: list[int], shifted: list[int], mrope: bool
):
    batch = forward_batch(start, decode, ON_HOST, mrope)
    if decode:
        shift_positions(batch, None, scheduled(OFFSETS))
    else:
        shift_positions(batch, None, batch=scheduled(OFFSETS))
    assert batch.positions.tolist() == shifted
    assert not mrope or batch.mrope_positions.tolist() == [shifted] * 3, "all three rows"


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("decode", [True, False])
def test_a_seeded_sample_has_the_position_of_its_length(decode: bool, seed: int | None):
    """SGLang's sampler takes the length after an extension, and `positions` after a decode step."""
    seeds = None if seed is None else torch.tensor([seed, seed, seed])
    batch = forward_batch([9, 30, 41] if decode else [0] * sum(LENGTHS), decode, ON_HOST)
    batch.seq_lens, batch.sampling_info = torch.tensor([10, 31, 42]), SimpleNamespace(sampling_seed=seeds)
    shift_positions(batch, None, scheduled(OFFSETS))
    shifted, passed = batch.positions, []

    def stock(runner: Any, logits: Any, batch: Any) -> str:
        passed.append((batch.positions if batch.forward_mode.is_decode() else batch.seq_lens - 1).tolist())
        return "tokens"

    assert sample_unshifted(stock, None, None, batch) == "tokens"
    assert passed == [[9, 25, 39] if decode and seed is None else [9, 30, 41]]
    assert batch.positions is shifted
