"""Run many prompts at once. Each trajectory is written to a file when it ends, and an interrupted run resumes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from errno import ENOENT
from pathlib import Path
from typing import Any, Unpack

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.arguments import ReasonArguments
from sgl_apr.runtime.branch_group import gather
from sgl_apr.runtime.kv_admission import KvAdmission, fetch_pool_tokens
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import ReasonOptions, check_call, make_options
from sgl_apr.runtime.prompts import Prompt, check_engine, encode_prompt, vocab_size
from sgl_apr.runtime.seeds import derive_seed
from sgl_apr.runtime.value_checks import check_type, shorten
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.jsonl import append_line, file_error, open_for_append, read_lines
from sgl_apr.trajectory.strict_json import describe
from sgl_apr.trajectory.trajectory import Trajectory

LINE_FORMAT = '{"id": ..., "trajectory": ...}'

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of the problems.

    Attributes:
        finished: Ids of those that this run has finished.
        skipped: Ids of those that were in the file.
        failed: Errors by id: an `AprError`, or what the caller's own code raised, such as a policy function. They are
            not in the file, so that the next run tries them again.
    """

    finished: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: Mapping[str, Exception]


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
    concurrency: int = 256,
    progress_bar: bool = False,
    **options: Unpack[ReasonArguments],
) -> Outcomes:
    """`arun_many` against the server at `url`, blocking.

    A server that goes down is waited for, up to `reconnect_timeout` seconds.
    """
    from sgl_apr.engine.http import HttpEngine

    _check_problems(problems)
    check_call(dialect, options)
    if not Path(path).parent.is_dir():  # before a server is contacted
        raise file_error("cannot write to", path, FileNotFoundError(ENOENT, os.strerror(ENOENT)))

    async def once() -> Outcomes:
        async with await HttpEngine.connect(
            url, api_key=api_key, tokenizer=tokenizer, timeout=timeout, reconnect_timeout=reconnect_timeout
        ) as engine:
            return await arun_many(
                engine, problems, path, dialect, concurrency=concurrency, progress_bar=progress_bar, **options
            )

    return asyncio.run(once())


async def arun_many(
    engine: Engine,
    problems: Mapping[str, Prompt],
    path: str | Path,
    dialect: Dialect | str | None = None,
    *,
    concurrency: int = 256,
    progress_bar: bool = False,
    **options: Unpack[ReasonArguments],
) -> Outcomes:
    """Run every problem, in order, at most `concurrency` of them at once.

    Fewer run at once where more are not expected to fit into the KV cache of the engine. Each is expected to need
    what those before it needed: what they wrote, and the part of their prompts that was not cached.

    A problem that fails is in `Outcomes.failed`, whatever exception it raised, and the others continue. Only what
    concerns all of them is raised: wrong options, and a file that cannot be read or written.

    Args:
        engine: Decodes.
        problems: Prompts by id: text, token ids, or chat messages.
        path: Each trajectory is appended to this file when it ends, as one line `{"id": ..., "trajectory": ...}`.
            Problems that are in the file are skipped, and keep the budget and other options that they were run with.
            Half a line that an interrupted run left is removed.
        dialect: As in `areason`.
        concurrency: How many run at once at most.
        progress_bar: Show one on standard error.
        options: As in `areason`. A `seed` gives every problem a seed of its own.

    Raises:
        AprError: The file belongs to another run: it has other problems under the same ids, or another dialect, or
            is being written. Or a line of it is no trajectory of this version, as in `read_many`, or could not be written, for example to a
            full disk.
    """
    check_engine(engine)
    if check_type("concurrency", concurrency, int) < 1:
        raise AprError(f"concurrency={concurrency}, expected at least 1")
    _check_problems(problems)
    base = make_options(dialect, engine.tokenizer, vocab_size(engine), **options)
    with open_for_append(Path(path)) as file:
        skipped = await _finished_ids(engine, Path(path), problems, base)
        todo = iter([name for name in problems if name not in skipped])
        finished, failed = list[str](), dict[str, Exception]()
        bar = _progress_bar(len(problems), len(skipped)) if progress_bar else None
        admission, max_tokens = KvAdmission(concurrency), base.budget.tokens
        if concurrency > 1:
            admission.pool_tokens = await fetch_pool_tokens(engine)

        async def work() -> None:
            for name in todo:
                seeded = base if base.seed is None else replace(base, seed=derive_seed(base.seed, name))
                try:
                    prompt = await encode_prompt(engine, problems[name], base.chat_tools)
                    async with admission.slot(len(prompt), max_tokens) as slot:
                        trajectory = await run_with_options(engine, prompt, seeded)
                        slot.trajectory = trajectory
                except Exception as error:
                    log.warning(
                        "problem %s failed: %r", name, error, exc_info=not isinstance(error, AprError)
                    )
                    failed[name] = error
                else:
                    append_line(file, f'{{"id": {json.dumps(name)}, "trajectory": {trajectory.to_json()}}}')
                    finished.append(name)
                if bar:
                    bar.update()

        try:
            await gather(work() for _ in range(min(concurrency, len(problems) - len(skipped))))
        finally:
            if bar:
                bar.close()
        return Outcomes(tuple(finished), tuple(skipped), failed)


def read_many(path: str | Path) -> Iterator[tuple[str, Trajectory]]:
    """Yield the id and trajectory of every line that `run_many` wrote, in the order in which they ended.

    Half a line at the end is skipped.

    Raises:
        AprError: A line is something else, or was written by a version with another schema. The message names it.
    """
    for number, line in read_lines(path, allow_partial=True, expected=LINE_FORMAT):
        where = f"{path}, line {number}"
        if not {"id", "trajectory"} <= set(line):
            raise AprError(f"{where}: expected {LINE_FORMAT}, found the keys {', '.join(line)}")
        if not isinstance(line["id"], str):
            raise AprError(f"{where}: id: expected text, found {describe(line['id'])}")
        yield line["id"], Trajectory.from_dict(line["trajectory"], where)


def _check_problems(problems: object) -> None:
    """Check that the problems are a mapping whose keys are text."""
    expected = 'expected a dictionary of prompts by id, such as {"q1": "What is 6 * 7?"}'
    if not isinstance(problems, Mapping):
        raise AprError(f"problems={shorten(problems)}, {expected}")
    if wrong := [name for name in problems if not isinstance(name, str)]:
        raise AprError(f"the id of a problem is {shorten(wrong[0])}, expected text")


async def _finished_ids(
    engine: Engine, path: Path, problems: Mapping[str, Prompt], options: ReasonOptions
) -> dict[str, None]:
    """The ids of the problems whose trajectories are in the file."""
    finished = dict[str, None]()
    for name, trajectory in read_many(path):
        if name not in problems or not trajectory.spans:
            raise AprError(f"{path} holds {name!r}, which is none of the problems of this run")
        # By ids: the text of a prompt may differ from what was encoded, by a BOS token or a normalizer.
        prompt = trajectory.spans[0]
        if prompt.token_ids != await encode_prompt(engine, problems[name], options.chat_tools):
            raise AprError(f"{path} holds another problem under the id {name!r}: {prompt.text[:60]!r}")
        if name in finished:
            raise AprError(f"{path} holds {name!r} twice")
        if trajectory.dialect != options.dialect.name:
            raise AprError(
                f"{path} holds {name!r} in dialect {trajectory.dialect}, this run has dialect {options.dialect.name}: "
                "give the same dialect or another file"
            )
        finished[name] = None
    return finished


def _progress_bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="trajectory")
