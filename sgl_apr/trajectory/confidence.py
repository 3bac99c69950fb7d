"""How sure a model was of what it wrote, by the log-probabilities of its tokens (DeepConf, arXiv 2508.15260, section 2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal

from sgl_apr.trajectory.calls import TopLogprobs

Confidence = Literal["mean", "lowest_group", "bottom_10", "tail"]


def token_confidence(top: TopLogprobs) -> float | None:
    """The negative mean log-probability of the most likely tokens in one place.

    It is high where one token has nearly all of the probability, since the others are then unlikely.

    Args:
        top: The most likely tokens, with log-probabilities.

    Returns:
        The confidence, None where only one token was possible, so that nothing was decided.
    """
    return -fmean(token.logprob for token in top) if len(top) > 1 else None


def token_confidences(tokens: Iterable[TopLogprobs]) -> list[float]:
    """Those of all places where something was decided."""
    return [value for top in tokens if (value := token_confidence(top)) is not None]


def trace_confidence(
    values: Sequence[float], kind: Confidence = "lowest_group", window: int = 2048
) -> float | None:
    """The confidence of a reply.

    Args:
        values: The confidences of its tokens.
        kind: "mean" of all tokens; of the means of all windows the lowest ("lowest_group"), or the mean of the lowest tenth
            ("bottom_10"); or the mean of the last window ("tail").
        window: Tokens of a window (2,048 in the paper). A shorter reply is one window.

    Returns:
        The confidence; None without a token.
    """
    if not values:
        return None
    if kind == "mean":
        return fmean(values)
    if kind == "tail":
        return fmean(values[-window:])
    groups = sorted(_group_means(values, window))
    return groups[0] if kind == "lowest_group" else fmean(groups[: max(1, len(groups) // 10)])


class GroupConfidence:
    """The mean confidence of the last tokens of a reply while it is written.

    Args:
        window: Tokens of a group.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._values = deque[float](maxlen=window)
        self.lowest: float | None = None

    def add(self, tokens: Iterable[TopLogprobs]) -> float | None:
        """The lowest confidence of a complete group so far, None as long as none is complete.

        Args:
            tokens: The most likely tokens in the places that are new.
        """
        for value in token_confidences(tokens):
            self._values.append(value)
            if len(self._values) == self._window:
                mean = fmean(self._values)
                self.lowest = mean if self.lowest is None else min(self.lowest, mean)
        return self.lowest


def _group_means(values: Sequence[float], window: int) -> list[float]:
    """The means of all windows of that many tokens; of a shorter sequence the mean of all."""
    window = min(window, len(values))
    total = sum(values[:window])
    means = [total / window]
    for new, old in zip(values[window:], values, strict=False):
        total += new - old
        means.append(total / window)
    return means
