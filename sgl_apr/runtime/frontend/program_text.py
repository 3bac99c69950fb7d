"""The text of a program as it grows while `apr.reason` streams."""

from __future__ import annotations

from sgl_apr.runtime.events import Delta, Event, TextRetracted
from sgl_apr.trajectory.spans import Path


class ProgramText:
    """Turns events into text of the program.

    The trunk appears as it is written. The branches of a block appear together, in order, once the trunk continues.

    Args:
        streams_answer: The trunk may not fork, so that its text is the answer from the first character on.
            Otherwise the answer is known only at the end.
    """

    def __init__(self, *, streams_answer: bool) -> None:
        self._streams_answer = streams_answer
        self._branches: dict[Path, str] = {}
        self._answer_started = False

    def feed(self, text: str, event: Event) -> tuple[str, str]:
        """Apply one event.

        Args:
            text: The program's text so far.
            event: What happened.

        Returns:
            The program's text without the new piece of the answer, and that piece. SGLang appends the piece.
        """
        match event:
            case TextRetracted(path, chars) if path:
                self._retract(path, chars)
            case TextRetracted(_, chars) if not self._answer_started:
                text = text[: len(text) - (chars or 0)]
            case Delta(path, new) if path:
                self._branches[path] = self._branches.get(path, "") + new
            case Delta(_, new):
                text += "".join(self._branches[path] for path in sorted(self._branches))
                self._branches.clear()
                if self._streams_answer and (self._answer_started or new.strip()):
                    blank = "" if self._answer_started else new[: len(new) - len(new.lstrip())]
                    self._answer_started = True
                    return text + blank, new[len(blank) :]
                text += new
        return text, ""

    def _retract(self, path: Path, chars: int | None) -> None:
        """Drop the last characters of the branch at `path`, or it and all that it forked (None)."""
        if chars is None:
            self._branches = {p: t for p, t in self._branches.items() if p[: len(path)] != path}
        else:
            written = self._branches.get(path, "")
            self._branches[path] = written[: len(written) - chars]
