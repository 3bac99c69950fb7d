"""Give a running server the weights of a training run."""

from __future__ import annotations

from pathlib import Path

from sgl_apr.engine.http_client import post_json_async
from sgl_apr.errors import EngineError


async def load_weights(url: str, path: Path, version: str) -> None:
    """Load a checkpoint into a running server, in place, and drop its cache, which belongs to the old weights.

    The server waits for running requests, but not for trajectories: wait for those first.

    Args:
        url: The server.
        path: The checkpoint.
        version: Name of the new weights.

    Raises:
        EngineError: If the server does not load it.
    """
    body = {"model_path": str(path.resolve()), "weight_version": version, "flush_cache": True}
    try:
        answer = await post_json_async(f"{url}/update_weights_from_disk", body)
    except EngineError as error:
        raise EngineError(f"the server did not load {path}: {error}", error.status) from error
    if not answer.get("success"):
        raise EngineError(f"the server did not load {path}: {answer.get('message', answer)}")
