"""The configuration of a training run, read from a TOML file and validated."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from sgl_apr.errors import AprError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Model:
    """Where a run starts: a checkpoint, or a small Llama for Countdown with fresh weights.

    Attributes:
        path: A checkpoint, or a name that `sgl-apr serve --model` knows; empty for fresh weights.
        layers: Of the fresh model.
        hidden: Hidden size of the fresh model.
        seed: Seed of the fresh weights.
        context: Tokens of the context of the fresh model.
        init: Standard deviation of the fresh weights. With few dimensions, a model learns to copy tokens far sooner from
            `hidden**-0.5` than from the usual 0.02.
    """

    path: str = ""
    layers: int = 5
    hidden: int = 128
    seed: int = 0
    context: int = 2048
    init: float = 0.02


@dataclass(frozen=True, slots=True)
class Data:
    """What the model learns from.

    Attributes:
        path: A file with one trajectory in JSON per line; empty for demonstrations of Countdown by the symbolic expert.
        dialects: Formats of the demonstrations, which take these in turn. A fresh model writes the first one by default.
        sequential: Share of demonstrations that search without forks.
        problems: Number of different problems.
        numbers: How many numbers a problem has; problems take these in turn.
        unsolvable: Share of problems that have no solution.
        window: Tokens of the longest context.
        forks: Probability of a fork, by how many numbers the problem has.
        width: Smallest and largest number of branches of a fork.
        revisit_rate: Probability of another fork after one whose branches all failed.
        hint_rate: Probability that the first fork has few branches, one of them with a step that leads to a solution.
        depth: How deep forks nest, where the format allows it.
        branches: How many branches of a trajectory have a loss, those with a solution first; 0 is all. Branches are much
            alike and have most of the tokens, so a few of them leave more of a batch to what forks them.
        answer_weight: Weight of the losses of the answer after a fork. It is short, and copies from one of many branches.
        state_width: Share of demonstrations whose prompt says how many branches all forks of the reply have.
        join: How blocks are joined in the training tree; empty is as they were joined.
        seed: Seed of problems and demonstrations.
    """

    path: str = ""
    dialects: tuple[str, ...] = ("spawn",)
    sequential: float = 0.0
    problems: int = 40_000
    numbers: tuple[int, ...] = (3, 4, 4, 4)
    unsolvable: float = 0.0
    window: int = 512
    forks: dict[str, float] = field(default_factory=lambda: {"3": 0.1, "4": 0.9})
    width: tuple[int, ...] = (2, 8)
    revisit_rate: float = 0.8
    hint_rate: float = 0.0
    depth: int = 1
    branches: int = 0
    answer_weight: float = 1.0
    state_width: float = 0.0
    join: Literal["kv", "text", ""] = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Steps:
    """How it learns: a linear warm-up, then a cosine decay to a tenth of the rate.

    Attributes:
        tokens: Tokens computed in all; each prefix counts once.
        objective: "likelihood" of what was decoded, or "join": after a KV join the model learns to predict what it predicts
            after a text join (`sgl_apr.training.join_distillation`).
        batch: Tokens of one step, padding included.
        row: Pack trajectories of all lengths into rows of so many tokens, so that every step has some of each kind. 0 takes
            trajectories of similar length for a step, one in a row.
        tag_weight: Weight of the losses of tags, relative to those of other tokens. Tags are where a model decides whether to
            fork, how wide, and when to stop, and they are few.
        width_weight: Weight of the losses of tags that follow a tag, where a fork goes on or ends. Both choices are tags, so a high
            weight does not make forks more frequent, as a high `tag_weight` does.
        rate: Peak learning rate.
        warmup: Steps of the warm-up.
        weight_decay: Weight decay.
        clip: Gradient norm above which gradients are clipped.
        checkpoint: Steps between checkpoints.
        precision: Of the matrix products. Weights and losses stay in float32. Where a processor has no instructions for
            bfloat16, float32 is faster.
        optimizer: "muon" for the matrices of the layers, and Adam for the rest; or "adam" for all, which suits a model that was
            trained with it, and small batches of a large one.
        lora_rank: Rank of low-rank adapters (LoRA) that are trained in place of the weights; 0 trains all weights. The model
            has to have its tags already.
        seed: Seed of PyTorch and of the order of batches.
    """

    tokens: int = 20_000_000
    objective: Literal["likelihood", "join"] = "likelihood"
    batch: int = 16_384
    row: int = 0
    tag_weight: float = 1.0
    width_weight: float = 1.0
    rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint: int = 100
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["muon", "adam"] = "muon"
    lora_rank: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Configuration of `sgl-apr train sft`."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    steps: Steps = field(default_factory=Steps)


def load_config(kind: type[T], path: Path, changes: Sequence[str] = ()) -> T:
    """Read a configuration.

    Args:
        kind: `SftConfig`, or `GrpoConfig` of `sgl_apr.training.grpo_config`.
        path: A TOML file.
        changes: Entries that replace those of the file, in TOML: `steps.seed=1`.

    Raises:
        AprError: If the file or one of its entries is not usable; the message names the entry and what was expected.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AprError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AprError(f"{path} is not a TOML file: {error}") from None
    for change in changes:
        try:
            entry = tomllib.loads(change)
        except tomllib.TOMLDecodeError as error:
            raise AprError(f"{change!r} is no entry in TOML such as steps.seed=1: {error}") from None
        _merge(table, entry)
    config: T = _build(kind, table, f"{path}: ")
    return config


def _merge(table: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(table.get(name), dict):
            _merge(table[name], value)
        else:
            table[name] = value


def _build(kind: Any, value: Any, where: str) -> Any:
    if not is_dataclass(kind):
        return _check_value(kind, value, where)
    names = [f.name for f in fields(kind)]
    if not isinstance(value, dict):
        raise AprError(f"{where.rstrip('. :')}: expected a table of {', '.join(names)}")
    if unknown := sorted(set(value) - set(names)):
        raise AprError(f"{where}{unknown[0]} is not known, expected one of {', '.join(names)}")
    kinds = get_type_hints(kind)
    if missing := [f.name for f in fields(kind) if f.name not in value and f.default is f.default_factory]:
        raise AprError(f"{where}{missing[0]} is missing")
    return kind(**{name: _build(kinds[name], item, f"{where}{name}.") for name, item in value.items()})  # type: ignore[operator]


def _check_value(kind: Any, value: Any, where: str) -> Any:
    where = where.rstrip(".")
    if getattr(kind, "__origin__", None) is Literal:
        if value not in get_args(kind):
            raise AprError(f"{where} = {value!r}, expected one of {', '.join(map(repr, get_args(kind)))}")
        return value
    origin = getattr(kind, "__origin__", kind)
    if isinstance(kind, UnionType):  # of a type and None, which TOML does not have
        return _check_value(get_args(kind)[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise AprError(f"{where} = {value!r}, expected a list")
        return tuple(_check_value(get_args(kind)[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise AprError(f"{where} = {value!r}, expected a table")
        return {
            name: _check_value(get_args(kind)[1], item, f"{where}.{name}") for name, item in value.items()
        }
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not origin:
        raise AprError(f"{where} = {value!r}, expected {origin.__name__}")
    return value
