"""Fixtures for groups of workers: a scheduler in the test process, and its model in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sgl_apr.training.models import random_llama
from tests.support.group_reference import load_reference
from tests.support.schedulers import Schedulers


@pytest.fixture(scope="module")
def group_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends on everything that it reads."""
    return random_llama(tmp_path_factory.mktemp("groups"), layers=4, hidden=256, seed=3)


@pytest.fixture(scope="module")
def schedulers(group_model: Path) -> Iterator[Schedulers]:
    schedulers = Schedulers(group_model)
    yield schedulers
    schedulers.close()


@pytest.fixture(scope="module")
def reference(group_model: Path) -> Any:
    return load_reference(group_model)


@pytest.fixture(scope="module")
def tokenizer(group_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(group_model)
