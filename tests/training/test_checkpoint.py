"""The files of a training run on a full disk: the last complete ones stay, and the error is one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import sgl_apr as apr
from sgl_apr.training.checkpoint import CHECKPOINT_FILE, Progress, load_checkpoint, save_checkpoint, start_run
from tests.support.drills import file_size_limit


@dataclass
class Config:
    note: str


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path):
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters())
    (tmp_path / "log.jsonl").write_text("{}\n" * 2)
    save_checkpoint(tmp_path, model, optimizer, Progress(1))
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    with file_size_limit(50_000), pytest.raises(apr.AprError, match="cannot write to") as raised:
        save_checkpoint(tmp_path, model, optimizer, Progress(2))
    assert "\n" not in str(raised.value)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT_FILE, "log.jsonl"]
    assert load_checkpoint(tmp_path, model, optimizer) == Progress(1)


def test_a_configuration_that_cannot_be_written_leaves_no_half(tmp_path: Path):
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    (start / "config.json").write_text("{}")
    with file_size_limit(10), pytest.raises(apr.AprError, match=r"cannot write to .*out.*File too large"):
        start_run(Config("a"), start, out)
    assert list(out.iterdir()) == []
    assert start_run(Config("b"), start, out) == start
    with pytest.raises(apr.AprError, match="holds a run with another configuration"):
        start_run(Config("a"), start, out)


def test_a_place_where_no_folder_can_be_made(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    with pytest.raises(apr.AprError, match=r"cannot write to .*file"):
        start_run(Config("a"), tmp_path, tmp_path / "file" / "out")


def test_a_run_that_is_older_than_an_entry_of_its_configuration_continues(tmp_path: Path):
    @dataclass(frozen=True)
    class Old:
        name: str = "a"

    @dataclass(frozen=True)
    class New:
        name: str = "a"
        sizes: tuple[int, ...] = (1,)
        more: dict[str, float] = field(default_factory=dict)

    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out"
    start_run(Old(), tmp_path, out)
    assert start_run(New(), tmp_path, out) == tmp_path
    for other in (New(sizes=(2,)), New("b"), Old()):
        with pytest.raises(apr.AprError, match="another configuration"):
            start_run(other, tmp_path, out)
    (out / "run.json").write_text("{")
    with pytest.raises(apr.AprError, match="another configuration"):
        start_run(New(), tmp_path, out)
