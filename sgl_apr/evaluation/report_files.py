"""Read trajectories from the files of `sgl-apr eval ... -o` and of `apr.run_many` as entries of an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.store import RUN_FILE, common_problems, describe_left_out
from sgl_apr.evaluation.sweep import level_of, sweep_directories
from sgl_apr.trajectory.jsonl import count_lines, read_lines
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.page_entry import PageEntry

TITLE_FIELDS = ("task", "model", "split", "seed", "temperature")  # settings that describe an evaluation


def read_entries(paths: Sequence[Path], *, comparable: bool = False) -> Iterator[PageEntry]:
    """The trajectories of some files, one file after another.

    An incomplete last line, of a run that is still writing or was interrupted, is skipped. With several files each method
    is labelled with the name of its file too.

    Args:
        paths: Files, or directories with a run.jsonl.
        comparable: Leave out the problems of a file that not all its methods attempted.

    Raises:
        AprError: If a line is anything else; the message names it.
    """
    for path, name in zip(paths, _names(paths), strict=True):
        file, level = resolve_run_file(path), level_of(path)
        common, _ = common_problems(_attempted_problems(file)) if comparable else (None, 0)
        for where, data in _lines(file):
            if not common or "method" not in data or _problem_key(data) in common:
                entry = _entry(data, where, f"{name} " if name else "")
                yield replace(entry, limit=(level.limit, level.value)) if level else entry


def expand_sweeps(paths: Sequence[Path]) -> list[Path]:
    """These paths, with the directories of its levels in place of each sweep."""
    return [each for path in paths for each in (sweep_directories(path).values() or [path])]


def describe_evaluations(paths: Sequence[Path]) -> str:
    """The settings of the evaluations among some files, in one line, with the seeds of all their problems."""
    descriptions = list[str]()
    for path in map(resolve_run_file, paths):
        head = dict(_head(path))
        seeds = sorted(
            {key[0] for keys in _attempted_problems(path).values() for key in keys if key[0] is not None}
        )
        if len(seeds) == 1:
            head["seed"] = seeds[0]
        settings = [
            f"seeds {', '.join(map(str, seeds))}"
            if name == "seed" and len(seeds) > 1
            else f"{name} {head[name]}"
            for name in TITLE_FIELDS
            if head.get(name) is not None
        ]
        descriptions.append(", ".join(settings).removeprefix("task "))
    return " · ".join(dict.fromkeys(filter(None, descriptions)))


def describe_incomparable(paths: Sequence[Path]) -> str:
    """How many problems `read_entries` leaves out as not comparable, in one line. Empty if none."""
    descriptions = list[str]()
    for path in map(resolve_run_file, paths):
        attempted = _attempted_problems(path)
        common, left_out = common_problems(attempted)
        if left_out and not common:
            descriptions.append(f"{', '.join(attempted)} have no problem in common")
        elif left_out:
            descriptions.append(describe_left_out(left_out, attempted))
    return " · ".join(dict.fromkeys(descriptions))


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


def _attempted_problems(path: Path) -> dict[str, set[Any]]:
    """By method, the seed and number of each problem of an evaluation that it attempted. The seed may be None."""
    attempted = dict[str, set[Any]]()
    for _, data in _lines(path):
        if isinstance(data.get("method"), str):
            attempted.setdefault(data["method"], set()).add(_problem_key(data))
    return attempted


def _problem_key(data: Mapping[str, Any]) -> tuple[Any, Any]:
    seed, number = data.get("seed"), data.get("number")
    return seed if isinstance(seed, int) else None, number if isinstance(number, int) else None


def _head(path: Path) -> Mapping[str, Any]:
    """The first line of a file."""
    _, head = next(read_lines(path, allow_partial=True), (0, dict[str, Any]()))
    return head


def _is_trajectory(data: Mapping[str, Any]) -> bool:
    """Whether a line holds a trajectory; otherwise it is the head of an evaluation."""
    return "trajectory" in data or "method" in data


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells inputs apart: file names without their suffix, or full paths if those are not distinct.

    All levels of a sweep are one input. A single input needs no name.
    """
    sources = [path.parent if level_of(path) else path for path in paths]
    distinct = list(dict.fromkeys(sources))
    if len(distinct) < 2:
        return [""] * len(paths)
    short = [path.resolve().name if path.is_dir() else path.stem for path in distinct]
    short = [
        p.resolve().parent.name if p.name == RUN_FILE else name
        for p, name in zip(distinct, short, strict=True)
    ]
    names = short if len(set(short)) == len(short) else [str(path) for path in distinct]
    return [names[distinct.index(source)] for source in sources]
