"""Read and compare formulas with `math-verify`, one line of JSON each; run as a program, so that its caller can end it.

The library's own timeout works only in a main thread, and not within one large numeric operation. A formula that a model
wrote may also need any amount of memory.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

TIMEOUT_S = 2  # for each formula and each comparison
MEMORY_BYTES = 4 << 30
LATEX = [LatexExtractionConfig()]  # LaTeX only: math-verify would evaluate anything else as Python


def extract_answer(text: str) -> str:
    """The answer of a reply, as written: the last box, or else the last formula; empty if there is none.

    Examples:
        >>> extract_answer("Half of it is $0.5$, so \\\\boxed{\\\\frac{1}{2}}.")
        '\\\\frac{1}{2}'
    """
    formulas = _parse(text)
    return str(formulas[-1]) if formulas else ""


def answers_match(one: str, other: str) -> bool:
    """Whether two answers are equal; symmetric, unlike math-verify's own comparison.

    Examples:
        >>> answers_match("1/2", "0.5"), answers_match("x=5", "5"), answers_match("(1,2)", "(2,1)")
        (True, True, False)
    """
    first, second = (_parse(f"\\boxed{{{text}}}") for text in (one, other))
    return any(verify(*pair, timeout_seconds=TIMEOUT_S) for pair in ((first, second), (second, first)))


def _parse(text: str) -> list[Any]:
    return list(parse(text, LATEX, parsing_timeout=TIMEOUT_S))


def main() -> None:
    """Answer each line in order: the name of a function here, and its arguments."""
    logging.disable()  # unreadable formulas are expected
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    functions: dict[str, Callable[..., Any]] = {f.__name__: f for f in (extract_answer, answers_match)}
    for line in sys.stdin:
        name, *texts = json.loads(line)
        try:
            result = functions[name](*texts)
        except (MemoryError, RecursionError, ValueError):
            result = None
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
