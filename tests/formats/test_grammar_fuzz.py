"""The grammar reader on random and mutated files: a dialect, or a `GrammarError`, in limited time and memory."""

from __future__ import annotations

import contextlib
import random
import resource
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.formats.dialect_check import ByteVocabulary, check_dialect
from sgl_apr.formats.dialects import BranchNumbering
from sgl_apr.formats.grammar_source import MAX_SOURCE_CHARS

SOURCES = [apr.dialect(name).source for name in apr.dialect_names()]
PIECES = [
    *'(){}[]|?*+~:"/\\<>.,%@#!_-=^$\n\t \r\0\x85\u2028\ufeff\ud800é²٣',
    "//@ ", "//", "#", "\\x", "\\u", "\\ud800", "\\n", '"i', "/i", "..", "->", "%import common.WS", "%ignore NL", "%declare",
    "TEXT", "NUMBER", "NL", "NODE", "trace", "fork", "outline", "body", "block", "after", "trunk", "close", "header",
    '"<A>"', '"</A>"', '"<A "', '">"', '"<A>\\n"', '"x <A>"', '""', "/a*/", "/(a|b)+/", "/(/", "/<A>/", "/a{9999999999}/",
    "a: a", "a: ", "a: b\nb: a", "trace: TEXT?", "TEXT : /x/", "max_width 9", "max_width 99999999999999999999", "joins kv",
    "policy first", "branch_context message", "first_number 0", "width", "9" * 40, "(" * 60, "[" * 60, "a? " * 40, "a* " * 9,
    "(a|b) " * 12,
]  # fmt: skip
SPELLED, TOKENS = ByteVocabulary(has_tags=False), ByteVocabulary(has_tags=True)
MAX_SECONDS = 2.0


def use(source: str) -> bool:
    """Read a file, and use it as the runtime does; whether it is a dialect. Anything but a `GrammarError` is a failure."""
    try:
        dialect = apr.Dialect.from_source("fuzzed", source)
    except apr.GrammarError as refused:
        error = str(refused)
    else:
        error = ""
    if error:
        assert error.startswith("fuzzed.lark")
        assert len(error) < 1000
        return False
    assert len(dialect.tags) < 10**6
    dialect.is_valid("a<A>b</A>")
    apr.read("a<A>b</A>", dialect)
    for phase in ("trunk", "after", "branch", "rejoin"):
        for options in ({}, {"fork": "required"}):
            for tokenizer, backend in ((SPELLED, "llguidance"), (TOKENS, "llguidance"), (TOKENS, "xgrammar")):
                refuses(lambda: dialect.lower(phase, tokenizer, backend, **options))  # noqa: B023
        numbering = BranchNumbering("1.", "1", ("1",))
        refuses(lambda: dialect.stop_strings(phase, numbering))  # type: ignore[arg-type]  # noqa: B023
        refuses(lambda: dialect.complete_phase(phase, "a", numbering))  # type: ignore[arg-type]  # noqa: B023
    refuses(lambda: dialect.lower("trace", TOKENS, "llguidance", width=2, min_width=1))
    check_dialect(dialect)
    return True


def refuses(work: Callable[[], object]) -> None:
    with contextlib.suppress(apr.GrammarError):
        work()


def mutated(source: str, rng: random.Random) -> str:
    """A file with some places deleted, repeated, exchanged or replaced."""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        a, b = sorted(rng.randrange(len(source) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 3, 20, 200)))
        piece = rng.choice((source[a:b] * 2, "", rng.choice(PIECES), rng.choice(PIECES), source[b : b + 20]))
        source = source[:a] + piece + source[rng.choice((a, b)) :]
    return source


