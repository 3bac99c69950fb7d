"""Files with trajectories, of `sgl-apr eval ... -o` and of `apr.run_many`, as entries of a page; none is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.store import RUN_FILE
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.page_entry import PageEntry

TITLE_FIELDS = ("task", "model", "split", "seed", "temperature")  # of an evaluation, for its title


def read_entries(paths: Sequence[Path]) -> Iterator[PageEntry]:
    """The trajectories of files, or of directories with a run.jsonl, one file after another.

    Of several files each method goes by the name of its file as well. Half a line at the end, of a run that still
    writes or was interrupted, is passed over. Raises `AprError` that names the line for anything else.
    """
    names = _names(paths) if len(paths) > 1 else [""]
    for path, name in zip(map(resolve_run_file, paths), names, strict=True):
        for where, data in _lines(path):
            yield _entry(data, where, f"{name} " if name else "")


def describe_evaluations(paths: Sequence[Path]) -> str:
    """What was asked in the evaluations among them, in a line."""
    found = list[str]()
    for path in map(resolve_run_file, paths):
        head = _head(path)
        shown = [f"{name} {head[name]}" for name in TITLE_FIELDS if head.get(name) is not None]
        found.append(", ".join(shown).removeprefix("task "))
    return " · ".join(dict.fromkeys(filter(None, found)))


def count_trajectories(paths: Sequence[Path]) -> int:
    """How many trajectories there are to read, if they are."""
    found = 0
    for path in map(resolve_run_file, paths):
        lines = sum(1 for _ in _whole_lines(path))
        found += lines - (lines > 0 and not _is_trajectory(_head(path)))
    return found


def resolve_run_file(path: Path) -> Path:
    """The file itself; raises `AprError` if there is none."""
    found = path / RUN_FILE if path.is_dir() else path
    if not found.is_file():
        raise AprError(f"no file {found}, expected what `sgl-apr eval ... -o` or `apr.run_many` has written")
    return found


def _entry(data: Mapping[str, Any], where: str, prefix: str) -> PageEntry:
    try:
        trajectory = Trajectory.from_json(json.dumps(data["trajectory"]))
        if "id" in data:
            return PageEntry(str(data["id"]), trajectory, f"{prefix}{trajectory.dialect}")
        return PageEntry(
            str(data["problem"]), trajectory, f"{prefix}{data['method']}", str(data["label"]), str(data["answer"]),
            bool(data["correct"]), int(data["size"]),
        )  # fmt: skip
    except (AprError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KeyError) and error.args == ("trajectory",):
            raise AprError(
                f"{where}: no trajectory: an older sgl-apr has written it, which kept none"
            ) from None
        raise AprError(f"{where}: not a trajectory of an evaluation or of run_many: {error!r}") from None


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each line with a trajectory stands, and its object."""
    for number, line in enumerate(_whole_lines(path), 1):
        where = f"{path}, line {number}"
        data = _object(line, where)
        if number > 1 or _is_trajectory(data):
            yield where, data


def _whole_lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:  # half a line may end within a character
            for line in file:
                if line.endswith(b"\n"):
                    yield line
    except OSError as error:
        raise AprError(f"cannot read {path}: {error}") from None


def _head(path: Path) -> Mapping[str, Any]:
    return _object(next(_whole_lines(path), b"{}"), f"{path}, line 1")


def _is_trajectory(data: Mapping[str, Any]) -> bool:
    """Otherwise it is the head of an evaluation."""
    return "trajectory" in data or "method" in data


def _object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise AprError(f"{where}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise AprError(f"{where}: expected an object, found {type(data).__name__}")
    return data


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart, or the paths."""
    short = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    short = [
        p.resolve().parent.name if p.name == RUN_FILE else name for p, name in zip(paths, short, strict=True)
    ]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]
