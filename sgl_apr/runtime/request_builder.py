"""Builds the engine requests of one trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

from sgl_apr.engine.base import Engine, Request
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import BranchNumbering, Phase
from sgl_apr.runtime.budget import lead_chars
from sgl_apr.runtime.fork_rules import PhaseLimits
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import CallLimits
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Path


class HasContext(Protocol):
    """What a request needs to know of its sequence.

    Attributes:
        path: Its path.
        context: The ids that its next token follows.
    """

    @property
    def path(self) -> Path: ...

    @property
    def context(self) -> tuple[int, ...]: ...


class RequestBuilder:
    """Requests that share one trajectory's id, options and tokenizer.

    Args:
        engine: Says which grammar backend and tokenizer the requests are for.
        options: Of the trajectory.
        rid: What the ids of its requests begin with.
    """

    def __init__(self, engine: Engine, options: ReasonOptions, rid: str) -> None:
        self.options, self.dialect, self.rid = options, options.dialect, rid
        self.tokenizer, self.backend = engine.tokenizer, engine.grammar_backend
        self._attempts = count()

    def new_rid(self) -> str:
        """A request id for one attempt. All have one length, since the server aborts by prefix."""
        return f"{self.rid}-{next(self._attempts):06x}"

    def commit_request(self, sequence: SequenceState) -> Request:
        """A request for what a sequence has so far, to be committed."""
        return Request(self.new_rid(), sequence.context, fields=self.options.request_fields)

    def decode_request(
        self,
        context: tuple[int, ...],
        max_tokens: int,
        *,
        grammar: str | None,
        stop: tuple[str, ...],
        sampling: Mapping[str, Any],
    ) -> Request:
        """A request that decodes after `context`.

        Args:
            context: The prompt.
            max_tokens: Tokens that may be decoded.
            grammar: Text for the engine's grammar backend.
            stop: Texts that end it and stay in the output. A tag that is one token is matched by its id.
            sampling: SGLang's parameters, over those of the trajectory.

        Raises:
            AprError: The context is empty, which SGLang cannot decode after.
        """
        if not context:
            raise AprError("the prompt of a request is empty, expected at least one token")
        stop_ids, stop_strings = _stops(self.tokenizer, stop)
        return Request(
            self.new_rid(),
            context,
            max_tokens,
            {**self.options.sampling, **sampling},
            grammar,
            stop_ids,
            stop_strings,
            logprobs=self.options.logprobs,
            top_logprobs=self.options.top_logprobs,
            fields=self.options.request_fields,
        )

    def phase_request(
        self,
        sequence: HasContext,
        phase: Phase,
        numbering: BranchNumbering,
        limits: PhaseLimits,
        calls: CallLimits | None = None,
    ) -> Request:
        """The request of one phase of a sequence, under the grammar if the options say so."""
        options, dialect = self.options, self.dialect
        grammar = None
        if options.constrain:
            is_lead = limits.fork == "required" or (calls is not None and calls.choice == "required")
            mask: dict[str, Any] = {
                "width": max(limits.width, options.min_branches),
                "min_width": options.min_branches,
                "fork": "auto" if dialect.rule_for_phase(phase) == "body" else limits.fork,
                "prefix": numbering.prefix,
                "number": numbering.number,
                "waiting": numbering.waiting,
                "lead_chars": lead_chars(limits.max_new_tokens) if is_lead else None,
                "outline_chars": options.budget.outline_chars,
                "forbid_angle_brackets": options.forbid_angle_brackets,
            }
            if calls or options.answer_schema is not None:
                mask |= self._answer_mask_options(sequence, calls)
            grammar = dialect.lower(phase, self.tokenizer, self.backend, **mask)
        stop = dialect.stop_strings(phase, numbering)
        return self.decode_request(
            sequence.context, limits.max_new_tokens, grammar=grammar, stop=stop, sampling={}
        )

    def _answer_mask_options(self, sequence: HasContext, calls: CallLimits | None) -> dict[str, Any]:
        """The fields of `MaskOptions` about calls of tools, and about the final text."""
        fields: dict[str, Any] = {}
        if calls:
            fields = {
                "tool_syntax": calls.syntax,
                "max_calls": calls.max_calls,
                "call": calls.choice,
                "resumed": calls.resumed,
            }
        if self.options.answer_schema is not None and not sequence.path:
            fields["answer_schema"] = self.options.answer_schema
        return fields

    def numbering(self, sequence: SequenceState) -> BranchNumbering:
        """The numbers that the next phase of a sequence may write."""
        if self.dialect.asynchronous and not sequence.path:
            pending = sequence.pending
            started = pending.started if pending and pending.running else 0
            waiting = tuple(pending.running) if pending else ()
            return BranchNumbering(number=str(self.dialect.first_number + started), waiting=waiting)
        return self.sequence_numbering(sequence.path, sequence.identity.number)

    def sequence_numbering(self, path: Path, number: str) -> BranchNumbering:
        """The numbers that a phase of the sequence of a path and a number may write, in dialects that fork all at once."""
        nested = path and self.dialect.nested_numbering
        return BranchNumbering(prefix=f"{number}." if nested else "", number=number)


@lru_cache(maxsize=1024)  # called for every request
def _stops(tokenizer: Tokenizer, stop: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The texts that end a request: the ids of those that are one token, and the others."""
    special = {text: tokenizer.special_token_id(text) for text in stop}
    return tuple(i for i in special.values() if i is not None), tuple(t for t in stop if special[t] is None)
