"""Dialects by name: a name is never a path, registered dialects, options that fit together."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.formats import register_dialect
from sgl_apr.formats.grammar_source import MAX_SOURCE_CHARS

SOURCE = apr.dialect("parathinker").source


def own(tmp_path: Path, name: str = "own", source: str = SOURCE) -> Path:
    path = tmp_path / f"{name}.lark"
    path.write_text(source)
    return path


def test_a_name_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = own(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [
        str(path),
        str(path.with_suffix("")),
        "own",
        "./own",
        "own.lark",
        "../own",
        "/tmp/x",
        "",
        ".",
        "npr\0",
    ]
    for name in names:
        with pytest.raises(apr.GrammarError, match=r"no dialect .*, expected one of apr, asyncthink"):
            apr.dialect(name)
        with pytest.raises(apr.GrammarError, match="no dialect"):
            apr.read("text", name or "/")
        with pytest.raises(apr.GrammarError, match="no dialect"):
            apr.convert(apr.dialect("npr").parse("text"), name)


@pytest.mark.parametrize("name", ["x" * 5000, "/" * 5000, "\ud800" * 100, 5, None, b"npr", ["npr"], 1.5])
def test_a_wrong_name_is_one_short_message(name: object):
    with pytest.raises(apr.GrammarError, match="no dialect") as error:
        apr.dialect(name)  # type: ignore[arg-type]
    assert len(str(error.value)) < 300


def test_files_that_cannot_be_read_are_one_short_message(tmp_path: Path):
    (tmp_path / "binary.lark").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.lark").write_text("// " + "x" * (5 * MAX_SOURCE_CHARS))
    (tmp_path / "folder.lark").mkdir()
    for path in ("binary.lark", "large.lark", "folder.lark", "missing.lark", "x" * 5000, "null\0.lark"):
        with pytest.raises(apr.GrammarError) as error:
            apr.Dialect.from_file(tmp_path / path)
        assert len(str(error.value)) < 500
        assert path[:10].rstrip("\0") in str(error.value)


def test_a_file_of_another_editor(tmp_path: Path):
    path = tmp_path / "own.lark"
    path.write_bytes(b"\xef\xbb\xbf" + SOURCE.replace("\n", "\r\n").encode())
    assert apr.Dialect.from_file(path) == apr.Dialect.from_source("own", SOURCE)


def test_a_registered_dialect_is_found_by_its_name(tmp_path: Path):
    dialect = apr.Dialect.from_file(own(tmp_path))
    register_dialect(dialect)
    assert apr.dialect("own") is dialect
    assert "own" in apr.dialect_names()
    changed = apr.Dialect.from_source("own", SOURCE, max_width=3)
    register_dialect(changed)
    assert apr.dialect("own") is changed
    trace = "<think 1>a</think 1><think 2>b</think 2><summary>c"
    assert apr.read(trace, "own").is_valid
    assert apr.read(trace, changed).trajectory.dialect == "own"


def test_a_registered_dialect_cannot_take_the_name_of_another(tmp_path: Path):
    register_dialect(apr.Dialect.from_file(own(tmp_path, "parathinker")))  # the same
    with pytest.raises(apr.GrammarError, match="there already is a dialect 'npr', expected another name"):
        register_dialect(apr.Dialect.from_file(own(tmp_path, "npr")))
    for name in ("", "a b", "a/b", ".hidden", "x" * 65, "é", "a\n"):
        with pytest.raises(apr.GrammarError, match="expected a name of at most 64 letters"):
            register_dialect(apr.Dialect.from_source(name, SOURCE))


def test_equal_dialects_are_unpickled_as_one_object():
    original = apr.Dialect.from_source("own", SOURCE)
    one, two = (pickle.loads(pickle.dumps(original)) for _ in range(2))
    assert one is two
    assert one == original
    assert one.is_valid("<think 1>a</think 1><think 2>b</think 2><summary>c")


@pytest.mark.parametrize(
    ("options", "width", "min_width"),
    [
        ({"max_width": 4}, 4, 2),
        ({"max_width": 1}, 1, 1),
        ({"width": 1}, 1, 1),
        ({"max_width": 100}, 8, 2),
        ({"max_width": 4, "width": 3}, 3, 2),
        ({"max_width": 4, "min_width": 4}, 4, 4),
    ],
)
def test_widths_that_are_not_set_fit_those_that_are(options: dict[str, int], width: int, min_width: int):
    dialect = apr.Dialect.from_source("own", SOURCE, **options)
    assert (dialect.width, dialect.min_width) == (width, min_width)
    line = "//@ " + ", ".join(f"{k} {v}" for k, v in options.items())
    assert apr.Dialect.from_source("own", SOURCE.replace("//@ max_width 8", line)).width == width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_width": "4"}, "max_width '4', expected a whole number"),
        ({"width": True}, "width True, expected a whole number"),
        ({"width": 9, "max_width": 8}, "expected 1 <= min_width <= width <= max_width"),
        ({"max_width": 10**9}, "max_width <= 4096"),
        (
            {
                "max_depth": 99,
            },
            "max_depth 99, expected 1 to 16",
        ),
        ({"first_number": -1}, "first_number -1, expected 0"),
        ({"joins": "text"}, "joins 'text', expected a tuple of strings"),
        ({"joins": ["text"]}, "expected a tuple of strings"),
        ({"joins": ("telepathy",)}, "joins telepathy, expected some of text, kv, message"),
        ({"policy": "quorum:" + "9" * 5000}, "policy quorum:9+, expected"),
        ({"policy": "deadline:" + "9" * 400}, "policy deadline:9+, expected"),
        ({"nope": 1}, "no option 'nope', expected one of max_width"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, object], message: str):
    with pytest.raises(apr.GrammarError, match=f"own.lark: .*{message}") as error:
        apr.Dialect.from_source("own", SOURCE, **options)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "line",
    ["max_width " + "9" * 5000, "max_width ²", "max_width -1", "max_widht 2", "max_width 8, max_width 8"],
)
def test_wrong_options_of_a_file_have_their_line(line: str):
    with pytest.raises(apr.GrammarError, match=r"own\.lark, line 3: (no option 'max_widht'|max_width)"):
        apr.Dialect.from_source("own", SOURCE.replace("//@ max_width 8", f"//@ {line}"))
