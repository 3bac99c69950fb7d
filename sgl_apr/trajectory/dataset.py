"""Converts trajectories to rows of a Hugging Face dataset and back, without loss."""

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
from sgl_apr.trajectory.trajectory import SCHEMA, Trajectory

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

BATCH_ROWS = 1000  # rows that are held as Python objects at a time
_SCALARS = {int: "int64", float: "float64", str: "string", bool: "bool"}


@dataclass(frozen=True, slots=True)
class SummaryColumns:
    """Columns to filter by. They are computed from a trajectory, and ignored by `from_dataset`.

    Attributes:
        prompt: The text of the prompt.
        text: The text of the reply.
        answer: The text after the last join.
        finish: How the trunk ended.
        total_tokens: `Metrics.total`; None where tokens are unknown.
        critical_path: `Metrics.critical_path`; None where tokens are unknown.
        branches: The number of branches of all blocks.
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
        """Return the summary of a trajectory."""
        t, total, critical = trajectory, None, None
        if all(s.token_ids is not None for s in t.reply):
            weights = [0 if s.origin == "prompt" else s.tokens for s in t.spans]
            total, critical = sum(weights), max(longest_paths(t.spans, weights), default=0)
        branches = sum(len(block.branches) for block in t.blocks)
        return cls(t.prompt, t.text, t.answer, t.finish, total, critical, branches)


def to_dataset(trajectories: Iterable[Trajectory]) -> Dataset:
    """Return a dataset with one row for each trajectory.

    It has a column for each field of `Trajectory`, nested as the field is, and columns with the prompt, the text, the
    answer, the finish, the total tokens, the critical path and the number of branches, to filter by.

    Args:
        trajectories: The trajectories. They are read in batches, so an iterator is never in memory as a whole. The
            Arrow table is, because nothing is written to the cache of `datasets`.

    Raises:
        AprError: Arrow cannot hold a value: an integer beyond 64 bits, or half a surrogate pair.
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
            raise AprError(f"Arrow cannot hold a trajectory: {error}") from None
    return Dataset(pa.concat_tables(tables))


def from_dataset(dataset: Dataset) -> list[Trajectory]:
    """Return the trajectories of a dataset that `to_dataset` has made. Additional columns are ignored.

    Raises:
        AprError: The dataset lacks a column of a trajectory, or a column has another type. It is a `TraceError` if a
            row holds something that is no trajectory.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise AprError(f"expected a datasets.Dataset (one split), found a {type(dataset).__name__}")
    columns = _feature(Trajectory)
    if missing := [name for name in columns if name not in dataset.features]:
        raise AprError(f"the dataset has no column {', '.join(missing)}, expected {', '.join(columns)}")
    for name, expected in columns.items():
        if (found := dataset.features[name]) != expected:
            raise AprError(f"column {name} of the dataset: found {found}, expected {expected}")
    rows = dataset.select_columns(list(columns)).with_format(None)
    return [
        Trajectory.from_dict({"schema": SCHEMA, **row}, f"row {number}") for number, row in enumerate(rows)
    ]


@cache
def _field_types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _feature(type_: Any) -> Any:
    """The feature of a type. Every feature is nullable in Arrow."""
    from datasets import List, Value

    origin, inner = get_origin(type_), get_args(type_)
    if isinstance(type_, type) and is_dataclass(type_):
        return {name: _feature(t) for name, t in _field_types(type_).items()}
    if origin in (Union, UnionType):  # X | None
        return _feature(inner[0])
    if origin is tuple:
        return List(_feature(inner[0]))
    return Value("string" if origin is Literal else _SCALARS[type_])
