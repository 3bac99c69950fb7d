"""Runs an `sgl.Engine` with the loop, in a process that SGLang may end. It prints its results as a line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

import sgl_apr as apr
from sgl_apr.engine.in_process import InProcessEngine
from sgl_apr.server.launch.server_folder import LOCK_NAME


def files_of(folder: Path) -> list[str]:
    """The temporary folder of an engine with its files, and its segments of shared memory."""
    segments = Path("/dev/shm").glob(f"*{folder.name}*")
    return [str(path) for path in (*folder.parent.glob(f"{folder.name}*"), *folder.glob("*"), *segments)]


def main(arguments: dict[str, Any]) -> None:
    options, budget = arguments["options"], apr.Budget(**arguments["budget"])
    seen: dict[str, Any] = {}
    with apr.LocalEngine.launch(arguments["model"]) as engine:
        seen["children"] = len(children())
        (lock,) = {file.path for file in psutil.Process().open_files() if Path(file.path).name == LOCK_NAME}
        folder = Path(lock).parent
        seen["files_while_running"] = len(files_of(folder))
        seen["trajectories"] = [
            engine.run(p, "threadweaver", budget=budget, **options).to_json() for p in arguments["prompts"]
        ]
        deltas: list[object] = []
        seen["chunks"] = [
            count_chunks(engine, arguments["prompts"][0], budget=budget, **options),
            count_chunks(engine, arguments["prompts"][0], budget=budget, on_event=deltas.append, **options),
        ]
        seen["deltas"] = sorted("".join(e.text for e in deltas if isinstance(e, apr.Delta)))
        problems = {str(i): p for i, p in enumerate(arguments["prompts"])}
        engine.wait(
            apr.arun_many(
                engine, problems, arguments["path"], "threadweaver", budget=budget, concurrency=2, **options
            )
        )
        seen["refused"] = {
            name: failure(
                lambda engine=engine, wrong={name: value}: engine.run("Q: ", "threadweaver", **wrong)
            )
            for name, value in {
                "warmth": 1,
                "lora_path": "nobody",
            }.items()
        }
        request = apr.Request("apr-warm", (1, 2, 3), 4, {"warmth": 1})
        seen["refused"]["warmth of a request"] = failure(lambda: engine.wait(engine.decode(request)))
        seen["overlong"] = failure(lambda: engine.run("Q: " * 50_000, "threadweaver"))
        seen["cancelled"] = engine.wait(cancelled(engine))
        seen["silence"] = engine.wait(silence(engine))
        kind, _, message = failure(lambda: asyncio.run(apr.areason(engine, "Q: ")))
        seen["elsewhere"] = [kind, message]
        seen["inside"] = engine.wait(inside(engine))
        seen["load"] = asdict(engine.wait(engine.load()))
    seen["children_after"] = children()
    seen["files_after"] = files_of(folder)
    print("\n" + json.dumps(seen))


def count_chunks(engine: apr.LocalEngine, prompt: str, **options: Any) -> int:
    """Return how many chunks the engine received for a trajectory."""
    count, original = 0, engine._chunks

    async def chunks(*args: Any) -> AsyncGenerator[dict[str, Any], None]:
        nonlocal count
        async with aclosing(original(*args)) as received:
            async for chunk in received:
                count += 1
                yield chunk

    engine._chunks = chunks  # type: ignore[method-assign]
    try:
        engine.run(prompt, "threadweaver", **options)
    finally:
        del engine._chunks
    return count


def children() -> list[str]:
    """Return the command lines of the living processes below this one."""
    processes = psutil.Process().children(recursive=True)
    return [" ".join(p.cmdline()) for p in processes if p.status() != psutil.STATUS_ZOMBIE]


def failure(work: Any) -> list[Any]:
    try:
        work()
    except apr.AprError as error:
        return [type(error).__name__, getattr(error, "status", None), str(error)]
    return ["nothing", None, ""]


async def cancelled(engine: apr.LocalEngine) -> dict[str, int]:
    """Cancel a trajectory while its requests run."""
    budget = apr.Budget(tokens=6000)
    task = asyncio.create_task(
        apr.areason(engine, "Q: ", "threadweaver", mode="parallel", min_blocks=90, budget=budget)
    )
    while not (await engine.load()).running:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return await idle(engine)


async def silence(engine: apr.LocalEngine) -> list[Any]:
    """Send a request that takes longer than the timeout."""
    impatient = InProcessEngine(engine.manager, timeout=0.0001)
    try:
        await impatient.decode(apr.Request("apr-silence", (1, 2, 3), 500))
    except apr.EngineError as error:
        return [type(error).__name__, (await idle(engine))["states"]]
    return ["nothing", 0]


async def idle(engine: apr.LocalEngine) -> dict[str, int]:
    """Return what is still running once the scheduler has processed the aborts, or after some seconds."""
    for _ in range(500):
        load = await engine.load()
        left = {"states": len(engine.manager.rid_to_state), "running": load.running, "used": load.used_tokens}
        if not any(left.values()):
            break
        await asyncio.sleep(0.02)
    return left


async def inside(engine: apr.LocalEngine) -> list[str]:
    kind, _, message = failure(lambda: engine.run("Q: "))
    return [kind, message]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
