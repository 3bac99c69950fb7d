"""Valid ThreadWeaver traces: one written by hand, and a hypothesis strategy."""

from __future__ import annotations

import re

from hypothesis import strategies as st

import sgl_apr as apr

TAGS = apr.dialect("threadweaver").tags

TRACE = """Let me see.
<Parallel>
<Outlines>
<Outline>1: x < y</Outline>
<Outline>2: and <b></Outline>
</Outlines>
<Thread>
1: A
</Thread><Thread>
2: BB
</Thread>
<Conclusion>both</Conclusion>
</Parallel>

The answer is 4."""


BEGINNINGS = re.compile(r"(</?\w*)*")  # not a text under a mask


def free_text() -> st.SearchStrategy[str]:
    """Text without tags, but with angle brackets."""
    pieces = st.one_of(
        st.text(max_size=12), st.sampled_from(["<", ">", "</", "<b>", "Thread>", "<Paral", "\n", "1:", "..."])
    )
    return (
        st.lists(pieces, min_size=1, max_size=4)
        .map("".join)
        .filter(lambda t: not any(tag in t for tag in TAGS) and not BEGINNINGS.fullmatch(t))
    )


@st.composite
def traces(draw: st.DrawFn) -> str:
    """A valid reply with zero to three blocks."""
    text = draw(st.one_of(st.just(""), free_text()))
    for _ in range(draw(st.integers(0, 3))):
        n = draw(st.integers(1, 4))
        outlines = "".join(f"<Outline>{k}:{draw(free_text())}</Outline>\n" for k in range(1, n + 1))
        threads = "".join(f"<Thread>\n{k}:{draw(free_text())}</Thread>" for k in range(1, n + 1))
        conclusion = f"<Conclusion>{draw(free_text())}</Conclusion>\n" if draw(st.booleans()) else ""
        text += f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n{conclusion}</Parallel>"
        text += draw(st.one_of(st.just(""), free_text()))
    return text
