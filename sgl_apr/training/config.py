"""What a training run is asked for, read from a TOML file and checked; nothing is run here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from sgl_apr.errors import AprError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Model:
    """Where a run begins: a checkpoint, or a small Llama for Countdown with fresh weights."""

    path: str = ""
    layers: int = 5
    hidden: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Data:
    """What is learned from.

    path: lines of JSON, each a trajectory; empty for Countdown, searched by the symbolic expert.
    kind: "sequential" searches in a line, "parallel" forks. window: tokens of the longest context.
    problems: how many different ones. numbers: how many each has, one in turn. forks: how often a problem of
    so many numbers is forked. width: fewest and most branches. again: how often a fork follows one that failed.
    lucky: how often the first fork has a step among its few that leads to a solution.
    branches: of how many branches of a trajectory it is learned from, first those that found a solution; 0 is
    all. They are alike, and most of the tokens, so that a few leave more for what forks them.
    state_width: the prompt says how many branches all forks of a reply have.
    join: how blocks are joined in the training structure, where not as they were.
    """

    path: str = ""
    kind: Literal["sequential", "parallel"] = "parallel"
    dialect: str = "spawn"
    problems: int = 40_000
    numbers: tuple[int, ...] = (3, 4, 4, 4)
    window: int = 512
    forks: dict[str, float] = field(default_factory=lambda: {"3": 0.1, "4": 0.9})
    width: tuple[int, ...] = (2, 8)
    revisit_rate: float = 0.8
    hint_rate: float = 0.0
    branches: int = 0
    state_width: bool = False
    join: Literal["kv", "text", ""] = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Steps:
    """How it is learned: Muon, a linear warm-up, then a cosine down to a tenth of the rate.

    tokens: computed in all, each prefix once. batch: tokens of one step, padding included.
    checkpoint: steps between checkpoints.
    """

    tokens: int = 20_000_000
    batch: int = 16_384
    rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint: int = 100
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SftConfig:
    """`sgl-apr train sft`."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    steps: Steps = field(default_factory=Steps)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What a step of reinforcement is learned from: so many replies to each of so many problems, by a real server.

    tokens, branch_tokens, width, blocks: of the budget of each reply.
    reward: one of `sgl_apr.training.rewards`; `parallel` weighs the parallel term of "gated", `length` what
    "gated" and "apr" take off for 1,000 tokens of the critical path.
    advantage: "mean" (ThreadWeaver's P-GRPO), "grpo" or "papo".
    """

    problems: int = 32
    group: int = 8
    numbers: tuple[int, ...] = (3, 4, 4, 4)
    temperature: float = 1.0
    tokens: int = 6000
    branch_tokens: int = 160
    width: int = 16
    blocks: int = 4
    mode: Literal["auto", "sequential", "parallel"] = "auto"
    reward: str = "gated"
    parallel: float = 0.3
    length: float = 0.0
    advantage: Literal["mean", "grpo", "papo"] = "mean"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Updates:
    """How it is learned: plain steps along the gradient, one for all replies of a step, `rate` long where its norm is
    `clip` or more, and shorter in proportion where it is less.

    branches: the weight of what branches decode, against 1 of what the trunk does: how good a reply is says little of
    each of its branches. batch: tokens that go through the model at once.
    """

    steps: int = 30
    rate: float = 0.05
    branches: float = 1.0
    batch: int = 16_384
    clip: float = 1.0
    checkpoint: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """`sgl-apr train grpo`."""

    model: Model
    dialect: str = "spawn"
    rollouts: Rollouts = field(default_factory=Rollouts)
    updates: Updates = field(default_factory=Updates)


def load_config(kind: type[T], path: Path) -> T:
    """The configuration in a file; raises `AprError` that names the entry and says what was expected."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AprError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AprError(f"{path} is no TOML file: {error}") from None
    made: T = _build(kind, found, f"{path}: ")
    return made


def _build(kind: Any, given: Any, where: str) -> Any:
    if not is_dataclass(kind):
        return _check_value(kind, given, where)
    names = [f.name for f in fields(kind)]
    if not isinstance(given, dict):
        raise AprError(f"{where.rstrip('. :')}: expected a table of {', '.join(names)}")
    if unknown := sorted(set(given) - set(names)):
        raise AprError(f"{where}{unknown[0]} is not known, expected one of {', '.join(names)}")
    kinds = get_type_hints(kind)
    if missing := [f.name for f in fields(kind) if f.name not in given and f.default is f.default_factory]:
        raise AprError(f"{where}{missing[0]} is missing")
    return kind(**{name: _build(kinds[name], value, f"{where}{name}.") for name, value in given.items()})  # type: ignore[operator]


def _check_value(kind: Any, given: Any, where: str) -> Any:
    where = where.rstrip(".")
    if getattr(kind, "__origin__", None) is Literal:
        if given not in get_args(kind):
            raise AprError(f"{where} = {given!r}, expected one of {', '.join(map(repr, get_args(kind)))}")
        return given
    origin = getattr(kind, "__origin__", kind)
    if isinstance(kind, UnionType):  # of a type and None, which TOML has not
        return _check_value(get_args(kind)[0], given, where)
    if origin is tuple:
        if not isinstance(given, list):
            raise AprError(f"{where} = {given!r}, expected a list")
        return tuple(_check_value(get_args(kind)[0], item, where) for item in given)
    if origin is dict:
        if not isinstance(given, dict):
            raise AprError(f"{where} = {given!r}, expected a table")
        return {
            name: _check_value(get_args(kind)[1], item, f"{where}.{name}") for name, item in given.items()
        }
    if origin is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if type(given) is not origin:
        raise AprError(f"{where} = {given!r}, expected {origin.__name__}")
    return given
