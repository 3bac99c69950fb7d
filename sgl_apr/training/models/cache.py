"""A directory of built checkpoints: each is built once, by one process, and appears whole or not at all."""

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

RECIPE_FILE = "sgl_apr.json"  # what a checkpoint was made from, as JSON, inside it

logger = logging.getLogger(__name__)


def build_once(
    name: str, recipe: Mapping[str, object], build: Callable[[Path], None], directory: Path | None = None
) -> Path:
    """The checkpoint `name` in `directory` (default: the user's cache), built first if it is not there.

    `build` fills an empty directory. `recipe` (JSON values) is stored beside the weights; a checkpoint of the
    same name that was made by another recipe is replaced. A second process waits for the first one's build.
    """
    root = directory or Path(platformdirs.user_cache_dir("sgl_apr"))
    target = root / name
    if _matches_recipe(target, recipe):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process, so a crash leaves no lock behind
        if not _matches_recipe(target, recipe):
            logger.info("building %s", target)
            partial = root / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # ours alone under the lock: what a crash left
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
        raise AprError(f"{target} exists and was not made here (it has no {RECIPE_FILE}): move it away")


def _matches_recipe(target: Path, recipe: Mapping[str, object]) -> bool:
    try:
        found = json.loads((target / RECIPE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(found == recipe)
