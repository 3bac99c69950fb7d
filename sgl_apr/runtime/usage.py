"""What the parts of a run have really used, so that what comes next can be planned by it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

FIRST_BRANCH_TOKENS = 128  # what a branch is expected to take before any has ended
TEXT_MARGIN = 2  # so many times the longest text after a join is kept for the next one


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of branches and of texts that ended by themselves. What was cut says too little.

    A branch starts with the usage of its sequence, and its sequence gets back what it has added. So what is planned
    depends on what was written, and never on which branch was faster.

    Attributes:
        branches: What each branch and its result took.
        texts: What each text after a join took.
    """

    branches: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()

    @property
    def expected_branch_tokens(self) -> float:
        """What a branch is expected to take: the mean, `FIRST_BRANCH_TOKENS` before any has ended."""
        return fmean(self.branches) if self.branches else FIRST_BRANCH_TOKENS

    @property
    def expected_text_tokens(self) -> int | None:
        """What the text after a join takes at most, None before any has ended."""
        return TEXT_MARGIN * max(self.texts) if self.texts else None

    def with_branch(self, tokens: int) -> Usage:
        """This and one branch more."""
        return Usage((*self.branches, tokens), self.texts)

    def with_text(self, tokens: int) -> Usage:
        """This and one text more."""
        return Usage(self.branches, (*self.texts, tokens))

    def plus(self, later: Usage, earlier: Usage) -> Usage:
        """This, and what was added between two states of a branch."""
        return Usage(
            (*self.branches, *later.branches[len(earlier.branches) :]),
            (*self.texts, *later.texts[len(earlier.texts) :]),
        )


NO_USAGE = Usage()
