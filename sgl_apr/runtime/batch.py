"""Many trajectories at once, each written to a file as it ends, and a run that was interrupted goes on; it scores none."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.decoder import derive_seed
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import make_options
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.jsonl import open_for_append
from sgl_apr.trajectory.trajectory import Trajectory

Prompt = str | Sequence[int]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of the problems, by their ids: finished now, found finished, or failed. What failed is not
    in the file, so that another run tries it again."""

    finished: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: Mapping[str, AprError]


def run_many(
    url: str,
    problems: Mapping[str, Prompt],
    path: str | Path,
    dialect: Dialect | str | None = None,
    *,
    api_key: str | None = None,
    tokenizer: Tokenizer | None = None,
    timeout: float = 120.0,
    reconnect_timeout: float = 300.0,
    **options: Any,
) -> Outcomes:
    """`arun_many` against the server at `url`, blocking. A server that goes away is waited for, `reconnect_timeout` s."""
    from sgl_apr.engine.http import HttpEngine

    async def once() -> Outcomes:
        async with await HttpEngine.connect(
            url, api_key=api_key, tokenizer=tokenizer, timeout=timeout, reconnect_timeout=reconnect_timeout
        ) as engine:
            return await arun_many(engine, problems, path, dialect, **options)

    return asyncio.run(once())


async def arun_many(
    engine: Engine,
    problems: Mapping[str, Prompt],
    path: str | Path,
    dialect: Dialect | str | None = None,
    *,
    concurrency: int = 256,
    progress_bar: bool = False,
    **options: Any,
) -> Outcomes:
    """Let the model answer every problem, `concurrency` of them at once, begun in their order.

    Each trajectory is appended to `path` the moment it ends: one line, `{"id": ..., "trajectory": ...}`
    (`read_many` reads them). What stands there already is not done again, whatever ended the run that wrote
    it, and half a line that it left is removed. Options are those of `areason`; a `seed` gives every
    problem one of its own. Raises `AprError` for a file of another run: other problems under the same ids,
    or a run that still writes to it.
    """
    if concurrency < 1:
        raise AprError(f"concurrency={concurrency}, expected at least 1")
    asked = make_options(dialect, engine.tokenizer, **options)

    def ids(prompt: Prompt) -> tuple[int, ...]:
        return tuple(engine.tokenizer.encode(prompt, first=True) if isinstance(prompt, str) else prompt)

    with open_for_append(Path(path)) as file:
        found = _found(Path(path), problems)
        todo = iter([name for name in problems if name not in found])
        finished, failed = list[str](), dict[str, AprError]()
        bar = _bar(len(problems), len(found)) if progress_bar else None

        async def work() -> None:
            for name in todo:
                seed = None if asked.seed is None else derive_seed(asked.seed, name)
                try:
                    trajectory = await run_with_options(engine, ids(problems[name]), replace(asked, seed=seed))
                except AprError as error:
                    log.warning("problem %s failed: %s", name, error)
                    failed[name] = error
                else:
                    os.write(
                        file, f'{{"id": {json.dumps(name)}, "trajectory": {trajectory.to_json()}}}\n'.encode()
                    )
                    finished.append(name)
                if bar:
                    bar.update()

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(concurrency, len(problems) - len(found))):
                    workers.create_task(work())
        finally:
            if bar:
                bar.close()
        return Outcomes(tuple(finished), tuple(found), failed)


def read_many(path: str | Path) -> Iterator[tuple[str, Trajectory]]:
    """The id and trajectory of every line that `run_many` wrote, in the order in which they ended.

    Raises `AprError` that names the line for anything else, but passes over half a line at the end.
    """
    for name, data in _lines(Path(path)):
        yield name, Trajectory.from_json(json.dumps(data))


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, "rb") as file:  # half a line may end within a character
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # interrupted
                return
            try:
                data = json.loads(line)
                yield str(data["id"]), data["trajectory"]
            except (ValueError, KeyError, TypeError):
                raise AprError(f'{path}, line {number}: expected {{"id": ..., "trajectory": ...}}') from None


def _found(path: Path, problems: Mapping[str, Prompt]) -> dict[str, None]:
    """The ids of the problems whose trajectories are in the file."""
    found = dict[str, None]()
    for name, data in _lines(path):
        try:
            first = data["spans"][0]
            asked, problem = first["text"], problems[name]
            same = asked == problem if isinstance(problem, str) else first["token_ids"] == list(problem)
        except (KeyError, IndexError, TypeError):
            raise AprError(f"{path} holds {name!r}, which is none of the problems of this run") from None
        if not same:
            raise AprError(f"{path} holds another problem under the id {name!r}: {asked[:60]!r}")
        if name in found:
            raise AprError(f"{path} holds {name!r} twice")
        found[name] = None
    return found


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="trajectory")
