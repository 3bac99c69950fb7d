"""What a request asks of the form of its response, apart from the trajectory itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import check_type, shorten

STREAMS = ("content", "all")


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How the response of a trajectory should look.

    Attributes:
        separate_reasoning: Put the answer after the last join into `content` and what comes before it into
            `reasoning_content`. Otherwise `content` is all of it.
        include_trajectory: Add the complete trajectory to the field `apr`.
        all_sequences: Stream the text of every sequence as it is written, tagged by its path. Otherwise a stream has
            the deltas of `content` and `reasoning_content`.
        include_usage: End a stream with a chunk that has the usage.
        stop: Texts before which the content ends.
        logprobs: Add the log-probabilities of the tokens of the content.
        top_logprobs: How many alternatives of each of these tokens to add.
        turn_memory: Use the token ids of earlier replies in the conversation, and remember those of this one.
    """

    separate_reasoning: bool = True
    include_trajectory: bool = False
    all_sequences: bool = False
    include_usage: bool = False
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    turn_memory: bool = True

    @classmethod
    def pop_from(cls, options: dict[str, Any], *, separate_reasoning: bool = True) -> Self:
        """Take the options of the response out of those of a trajectory.

        Args:
            options: Options by name.
            separate_reasoning: The default of the route.

        Raises:
            AprError: One of them has a value that is not possible.
        """
        stream = options.pop("stream", "content")
        if stream not in STREAMS:
            raise AprError(f'apr stream={shorten(stream)}, expected "content" or "all"')
        return cls(
            separate_reasoning=check_type(
                "separate_reasoning", options.pop("separate_reasoning", separate_reasoning), bool
            ),
            include_trajectory=check_type("trajectory", options.pop("trajectory", False), bool),
            all_sequences=stream == "all",
            turn_memory=check_type("turn_memory", options.pop("turn_memory", True), bool),
        )
