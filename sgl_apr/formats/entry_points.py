"""Entry points of installed packages. Reading them takes milliseconds, so they are read once for each import path."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from sgl_apr.errors import GrammarError, did_you_mean

T = TypeVar("T")


def installed_entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, from the packages that can be imported now."""
    return _read(group, tuple(sys.path))


@lru_cache(maxsize=256)
def load_entry_point(point: EntryPoint, kind: type[T], expected: str, *, may_call: bool = False) -> T:
    """Return the object that an entry point names.

    Args:
        point: The entry point.
        kind: The type of the object.
        expected: The type with its article, for error messages.
        may_call: Whether the entry point may also name a function that returns the object.

    Raises:
        GrammarError: The entry point cannot be loaded, or names something else.
    """
    where = f"the entry point {point.value} of {point.name!r}"
    try:
        loaded = point.load()
        if may_call and callable(loaded) and not isinstance(loaded, kind):
            loaded = loaded()
    except GrammarError:
        raise
    except Exception as error:  # code of another package
        raise GrammarError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, kind):
        raise GrammarError(f"{where} is {loaded!r}, expected {expected}")
    return loaded


@lru_cache(maxsize=32)
def _read(group: str, import_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def unknown_name_error(kind: str, name: object, names: Iterable[str]) -> GrammarError:
    """Return the error for a name that is not one of the known names, which is shown shortened."""
    shown = repr(name[:200] if isinstance(name, str) else type(name).__name__)
    cut = "..." if len(shown) > 62 else ""
    names = list(names)
    close = f" ({proposal})" if (proposal := did_you_mean(name, names)) else ""
    return GrammarError(f"no {kind} {shown[:62]}{cut}{close}, expected one of {', '.join(names)}")
