"""Trajectories as rows of a Hugging Face dataset, Arrow and Parquet without loss; where they are kept is the caller's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from itertools import islice
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from sgl_apr.errors import AprError
from sgl_apr.trajectory.metrics import longest_paths
from sgl_apr.trajectory.spans import Finish
from sgl_apr.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

BATCH_ROWS = 1000  # rows that are Python objects at a time
_SCALARS = {int: "int64", float: "float64", str: "string", bool: "bool"}


@dataclass(frozen=True, slots=True)
class SummaryColumns:
    """Columns to filter by, computed from a trajectory and never read back.

    `total_tokens` and `critical_path` are those of `Trajectory.metrics`, None where tokens are unknown;
    `branches` counts the branches of all blocks.
    """

    prompt: str
    text: str
    answer: str
    finish: Finish | None
    total_tokens: int | None
    critical_path: int | None
    branches: int

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory) -> SummaryColumns:
        """That of one trajectory."""
        t, total, critical = trajectory, None, None
        if all(s.token_ids is not None for s in t.reply):
            weights = [0 if s.origin == "prompt" else s.tokens for s in t.spans]
            total, critical = sum(weights), max(longest_paths(t.spans, weights), default=0)
        branches = sum(len(block.branches) for block in t.blocks)
        return cls(t.prompt, t.text, t.answer, t.finish, total, critical, branches)


def to_dataset(trajectories: Iterable[Trajectory]) -> Dataset:
    """One row a trajectory: a column for each of its fields, nested as they are, then those of `Summary`.

    The trajectories are taken in batches, so an iterator of them is never in memory at once; the Arrow
    table is, as nothing is written to the cache of `datasets`. Raises `AprError` for what Arrow cannot
    hold: an integer beyond 64 bits, half a surrogate pair.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset, Features

    schema = Features({**_feature(Trajectory), **_feature(SummaryColumns)}).arrow_schema
    rows = ({**asdict(t), **asdict(SummaryColumns.from_trajectory(t))} for t in trajectories)
    tables = [schema.empty_table()]
    while batch := list(islice(rows, BATCH_ROWS)):
        try:
            tables.append(pa.Table.from_pylist(batch, schema))
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise AprError(f"a trajectory that Arrow cannot hold: {error}") from None
    return Dataset(pa.concat_tables(tables))


def from_dataset(dataset: Dataset) -> list[Trajectory]:
    """The trajectories that `to_dataset` wrote, whatever other columns stand beside them.

    Raises `AprError` for a dataset that lacks one of their columns, or holds something else in it.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise AprError(f"expected a datasets.Dataset (one split), found a {type(dataset).__name__}")
    columns = _feature(Trajectory)
    if missing := [name for name in columns if name not in dataset.features]:
        raise AprError(f"the dataset has no column {', '.join(missing)}, expected {', '.join(columns)}")
    for name, wanted in columns.items():
        if (found := dataset.features[name]) != wanted:
            raise AprError(f"column {name} of the dataset: found {found}, expected {wanted}")
    rows = dataset.select_columns(list(columns)).with_format(None)
    return [_value(Trajectory, row, f"row {number}") for number, row in enumerate(rows)]


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _feature(kind: Any) -> Any:
    """The feature that holds a `kind`; all are nullable in Arrow."""
    from datasets import List, Value

    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return {name: _feature(k) for name, k in _kinds(kind).items()}
    if origin in (Union, UnionType):  # X | None
        return _feature(inner[0])
    if origin is tuple:
        return List(_feature(inner[0]))
    return Value("string" if origin is Literal else _SCALARS[kind])


def _value(kind: Any, data: Any, where: str) -> Any:
    """A `kind` from what its feature gave back, which can only be wrong in a null or a name."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if data is None else _value(inner[0], data, where)
    if data is None:
        raise AprError(f"{where}: found null, expected a value")
    if origin is Literal and data not in inner:
        raise AprError(f"{where}: found {data!r}, expected {' or '.join(inner)}")
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{n: _value(k, data[n], f"{where}, {n}") for n, k in _kinds(kind).items()})
    if origin is tuple:
        if inner[0] is int and None not in data:  # token ids are nearly all there is to read
            return tuple(data)
        return tuple(_value(inner[0], item, where) for item in data)
    return data
