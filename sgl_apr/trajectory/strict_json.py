"""Reads dataclasses from parsed JSON and refuses every value of another type, with its place and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sgl_apr.errors import TraceError

T = TypeVar("T")
MAX_FOUND_CHARS = 60  # how much of a wrong value an error quotes
Reader = Callable[[Any], Any]


class WrongValue(ValueError):
    """A value is not what its type says. Readers of containers add where it stands.

    Attributes:
        found: What stands there.
        expected: What was expected, in words.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.found, self.expected = found, expected
        self._steps: list[str] = []  # the innermost first

    @property
    def place(self) -> str:
        """Where the value stands, for example `spans[3].token_ids[0]`; empty for the complete value."""
        return "".join(reversed(self._steps)).removeprefix(".")

    def inside(self, step: str) -> WrongValue:
        """Add the step that leads to it from the value that holds it: a field `.name`, or an index `[3]`."""
        self._steps.append(step)
        return self

    def as_trace_error(self, where: str = "") -> TraceError:
        """Return a `TraceError` with the place, after `where`."""
        place = ": ".join(filter(None, (where, self.place)))
        return TraceError(1, 1, self.found, [self.expected], place=place or "the JSON")


def read_strictly(type_: type[T], data: object, where: str = "", *, defaults: bool = False) -> T:
    """Return a dataclass from the JSON object that holds its fields.

    Whole numbers, numbers, texts and booleans are not converted into one another, except that a whole number is a
    number. Lists become tuples. Numbers are finite. An object has exactly the fields of its dataclass.

    Examples:
        >>> from sgl_apr.trajectory import LimitHit
        >>> read_strictly(LimitHit, {"limit": "tokens", "path": [1, 2]})
        LimitHit(limit='tokens', path=(1, 2))
        >>> read_strictly(LimitHit, {"limit": "tokens", "path": [1, 2.5]})
        Traceback (most recent call last):
        sgl_apr.errors.TraceError: path[1]: expected a whole number, found 2.5

    Args:
        type_: The dataclass.
        data: Parsed JSON.
        where: Where the JSON stands, for error messages.
        defaults: Whether fields with a default may be missing.

    Raises:
        TraceError: The data is anything else. `place` says where.
    """
    try:
        key: Any = type_
        result: T = reader_of(key, defaults)(data)
    except WrongValue as error:
        raise error.as_trace_error(where) from None
    return result


def describe(value: object) -> str:
    """Return a JSON value for an error message: short, and lists and objects by their size."""
    if isinstance(value, Mapping):
        return f"an object with {len(value)} fields"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[: MAX_FOUND_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_FOUND_CHARS + 2 else f"{text[:MAX_FOUND_CHARS]}..."


@cache
def reader_of(type_: Any, defaults: bool = False) -> Reader:
    """Return the reader of a type: a dataclass, a scalar, `Literal`, `X | None`, or a tuple of such types."""
    origin, inner = get_origin(type_), get_args(type_)
    if isinstance(type_, type) and is_dataclass(type_):
        return _object_reader(type_, defaults)
    if origin in (Union, UnionType):
        (one,) = (t for t in inner if t is not NoneType)
        return _optional_reader(reader_of(one, defaults))
    if origin is tuple and inner[1:] == (Ellipsis,):
        return _integers if inner[0] is int else _list_reader(reader_of(inner[0], defaults))
    if origin is tuple:
        return _fixed_list_reader([reader_of(t, defaults) for t in inner])
    if origin is Literal:
        return _literal_reader(inner)
    return _SCALARS[type_]


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise WrongValue(describe(value), "a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) is float and isfinite(value):
        return value
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            pass
    raise WrongValue(describe(value), "a finite number")


def _text(value: Any) -> str:
    if type(value) is not str:
        raise WrongValue(describe(value), "text")
    return value


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise WrongValue(describe(value), "true or false")
    return value


_SCALARS: Mapping[Any, Reader] = {int: _integer, float: _number, str: _text, bool: _boolean}


def _integers(value: Any) -> tuple[int, ...]:
    """Token ids, paths and parents are most of the data, so their types are compared without a loop in Python."""
    if type(value) not in (list, tuple):
        raise WrongValue(describe(value), "a list")
    if value and set(map(type, value)) != {int}:
        wrong = next(i for i, item in enumerate(value) if type(item) is not int)
        raise WrongValue(describe(value[wrong]), "a whole number").inside(f"[{wrong}]")
    return tuple(value)


def _optional_reader(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _literal_reader(names: Sequence[str]) -> Reader:
    allowed = frozenset(names)

    def read(value: Any) -> str:
        if type(value) is not str or value not in allowed:
            raise WrongValue(describe(value), " or ".join(names))
        return value

    return read


def _list_reader(read_item: Reader) -> Reader:
    def read(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple):
            raise WrongValue(describe(value), "a list")
        items: list[Any] = []
        try:
            for item in value:
                items.append(read_item(item))
        except WrongValue as error:
            raise error.inside(f"[{len(items)}]") from None
        return tuple(items)

    return read


def _fixed_list_reader(readers: Sequence[Reader]) -> Reader:
    def read(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) != len(readers):
            raise WrongValue(describe(value), f"a list of {len(readers)}")
        items: list[Any] = []
        try:
            for read_item, item in zip(readers, value, strict=True):
                items.append(read_item(item))
        except WrongValue as error:
            raise error.inside(f"[{len(items)}]") from None
        return tuple(items)

    return read


def _object_reader(type_: Any, defaults: bool) -> Reader:
    hints = get_type_hints(type_)
    own = [f for f in fields(type_) if f.init]
    readers = [(f.name, reader_of(hints[f.name], defaults)) for f in own]
    names = frozenset(f.name for f in own)
    has_default = {f.name for f in own if f.default is not MISSING or f.default_factory is not MISSING}
    required = names - has_default if defaults else names

    def check_names(value: Any) -> None:
        if not isinstance(value, Mapping):
            raise WrongValue(describe(value), "an object")
        if missing := sorted(required - value.keys()):
            raise WrongValue("no such field", f"a field {missing[0]!r}")
        if unknown := sorted(map(str, value.keys() - names)):
            shown = describe(unknown[0]).strip("'")
            raise WrongValue(f"a field {shown!r}", f"no field but {', '.join(sorted(names))}")

    def read(value: Any) -> Any:
        if type(value) is not dict or value.keys() != names:
            check_names(value)
        name, values = "", []
        try:
            if len(value) == len(readers):
                for name, read_field in readers:
                    values.append(read_field(value[name]))
                return type_(*values)
            keywords = {}
            for name, read_field in readers:
                if name in value:
                    keywords[name] = read_field(value[name])
        except WrongValue as error:
            raise error.inside(f".{name}") from None
        return type_(**keywords)

    return read
