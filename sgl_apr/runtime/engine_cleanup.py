"""Aborts the requests of a trajectory, and releases the engines of its forks. Errors are logged, not raised."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from sgl_apr.engine.base import Engine
from sgl_apr.errors import EngineError

log = logging.getLogger(__name__)


async def abort_requests(engine: Engine, rid: str) -> None:
    """Abort the requests whose ids begin with `rid`, also while this is cancelled. Errors are logged."""
    try:
        await asyncio.shield(engine.abort(rid))
    except (EngineError, OSError) as error:
        log.warning("%s: its requests could not be aborted: %r", rid, error)


async def release_engines(engines: Iterable[Engine]) -> None:
    """Release the engines of forks. One that fails does not keep the others from it."""
    for engine in engines:
        try:
            await engine.release()
        except (EngineError, OSError) as error:
            log.warning("the engine of a branch could not be released: %r", error)
