"""Hides the paths of the host from programs: of the library, of this package, and of the interpreter."""

from __future__ import annotations

import gc
import sys
from types import CodeType, FunctionType
from typing import Any

MOUNTED = f"/lib/python{sys.version_info.major}.{sys.version_info.minor}"  # where programs see the library
HIDDEN = "<hidden>"  # the file of code that is not part of the library


def hide_host_paths(library: str) -> None:
    """Replace the path of the library by `MOUNTED` in modules, frames and `sys`, and remove all other paths.

    Args:
        library: The path of the library on the host.
    """

    def moved(path: Any) -> Any:
        if not isinstance(path, str):
            return path
        if path == library or path.startswith(library + "/"):
            return MOUNTED + path[len(library) :]
        return HIDDEN if path.startswith("/") and not path.startswith(MOUNTED) else path

    sys.path[:] = [MOUNTED, f"{MOUNTED}/lib-dynload"]
    sys.argv, sys.orig_argv = [""], []
    for name in (
        "executable",
        "_base_executable",
        "prefix",
        "base_prefix",
        "exec_prefix",
        "base_exec_prefix",
    ):
        setattr(sys, name, "")
    sys._stdlib_dir = MOUNTED  # type: ignore[attr-defined]  # private, read where a frozen module is imported
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        for owner in (module, spec, getattr(spec, "loader", None)):
            for name in ("__file__", "__cached__", "origin", "cached", "path"):
                if isinstance(value := getattr(owner, name, None), str):
                    setattr(owner, name, moved(value))
        if isinstance(folders := getattr(module, "__path__", None), list):
            folders[:] = map(moved, folders)
        if isinstance(folders := getattr(spec, "submodule_search_locations", None), list):
            folders[:] = map(moved, folders)
    replaced: dict[CodeType, CodeType] = {}
    for function in gc.get_objects():
        if isinstance(function, FunctionType):
            function.__code__ = _with_path(function.__code__, moved, replaced)


def _with_path(code: CodeType, moved: Any, replaced: dict[CodeType, CodeType]) -> CodeType:
    """The same code with other names of files, in nested functions as well."""
    if code not in replaced:
        constants = tuple(
            _with_path(c, moved, replaced) if isinstance(c, CodeType) else c for c in code.co_consts
        )
        filename = moved(code.co_filename)
        same = filename == code.co_filename and all(map(lambda a, b: a is b, constants, code.co_consts))
        replaced[code] = code if same else code.replace(co_filename=filename, co_consts=constants)
    return replaced[code]
