"""Read trajectories from the files of `sgl-apr eval ... -o` and of `apr.run_many` as entries of an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.store import RUN_FILE
from sgl_apr.trajectory.jsonl import count_lines, read_lines
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.page_entry import PageEntry

TITLE_FIELDS = ("task", "model", "split", "seed", "temperature")  # settings that describe an evaluation


def read_entries(paths: Sequence[Path]) -> Iterator[PageEntry]:
    """The trajectories of some files, one file after another.

    An incomplete last line, of a run that is still writing or was interrupted, is skipped. With several files each method
    is labelled with the name of its file too.

    Args:
        paths: Files, or directories with a run.jsonl.

    Raises:
        AprError: If a line is anything else; the message names it.
    """
    names = _names(paths) if len(paths) > 1 else [""]
    for path, name in zip(map(resolve_run_file, paths), names, strict=True):
        for where, data in _lines(path):
            yield _entry(data, where, f"{name} " if name else "")


def describe_evaluations(paths: Sequence[Path]) -> str:
    """The settings of the evaluations among some files, in one line."""
    descriptions = list[str]()
    for path in map(resolve_run_file, paths):
        head = _head(path)
        settings = [f"{name} {head[name]}" for name in TITLE_FIELDS if head.get(name) is not None]
        descriptions.append(", ".join(settings).removeprefix("task "))
    return " · ".join(dict.fromkeys(filter(None, descriptions)))


def count_trajectories(paths: Sequence[Path]) -> int:
    """The number of lines with a trajectory, without parsing them."""
    total = 0
    for path in map(resolve_run_file, paths):
        lines = count_lines(path)
        total += lines - (lines > 0 and not _is_trajectory(_head(path)))
    return total


def resolve_run_file(path: Path) -> Path:
    """The file itself, or the run.jsonl of a directory.

    Raises:
        AprError: If there is no such file.
    """
    file = path / RUN_FILE if path.is_dir() else path
    if not file.is_file():
        raise AprError(f"no file {file}, expected the output of `sgl-apr eval ... -o` or `apr.run_many`")
    return file


def _entry(data: Mapping[str, Any], where: str, prefix: str) -> PageEntry:
    try:
        trajectory = Trajectory.from_dict(data["trajectory"])
        if "id" in data:
            return PageEntry(str(data["id"]), trajectory, f"{prefix}{trajectory.dialect}")
        return PageEntry(
            str(data["problem"]), trajectory, f"{prefix}{data['method']}", str(data["label"]), str(data["answer"]),
            bool(data["correct"]), int(data["size"]),
        )  # fmt: skip
    except (AprError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KeyError) and error.args == ("trajectory",):
            raise AprError(f"{where}: no trajectory: an older version wrote it without them") from None
        raise AprError(f"{where}: not a trajectory of an evaluation or of run_many: {error!r}") from None


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The location and the object of each line with a trajectory."""
    for number, data in read_lines(path, allow_partial=True):
        if number > 1 or _is_trajectory(data):
            yield f"{path}, line {number}", data


def _head(path: Path) -> Mapping[str, Any]:
    """The first line of a file."""
    _, head = next(read_lines(path, allow_partial=True), (0, dict[str, Any]()))
    return head


def _is_trajectory(data: Mapping[str, Any]) -> bool:
    """Whether a line holds a trajectory; otherwise it is the head of an evaluation."""
    return "trajectory" in data or "method" in data


def _names(paths: Sequence[Path]) -> list[str]:
    """File names without their suffix, or full paths if those are not distinct."""
    short = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    short = [
        p.resolve().parent.name if p.name == RUN_FILE else name for p, name in zip(paths, short, strict=True)
    ]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]