def document(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return mutated(rng.choice(SOURCES), rng)
    return "".join(rng.choice((*PIECES, " ", "\n", ": ")) for _ in range(rng.randrange(60)))


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_mutated_files(rng: random.Random):
    use(document(rng))


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_random_files(source: str):
    use(source)


def repeated(piece: str, count: int = 100_000) -> str:
    return f"trace: {piece * count}\nTEXT: /x/"


PHASES = "trace: TEXT\nbody: TEXT\nafter: TEXT\n"
HOSTILE = {
    "parentheses": repeated("("),
    "closed parentheses": f"trace: {'(' * 4000}TEXT{')' * 4000}\nTEXT: /x/",
    "nested groups": f"trace: {'(' * 24}TEXT{')' * 24}\nTEXT: /x/",
    "brackets": repeated("["),
    "closed brackets": f"trace: {'[' * 4000}TEXT{']' * 4000}\nTEXT: /x/",
    "bars": repeated("|"),
    "lines": "\n" * 60_000,
    "comments": "//@ a b\n" * 8000,
    "quotes": repeated('"'),
    "slashes": repeated("/"),
    "backslashes": repeated("\\"),
    "options": "//@ " + "width 1, " * 7000 + "\ntrace: TEXT\nTEXT: /x/",
    "many rules": "".join(f"r{i}: TEXT\n" for i in range(6000)),
    "many tags": "trace: " + "".join(f'"<a{i}>" ' for i in range(2500)) + "\nTEXT: /x/",
    "many alternatives": "trace: " + " | ".join(f'"<a{i}>"' for i in range(2500)) + "\nTEXT: /x/",
    "optional items": "trace: " + "".join(f'"<a{i}>"? ' for i in range(40)) + "\nbody: TEXT\nafter: TEXT\nTEXT: /x/",
    "nested options": "trace: " + "(" * 20 + '"<a>"?' + ' "<b>"? )?' * 20 + "\nTEXT: /x/",
    "rules of alternatives": "".join(f"r{i}: r{i + 1} r{i + 1} | r{i + 1}\n" for i in range(40))
    + 'r40: "<a>"\ntrace: TEXT? r0\nbody: r0\nafter: r0\nTEXT: /x/',
    "left recursion": "trace: trace TEXT | TEXT\nbody: body\nafter: after\nTEXT: /x/",
    "circle of what the runtime writes": "trace: TEXT? (fork lead body tail TEXT?)*\nfork: \"<f>\"\nlead: tail\ntail: lead\n"
    'body: TEXT "</b>"\nafter: TEXT\nclose: (close "<c>")+\nTEXT: /x/',
    "circle": "trace: body\nbody: after\nafter: trace\nTEXT: /x/",
    "regular expression": PHASES + "TEXT: /" + "(" * 200 + "a" + ")" * 200 + "/",
    "exponential expression": PHASES + "TEXT: /x/\nNUMBER: /" + "(a|aa)+" * 60 + "/",
    "repetition": PHASES + "TEXT: /x/\nNUMBER: /((a{1000}){1000}){1000}/",
    "large repetition": "trace: TEXT\nTEXT: /x/\nNUMBER: /a{1,99999999999999999999}/",
    "large number": "//@ max_width " + "9" * 60_000 + "\ntrace: TEXT\nTEXT: /x/",
    "surrogate": "trace: \ud800\nTEXT: /x/",
    "escaped surrogate": 'trace: "\\ud800"\nTEXT: /x/',
    "null": "trace: TEXT\0\nTEXT: /x/",
    "name": "t" * 60_000 + ": TEXT\nTEXT: /x/",
    "too long": "a" * (MAX_SOURCE_CHARS + 1),
    "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_error_in_time(name: str):
    started = time.process_time()
    use(HOSTILE[name])
    assert time.process_time() - started < MAX_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_files_take_no_time_and_no_memory():
    rng = random.Random(0)
    dialects, before = 0, 0

    def timed(source: str) -> float:
        nonlocal dialects
        started = time.process_time()
        dialects += use(source)
        return time.process_time() - started

    for k in range(8000):
        source = document(rng)
        # A file that is slow is slow again; a collection of garbage, which may come at any time, is not.
        assert timed(source) < MAX_SECONDS or timed(source) < MAX_SECONDS, source
        if k == 2000:
            before = resident_bytes()
    assert dialects > 500, "some files are dialects"
    assert resident_bytes() <= 1.05 * before


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
