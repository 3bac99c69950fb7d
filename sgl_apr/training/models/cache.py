"""A cache of built checkpoints: each is built once, by one process, and appears complete or not at all."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

from sgl_apr.errors import AprError

RECIPE_FILE = "sgl_apr.json"  # inside a checkpoint: what it was built from

logger = logging.getLogger(__name__)


def build_once(
    name: str, recipe: Mapping[str, object], build: Callable[[Path], None], directory: Path | None = None
) -> Path:
    """The cached checkpoint of a name, built first if needed. A second process waits for the build of the first.

    Args:
        name: Name of the checkpoint.
        recipe: JSON values that determine the checkpoint. They are stored with it; a checkpoint of the same name with another
            recipe is replaced.
        build: Writes the checkpoint into an empty directory.
        directory: The cache; by default in the user's cache directory.

    Raises:
        AprError: If something else has that name in the cache.
    """
    root = directory or Path(platformdirs.user_cache_dir("sgl_apr"))
    target = root / name
    if _matches_recipe(target, recipe):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, even by a crash
        if not _matches_recipe(target, recipe):
            logger.info("building %s", target)
            partial = root / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # left by a crash; nobody else uses it under the lock
            partial.mkdir()
            try:
                build(partial)
                (partial / RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
                _remove_checkpoint(target)
                os.rename(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _remove_checkpoint(target: Path) -> None:
    if (target / RECIPE_FILE).is_file():
        shutil.rmtree(target)
    elif target.exists():
        raise AprError(f"{target} exists and was not built here (it has no {RECIPE_FILE}): move it away")


def _matches_recipe(target: Path, recipe: Mapping[str, object]) -> bool:
    try:
        stored = json.loads((target / RECIPE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(stored == recipe)
