"""The text of a grammar file: its syntax, its size, and its tags as strings of their own.

A tag can be one token of a tokenizer. A mask allows that token only where the tag is a string of its own, so a longer
string (`"Split: <Debate>"`) and a terminal that holds a tag are replaced by their parts (`"Split: " "<Debate>"`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from lark import Lark, Token, Tree, UnexpectedInput
from lark.exceptions import LarkError

from sgl_apr.errors import GrammarError
from sgl_apr.formats.lark_ast import string_value

MAX_SOURCE_CHARS = 1 << 16
MAX_NESTING = 100  # levels of Lark's syntax tree; a pair of parentheses is up to 4 of them
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_TAG = re.compile(r"(</?[A-Za-z][^<>]*(?:>|$))")


def parse_source(source: str, name: str) -> Tree[Token]:
    """Return Lark's syntax tree of a grammar file.

    Raises:
        GrammarError: The text is too long, nested too deep, or no Lark grammar. The message names the line.
    """
    if not isinstance(source, str):
        raise GrammarError(f"{name}: the grammar is {type(source).__name__}, expected a string")
    if len(source) > MAX_SOURCE_CHARS:
        raise GrammarError(
            f"{name}: the file has {len(source)} characters, expected at most {MAX_SOURCE_CHARS}"
        )
    if forbidden := _FORBIDDEN.search(source):
        line = source.count("\n", 0, forbidden.start()) + 1
        raise GrammarError(
            f"{name}, line {line}: the character U+{ord(forbidden[0]):04X} is not supported, expected an escape "
            "sequence such as \\n"
        )
    try:
        tree = lark_meta_parser().parse(source if source.endswith("\n") else source + "\n")
    except UnexpectedInput as error:
        lines = source.split("\n")
        number = error.line if 0 < error.line <= len(lines) else len(lines)
        raise GrammarError(
            f"{name}, line {number}: expected Lark syntax, found {lines[number - 1].strip()[:200]!r}"
        ) from None
    except LarkError as error:
        raise GrammarError(f"{name}: expected Lark syntax: {str(error).splitlines()[0][:200]}") from None
    _check_nesting(tree, name)
    return tree


def _check_nesting(tree: Tree[Token], name: str) -> None:
    for definition in tree.children:
        level, depth = [definition], 0
        while level := [c for t in level if isinstance(t, Tree) for c in t.children]:
            depth += 1
            if depth > MAX_NESTING:
                line = getattr(definition.meta, "line", 1) if isinstance(definition, Tree) else 1
                raise GrammarError(f"{name}, line {line}: the expression has too many nested parentheses")


def separate_tags(source: str, tree: Tree[Token], name: str) -> str:
    """Return a grammar file in which every tag in a rule is a string of its own. Line numbers do not change.

    Args:
        source: The text of the file.
        tree: Its syntax tree.
        name: The name of the file, for error messages.

    Raises:
        GrammarError: A string is empty or has an escape sequence that is not valid.
    """
    definitions = [d for d in tree.children if isinstance(d, Tree) and d.data in ("rule", "token")]
    terminals: dict[str, str] = {}
    for definition in definitions:
        tokens = [t for t in definition.children[-1].scan_values(lambda v: isinstance(v, Token))]  # type: ignore[union-attr]  # always a tree
        if definition.data == "token" and len(tokens) == 1 and tokens[0].endswith('"'):
            terminals[str(definition.children[0])] = _value(tokens[0], name)
    replaced: list[tuple[int, int, str]] = []
    for definition in definitions:
        if definition.data == "rule":
            replaced += _replacements(definition, terminals, name)
    for start, end, text in sorted(replaced, reverse=True):
        source = source[:start] + text + source[end:]
    return source


def _value(token: Token, name: str) -> str:
    try:
        return string_value(token)
    except GrammarError as error:
        raise GrammarError(f"{name}, line {token.line}: {error}") from None


def _replacements(
    rule: Tree[Token], terminals: Mapping[str, str], name: str
) -> Iterator[tuple[int, int, str]]:
    """The first and last offset of each string that holds a tag and more, and the strings that replace it."""
    for tree in rule.iter_subtrees():
        token = tree.children[0] if tree.data in ("literal", "name") and tree.children else None
        if not isinstance(token, Token) or token.start_pos is None or token.end_pos is None:
            continue
        if tree.data == "name":
            parts = split_tags(terminals.get(str(token), ""))
            is_replaced = any(map(_TAG.fullmatch, parts))
        else:
            parts = split_tags(_value(token, name)) if token.endswith('"') else []
            is_replaced = len(parts) > 1
        if is_replaced:
            yield token.start_pos, token.end_pos, f"({' '.join(map(_quote, parts))})"


def split_tags(text: str) -> list[str]:
    """Split a string into its tags and the texts between them.

    A string that begins with the end of a tag (`">\\n"` after `"<Case " NUMBER`) is split after it.

    Examples:
        >>> split_tags("Split: <Debate>\\n<FORK-")
        ['Split: ', '<Debate>', '\\n', '<FORK-']
    """
    end = re.match(r"[^<>]*>", text)
    head, rest = (end[0], text[end.end() :]) if end else ("", text)
    return [part for part in (head, *_TAG.split(rest)) if part]


def _quote(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


@lru_cache(maxsize=1)
def lark_meta_parser() -> Lark:
    """Return a parser of grammar files, made from the grammar that Lark ships for them."""
    return Lark.open_from_package("lark", "lark.lark", ["grammars"], parser="lalr", propagate_positions=True)


def read_grammar_file(path: Path) -> str:
    """Return the text of a grammar file.

    Raises:
        GrammarError: The file cannot be read, is too large, or is not text in UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_SOURCE_CHARS + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
        raise GrammarError(f"cannot read the grammar {shown}: {getattr(error, 'strerror', error)}") from None
    return text.replace("\r\n", "\n")


def grammar_path(name: str) -> Path:
    """Return the path of a built-in grammar file: inside the wheel, or next to the package in a checkout."""
    package = Path(str(files("sgl_apr")))
    inside = package / "grammars"
    return (inside if inside.is_dir() else package.parent / "grammars") / f"{name}.lark"


@lru_cache(maxsize=1)
def built_in_names() -> frozenset[str]:
    """Return the names of the built-in grammar files."""
    return frozenset(path.stem for path in grammar_path("any").parent.glob("*.lark"))


def declared_options(source: str, name: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the keys of lines of the form `//@ key value, key value`, each with its value and line."""
    keys: set[str] = set()
    for number, line in enumerate(source.split("\n"), 1):
        if line.startswith("//@"):
            for option in line[3:].split(","):
                key, _, value = option.strip().partition(" ")
                if not key or not value.strip():
                    raise GrammarError(
                        f"{name}, line {number}: {option.strip()[:80]!r}, expected //@ key value, key value"
                    )
                if key in keys:
                    raise GrammarError(f"{name}, line {number}: {key[:40]} is set twice")
                keys.add(key)
                yield key, (value.strip(), number)
