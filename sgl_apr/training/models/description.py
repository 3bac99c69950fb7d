"""Describe a checkpoint from its files, without loading its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TypedDict

from sgl_apr.errors import AprError


class Description(TypedDict):
    """The result of `describe`, in JSON values.

    Attributes:
        path: The checkpoint.
        model_type: As in its config.json.
        vocab_size: As in its config.json.
        parameters: Number of parameters; tied weights count once.
        dtype: As in its config.json.
        eos: End-of-text tokens.
        tags: Tags that are single tokens.
        bytes: Size on disk.
    """

    path: str
    model_type: str
    vocab_size: int
    parameters: int
    dtype: str
    eos: list[str]
    tags: list[str]
    bytes: int


def describe(path: Path | str, tags: Sequence[str] | None = None) -> Description:
    """Describe the checkpoint in a directory.

    Args:
        path: The checkpoint.
        tags: Tags to look for among the added tokens; by default all pairs `<x>`, `</x>`.

    Raises:
        AprError: If the directory is not a checkpoint.
    """
    from safetensors import safe_open
    from tokenizers import Tokenizer

    root = Path(path)
    for name in ("config.json", "tokenizer.json"):
        if not (root / name).is_file():
            raise AprError(f"{root} is not a checkpoint: it has no {name}")
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    shapes: dict[str, list[int]] = {}
    for file in sorted(root.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return Description(
        path=str(root),
        model_type=config["model_type"],
        vocab_size=config["vocab_size"],
        parameters=sum(prod(shape) for shape in shapes.values()),
        dtype=str(config.get("dtype") or config.get("torch_dtype")),
        eos=[str(tokenizer.id_to_token(id)) for id in _eos_ids(root, config)],
        tags=_pairs(added) if tags is None else [tag for tag in tags if tag in added],
        bytes=sum(file.stat().st_size for file in root.rglob("*") if file.is_file()),
    )


def _eos_ids(root: Path, config: dict[str, object]) -> list[int]:
    generation = root / "generation_config.json"
    if generation.is_file():
        config = config | json.loads(generation.read_text(encoding="utf-8"))
    ids = config.get("eos_token_id")
    if isinstance(ids, int):
        return [ids]
    return list(ids) if isinstance(ids, list) else []


def _pairs(added: set[str]) -> list[str]:
    openers = sorted(token for token in added if re.fullmatch(r"<[^/<>|][^<>|]*>", token))
    return [tag for opener in openers for tag in (opener, f"</{opener[1:]}") if f"</{opener[1:]}" in added]
