"""What one thought of a model is asked, and what came of it; nothing is asked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.spans import Finish


@dataclass(frozen=True)
class Prompt:
    """What one thought is asked: `text` is written first, then the model goes on.

    tokens: decoded at most; None leaves it to the budget. grammar: for the engine's grammar backend. stop: texts
    that end it, and stay in it. sampling: SGLang's parameters, over those of the run. name: for people. after: what
    it comes behind without seeing it, where it has a context of its own.
    """

    text: str = ""
    tokens: int | None = None
    grammar: str | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    depends_on: tuple[Completion, ...] = ()

    @property
    def without_text(self) -> Prompt:
        """The same where the text is there already."""
        return replace(self, text="")


@dataclass(frozen=True)
class Completion:
    """What a model wrote when it was asked, and where that stands.

    text: decoded, without an end of text. logprob: the mean over its tokens, None if there are none.
    """

    sequence: SequenceState
    engine: Engine | None
    text: str = ""
    finish: Finish = "stop"
    logprob: float | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself."""
        return self.finish in ("stop", "eos")
