"""The positions of joined requests on a GPU: the host waits for the device in no step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sgl_apr.server.kv_join.positions import _offsets_on_device, shift_positions
from tests.server.kv_join.test_positions import LENGTHS, OFFSETS, forward_batch, scheduled

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """An operation that waits for the device is an error."""
    _offsets_on_device.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mrope", [False, True])
def test_neither_a_decode_step_nor_an_extension_waits(no_waiting: None, mrope: bool):
    torch.cuda.set_sync_debug_mode("default")  # the batches are made with copies that wait
    steps = [forward_batch([9, 30 + k, 41 + k], True, GPU, mrope) for k in range(3)]
    extension = forward_batch(list(range(sum(LENGTHS))), False, GPU, mrope)
    torch.cuda.set_sync_debug_mode("error")
    for batch in (*steps, extension):
        shift_positions(batch, None, scheduled(OFFSETS))
    torch.cuda.set_sync_debug_mode("default")
    assert [batch.positions.tolist() for batch in steps] == [[9, 25 + k, 39 + k] for k in range(3)]
    assert extension.positions.tolist() == [0, 1, 2, 3, -1, 3, 4, 5]


def test_the_check_would_notice_a_copy_that_waits(no_waiting: None):
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.tensor(OFFSETS, device=GPU)
