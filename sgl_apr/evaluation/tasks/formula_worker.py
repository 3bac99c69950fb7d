"""Reads and compares formulas with `math-verify`, a line of JSON for each; run as a program, whose caller can end it.

The library stops by itself only in a main thread, and not within one large operation of numbers; and what a model
has written may ask for any memory.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

TIMEOUT_S = 2  # for each formula, and each comparison
MEMORY_BYTES = 4 << 30
LATEX = [LatexExtractionConfig()]  # what is no LaTeX it would evaluate as Python


def extract_answer(text: str) -> str:
    """The answer of a reply as it is written there, in a box or in its last formula; empty if there is none.

    >>> found("Half of it is $0.5$, so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    read = _read(text)
    return str(read[-1]) if read else ""


def answers_match(one: str, other: str) -> bool:
    """Whether two answers say the same, whichever is the right one.

    >>> equal("1/2", "0.5"), equal("x=5", "5"), equal("(1,2)", "(2,1)")
    (True, True, False)
    """
    first, second = (_read(f"\\boxed{{{text}}}") for text in (one, other))
    return any(verify(*pair, timeout_seconds=TIMEOUT_S) for pair in ((first, second), (second, first)))


def _read(text: str) -> list[Any]:
    return list(parse(text, LATEX, parsing_timeout=TIMEOUT_S))


def main() -> None:
    """Answer each line, in order: the name of a function here, and its arguments."""
    logging.disable()  # of what cannot be read, which is no surprise
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    functions: dict[str, Callable[..., Any]] = {"found": extract_answer, "equal": answers_match}
    for line in sys.stdin:
        name, *texts = json.loads(line)
        try:
            said = functions[name](*texts)
        except (MemoryError, RecursionError, ValueError):
            said = None
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
