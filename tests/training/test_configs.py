"""The configurations of the repository can be read, and both recipes for SmolLM2 differ in what they train alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_apr.training.config import SftConfig, load_config
from tests.support.paths import ROOT

SMOLLM2 = sorted((ROOT / "configs").glob("smollm2-*.toml"))


@pytest.mark.parametrize("path", SMOLLM2, ids=lambda path: path.stem)
def test_recipes_of_smollm2(path: Path):
    config = load_config(SftConfig, path)
    assert config.model.path == "smollm2:threadweaver"
    assert config.steps.row <= config.steps.batch
    assert config.steps.optimizer == "adam"
    assert bool(config.steps.lora_rank) == path.stem.endswith("lora")
    assert len(SMOLLM2) == 3
