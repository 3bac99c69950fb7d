"""Starts the branches of a fork while the fork that lists them is still being written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sgl_apr.engine.base import Engine, Request
from sgl_apr.formats.dialects import BranchNumbering, Phase
from sgl_apr.formats.lark_ast import SequenceExpr
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.eager_request import EagerRequest
from sgl_apr.runtime.fork_join import ForkJoin
from sgl_apr.runtime.fork_rules import ForkRules, PhaseLimits
from sgl_apr.runtime.lease_pool import FIRST_LEASE
from sgl_apr.runtime.request_builder import RequestBuilder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.spans import Path

log = logging.getLogger(__name__)


class PlannedBranch(NamedTuple):
    """What a request needs to know of a branch that does not exist yet.

    Attributes:
        path: Its path.
        context: The ids of its prompt.
    """

    path: Path
    context: tuple[int, ...]


class EagerBranches:
    """The first requests of branches that have a context of their own, sent as soon as their outline is written.

    A branch whose first request turns out to be another one, because the budget or the fork came out differently, sends
    that one. The early request is then stopped, and counts as a call.

    Args:
        rules: Of the trajectory.
        fork_join: Makes the prompts of branches.
        builder: Makes the requests.
        tasks: Runs the requests.
        seed_of: Returns the seed of the first request of a branch, None if the engine has no seeds.
    """

    def __init__(
        self,
        rules: ForkRules,
        fork_join: ForkJoin,
        builder: RequestBuilder,
        tasks: asyncio.TaskGroup,
        seed_of: Callable[[Path], int | None],
    ) -> None:
        self._rules, self._fork_join, self._builder = rules, fork_join, builder
        self._tasks, self._seed_of = tasks, seed_of
        self._options, self._dialect = rules.options, rules.options.dialect
        self._requests: dict[Path, tuple[str, EagerRequest]] = {}
        outline = self._dialect.grammar.rules["outline"]
        last = outline.items[-1] if isinstance(outline, SequenceExpr) else outline
        self._ends_lines = self._dialect.grammar.is_line_break(last)

    def watch(
        self,
        text: IncrementalDetokenizer,
        engine: Engine,
        sequence: SequenceState,
        phase: Phase,
        numbering: BranchNumbering,
    ) -> None:
        """Start branches as the text of a phase lists them.

        Args:
            text: The text of the request.
            engine: The engine of the sequence.
            sequence: The sequence that may fork.
            phase: What it decodes.
            numbering: The numbers that the phase can write.
        """
        emit, written, checked = text.emit, "", 0
        opening = self._dialect.grammar.opening_literal("fork")
        # Single tokens matter to listeners, and where a branch may be cut at any of them.
        may_be_cut = sequence.scope.deadline is not None or self._options.effective_policy != "all"
        quiet = emit is None and not may_be_cut

        def watch(new: str) -> None:
            nonlocal written, checked
            if emit:
                emit(new)
            start = text.emitted_chars - len(new)
            if start < len(written):  # a request that is repeated writes its text again
                checked = 0
            written = written[:start] + new
            end = written.rfind("\n") + 1 if self._ends_lines else len(written)
            if end > checked and opening in written:
                checked = end
                for k, outline in enumerate(self._outlines(written[:end], phase, numbering), 1):
                    self._start(engine, sequence, k, outline, written[:end], quiet)

        text.emit = watch

    def _outlines(self, written: str, phase: Phase, numbering: BranchNumbering) -> Sequence[Outline]:
        """The outlines of a fork that is not complete. None if the text does not end with an outline."""
        closed = written + self._dialect.grammar.closing_literal("fork")
        segments = self._dialect.match_phase(phase, closed, numbering) or ()
        return next((segment.outlines for segment in segments if segment.role == "fork"), ())

    def _start(
        self,
        engine: Engine,
        sequence: SequenceState,
        index: int,
        outline: Outline,
        written: str,
        quiet: bool,
    ) -> None:
        path = (*sequence.path, sequence.blocks + 1, index)
        started = self._requests.get(path)
        if started and started[0] == outline.text:
            return
        if started:
            self._stop(sequence, path)
        allowance, budget = sequence.allowance, self._options.budget
        if allowance.calls < 1 or sequence.scope.cancel_reason:
            return
        share = self._rules.branch_allowance(sequence, index)  # the most that it can get
        tokenizer = sequence.graph.tokenizer
        context = tokenizer.decode(sequence.context) + written
        max_prompt_tokens = min(share.tokens, share.critical_path_cap)
        _, ids = self._fork_join.message_prompt(tokenizer, context, outline.text, max_prompt_tokens)
        limits = [max(share.tokens, FIRST_LEASE), allowance.tokens, budget.branch_tokens]
        if self._rules.context_length is not None:
            limits.append(self._rules.context_length - len(ids))
        max_tokens = min(limit for limit in limits if limit is not None)
        if max_tokens < 1 or not ids:
            return
        nests = sequence.depth + 1 < budget.depth
        request = self._builder.phase_request(
            PlannedBranch(path, tuple(ids)),
            "branch",
            self._builder.sequence_numbering(path, outline.number),
            PhaseLimits(
                self._options.width if nests else 0, "auto" if nests else "forbidden", max_tokens, ""
            ),
        )
        if (seed := self._seed_of(path)) is not None:
            request = replace(request, sampling={**request.sampling, "sampling_seed": seed})
        self._requests[path] = outline.text, EagerRequest(engine, request, self._tasks, quiet=quiet)

    def take(self, sequence: SequenceState, request: Request) -> EagerRequest | None:
        """Return the early request that stands for the first request of a branch, if there is one.

        Args:
            sequence: The branch.
            request: Its first request.
        """
        started = self._requests.get(sequence.path)
        if started is None:
            return None
        if not started[1].stands_for(request):
            self._stop(sequence, sequence.path)
            return None
        return self._requests.pop(sequence.path)[1]

    def stop_unused(self, sequence: SequenceState, block: Path) -> None:
        """Stop the requests of branches that have not taken theirs.

        Args:
            sequence: The sequence that forks, or has not forked after all.
            block: The path of the block.
        """
        for path in [path for path in self._requests if path[:-1] == block]:
            self._stop(sequence, path)

    def _stop(self, sequence: SequenceState, path: Path) -> None:
        log.info("%s: the early request of branch %s is not used", self._builder.rid, path)
        self._requests.pop(path)[1].cancel()
        sequence.allowance.spend(calls=1)
