"""Where the branches of a method stand in its trajectory."""

from __future__ import annotations

from sgl_apr.runtime.sequence import SequenceState


class BranchOrder:
    """Which sequences were forked where."""

    def __init__(self) -> None:
        # The branches of a sequence, and before which of its spans each belongs.
        self._branches = dict[SequenceState, list[tuple[int, SequenceState]]]()

    def place(self, sequence: SequenceState, branch: SequenceState) -> None:
        """Let a branch stand after what its sequence has written so far."""
        self._branches.setdefault(sequence, []).append((len(sequence.span_order), branch))

    def spans(self, sequence: SequenceState) -> list[int]:
        """The spans of a sequence with those of its branches where they were forked: parents come first."""
        spans, start = list[int](), 0
        for before, branch in self._branches.get(sequence, []):
            spans += sequence.span_order[start:before]
            spans += self.spans(branch)
            start = before
        return [*spans, *sequence.span_order[start:]]
