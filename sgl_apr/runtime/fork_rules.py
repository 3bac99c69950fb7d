"""What the next phase of a sequence may do, and how a fork divides what is left. Decided before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sgl_apr.engine.base import Load
from sgl_apr.errors import BudgetExceeded
from sgl_apr.formats.dialects import Phase
from sgl_apr.formats.masks.writer import ForkMode
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allowance import NO_LIMIT, Allowance
from sgl_apr.runtime.budget import Overhead
from sgl_apr.runtime.lease_pool import LeasePool, LeaseSource
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.pacing import Demand, choose_parallelism
from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.runtime.request_log import RequestLog
from sgl_apr.runtime.sequence import SequenceState

TOKEN_LIMITS = ("tokens", "branch_tokens", "critical_tokens", "context")  # those that fewer branches may keep
FORBIDDEN = "options"  # what forbids a fork that is no limit, such as the mode


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """Bounds of one request.

    Attributes:
        width: Branches that a fork may have, 0 for no fork.
        fork: Whether a fork has to come, may come, or may not.
        max_new_tokens: Tokens that may be decoded.
        limiting_field: The limit that `max_new_tokens` comes from.
    """

    width: int
    fork: ForkMode
    max_new_tokens: int
    limiting_field: str


class ForkRules:
    """Applies the options and the budget of one trajectory.

    Args:
        options: What was asked for.
        overhead: What closing costs, in tokens.
        request_log: Records the limits that act.
        context_length: Tokens that a prompt and its output may have together, if the engine says.
        shares_tokens: Whether the branches of a fork share their tokens. Otherwise each has a fixed equal part.
    """

    def __init__(
        self,
        options: ReasonOptions,
        overhead: Overhead,
        request_log: RequestLog,
        context_length: int | None,
        *,
        shares_tokens: bool,
    ) -> None:
        self.options, self.overhead, self.request_log = options, overhead, request_log
        self.context_length, self.shares_tokens = context_length, shares_tokens
        self.by_message = options.dialect.branch_context == "message"
        self._commits = options.join == "kv"  # each branch takes one more call, to be joined in the cache

    def trunk_allowance(self, prompt_tokens: int) -> Allowance:
        """The whole budget, or what the engine's context leaves of it.

        Raises:
            BudgetExceeded: The prompt fills the context.
        """
        allowance = Allowance.of(self.options.budget)
        if self.context_length is None:
            return allowance
        if (left := self.context_length - prompt_tokens) < 1:
            raise BudgetExceeded(
                f"the prompt has {prompt_tokens} tokens, "
                f"expected fewer than the {self.context_length} of the engine's context"
            )
        return allowance if self.by_message else allowance.limited_to(left, "context")

    def may_fork(self, sequence: SequenceState) -> bool:
        """Whether the options leave a sequence another block, whatever the budget says."""
        options = self.options
        if sequence.depth >= options.budget.depth or "fork" not in options.dialect.grammar.rules:
            return False
        return bool(sequence.path) or options.max_forks is None or sequence.blocks < options.max_forks

    def phase_limits(self, sequence: SequenceState, phase: Phase, load: Load | None) -> PhaseLimits:
        """The bounds of the next request of a sequence.

        Args:
            sequence: The sequence that continues.
            phase: What it decodes next.
            load: The engine's load, if the width is capped by it.

        Raises:
            BudgetExceeded: The first fork has to come and the budget has no room for it.
        """
        width, fork = self._next_fork(sequence)
        if load:
            width = self._cap_width_by_load(sequence, width, load)
        tokens, field = self.max_new_tokens(sequence, phase, width)
        if sequence.allowance.calls < 1:
            tokens, field = 0, "calls"
        return PhaseLimits(width, fork, tokens, field)

    def max_new_tokens(self, sequence: SequenceState, phase: Phase, width: int) -> tuple[int, str]:
        """Tokens that a phase may decode in all if it has calls, and the limit that they come from.

        Args:
            sequence: The sequence, without what the phase has decoded so far.
            phase: What it decodes.
            width: Branches that a fork in it may have.
        """
        closing, closing_path = self._closing_tokens(width + sequence.pending_count, phase)
        tokens, field = sequence.allowance.tokens - closing, sequence.allowance.limiting_field
        path = sequence.allowance.critical_path_cap - sequence.critical_path - closing_path
        if path < tokens:
            tokens, field = path, "critical_tokens"
        context = self.context_length
        left = NO_LIMIT if context is None else context - len(sequence.context) - closing
        return (left, "context") if left < tokens else (tokens, field)

    def _closing_tokens(self, branches: int, phase: Phase) -> tuple[int, int]:
        """What closes the text of a phase that is cut off, in tokens and on the critical path.

        The end of a branch was set aside when it was forked. A trunk that does not fork has nothing to close.
        """
        if not branches and phase in ("trunk", "branch"):
            return 0, 0
        return self.overhead.of(branches), self._critical_path_overhead(branches)

    def checked(self, output: PhaseOutput, sequence: SequenceState, limits: PhaseLimits) -> PhaseOutput:
        """Return the output with the fork that the budget allows. Only a grammar rules out others.

        Branches above the width, or above what the other limits pay for, are left out: their outlines stay in the text,
        and the limit is recorded. A fork of which nothing is left makes the output malformed. One that was forbidden
        for want of room, and that fits all the same, is let through.
        """
        if not output.forked:
            return output
        width, acted = self._width_without_grammar(sequence, output, limits)
        for limit in acted:
            self.request_log.record_limit(limit, sequence.path)
        if width is None:
            return replace(output, finish="malformed", forked=False)
        return output if width == len(output.outlines) else replace(output, outlines=output.outlines[:width])

    def _width_without_grammar(
        self, sequence: SequenceState, output: PhaseOutput, limits: PhaseLimits
    ) -> tuple[int | None, list[str]]:
        """How many of its outlines a fork may run, None if it may not fork, and the limits that leave out others."""
        listed, max_width = len(output.outlines), self._max_new_branches(sequence)
        width = min(listed, max_width)
        acted: list[str] = []
        if listed > max_width or not max_width:
            acted.append("width")
        if not max_width:
            return None, acted
        if limits.fork == "forbidden" or width > limits.width:
            while limit := self._lacking_limit(sequence, output, width):
                acted += [limit] if limit != FORBIDDEN else []
                if width <= 1 or limit not in TOKEN_LIMITS:
                    return None, acted
                width -= 1
        return width, acted

    def _max_new_branches(self, sequence: SequenceState) -> int:
        """How many branches the next fork of a sequence may have without a grammar.

        A budget without a width leaves that to what the format can have.
        """
        started = sequence.pending.started if sequence.pending and sequence.pending.running else 0
        return max(0, (self.options.budget.width or self.options.dialect.max_width) - started)

    def opening_outlines(self, sequence: SequenceState) -> tuple[Outline, ...]:
        """Outlines for a reply that begins with a fork.

        Raises:
            BudgetExceeded: The budget has no room for it.
        """
        if not (width := self._affordable_width(sequence)):
            self._raise_unaffordable(sequence)
        return self.unlabelled_outlines(width)

    def unlabelled_outlines(self, width: int) -> tuple[Outline, ...]:
        """Outlines of branches that differ by chance, or by their number alone. Width 0 is the fewest branches."""
        first, size = self.options.dialect.first_number, width or self.options.min_branches
        return tuple(Outline(str(first + k), "", 0) for k in range(size))

    def branch_allowance(self, sequence: SequenceState, branches: int) -> Allowance:
        """The equal part that each of so many branches gets; its critical path counts from where it begins.

        The sequence keeps its reserve of everything, and what closing the fork costs. Each of the n branches gets

        - tokens: (tokens - n * overhead of a branch - overhead of the join) * (1 - reserve) / n, half of that if it
          returns a message, which may be as long as what the branch decoded;
        - critical path: what is left of it after the join, times (1 - reserve), divided by 1 + n if messages follow one
          another;
        - calls and blocks: equal parts, rounded down, also of all calls of tools. A branch that is only closed gets none.
        """
        budget, allowance = self.options.budget, sequence.allowance
        tokens, field = self._token_share(allowance, branches), allowance.limiting_field
        if budget.branch_tokens is not None and budget.branch_tokens < tokens:
            tokens, field = budget.branch_tokens, "branch_tokens"
        path = self._critical_path_share(allowance, sequence.critical_path, branches)
        blocks, calls = allowance.blocks // (branches + 1), self._call_share(allowance, branches)
        tokens, path, blocks, calls = (max(0, n) for n in (tokens, path, blocks, calls))
        return Allowance(tokens, path, blocks, calls, field, max(0, allowance.tool_calls // branches))

    def lease_pool(
        self, sequence: SequenceState, branches: int, source: LeaseSource | None = None
    ) -> LeasePool:
        """A pool of what so many branches may write together: all but the reserve, and what closes the join."""
        closing = branches * self.overhead.branch
        left = sequence.allowance.tokens - closing - self.overhead.join
        capacity = self.unreserved(sequence, max(0, left)) + closing
        path = self._critical_path_room(sequence.allowance, sequence.critical_path, branches)
        return LeasePool(
            capacity,
            self.overhead.branch,
            results=self.by_message,
            source=source,
            path_capacity=max(0, path) if self.by_message else None,
        )

    def unreserved(self, sequence: SequenceState, tokens: int) -> int:
        """What the branches of a sequence may have of so many of its tokens.

        The sequence keeps its reserve of them, and no more than its texts after joins have shown that it needs.
        """
        kept = tokens - int(tokens * (1 - self.options.budget.reserve))
        expected = sequence.usage.expected_text_tokens
        return tokens - (kept if expected is None else min(kept, expected))

    def _token_share(self, allowance: Allowance, branches: int) -> int:
        left = allowance.tokens - branches * self.overhead.branch - self.overhead.join
        return int(left * (1 - self.options.budget.reserve)) // (branches * (1 + self.by_message))

    def _critical_path_share(self, allowance: Allowance, critical_path: int, branches: int) -> int:
        messages = branches if self.by_message else 0
        return self._critical_path_room(allowance, critical_path, branches) // (1 + messages)

    def _critical_path_room(self, allowance: Allowance, critical_path: int, branches: int) -> int:
        """The length that branches, and their messages after one another, may add to the critical path."""
        closing = (branches if self.by_message else 1) * self.overhead.branch + self.overhead.join
        left = allowance.critical_path_cap - critical_path - closing
        return int(left * (1 - self.options.budget.reserve))

    def _call_share(self, allowance: Allowance, branches: int) -> int:
        left = allowance.calls - branches * self._commits
        # One is for the text after the join.
        shared = min(int(left * (1 - self.options.budget.reserve)), left - 1)
        return shared // branches or int(left > branches)

    def _next_fork(self, sequence: SequenceState) -> tuple[int, ForkMode]:
        """How wide the next fork may be (0 for none), and whether it has to come, may come, or may not."""
        options = self.options
        if sequence.pending and sequence.pending.running:  # the open block may have more branches
            more = sequence.pending.started < options.width
            fits = more and not self._blocking_limit(sequence, sequence.pending_count + 1)
            return options.width, "auto" if fits else "forbidden"
        if not self.may_fork(sequence):
            return 0, "forbidden"
        required = not sequence.path and sequence.blocks < options.min_forks
        width = self._affordable_width(sequence)
        if not width:
            if required and not sequence.blocks and not sequence.tool_calls:
                self._raise_unaffordable(sequence)
            return 0, "forbidden"
        return width, "required" if required else "auto"

    def _cap_width_by_load(self, sequence: SequenceState, width: int, load: Load) -> int:
        """At most as wide as would run in parallel now."""
        options = self.options
        if width <= options.min_branches or sequence.pending_count or options.pacing is None:
            return width
        share = self.branch_allowance(sequence, width)
        parallelism, reason = choose_parallelism(options.pacing, Demand(width, share.tokens), load)
        capped = max(options.min_branches, min(width, parallelism))
        if capped < width:
            block = (*sequence.path, sequence.blocks + 1)
            self.request_log.record_pacing(block, width, capped, load, f"capped: {reason}")
        return capped

    def _affordable_width(self, sequence: SequenceState) -> int:
        """The widest fork that the sequence can pay for, 0 for none. The limit that narrows it is recorded."""
        first_limit = limit = None
        for width in range(self.options.width, self.options.min_branches - 1, -1):
            limit = self._blocking_limit(sequence, width)
            first_limit = first_limit or limit
            if not limit:
                break
        if first_limit:
            self.request_log.record_limit(first_limit, sequence.path)
        return 0 if limit else width

    def _blocking_limit(self, sequence: SequenceState, branches: int) -> str | None:
        """The limit that rules out a fork into so many branches, or None. Half of what is left has to be text."""
        allowance = sequence.allowance
        if allowance.blocks < 1:
            return "blocks"
        if allowance.calls < self._calls_for(branches):
            return "calls"
        if 2 * self.overhead.of(branches) > allowance.tokens:
            return allowance.limiting_field
        if branches > self.options.min_branches:
            left = allowance.tokens - branches * self.overhead.branch - self.overhead.join
            if self.unreserved(sequence, left) < branches * sequence.usage.expected_branch_tokens:
                return allowance.limiting_field
        left = allowance.critical_path_cap - sequence.critical_path
        return "critical_tokens" if 2 * self._critical_path_overhead(branches) > left else None

    def _calls_for(self, branches: int) -> int:
        """Calls that a fork needs: the fork, its commit, each branch, and the text after the join."""
        return branches * (1 + self._commits) + 3

    def _critical_path_overhead(self, branches: int) -> int:
        """Tokens that closing a fork adds to the critical path. Messages follow one another, branches do not."""
        return self.overhead.of(branches if self.by_message else min(branches, 1))

    def _lacking_limit(self, sequence: SequenceState, output: PhaseOutput, outlines: int) -> str | None:
        """The limit that rules out a fork into so many branches that was decoded without a grammar, or None.

        A fork without outlines has the fewest branches.
        """
        allowance, is_pending = sequence.allowance, sequence.pending and sequence.pending.running
        if sequence.depth >= self.options.budget.depth:
            return "depth"
        if not is_pending and allowance.blocks < 1:
            return "blocks"
        if not is_pending and not self.may_fork(sequence):
            return FORBIDDEN
        branches = outlines or self.options.min_branches
        written = len(output.token_ids) - self.overhead.fork
        if self.overhead.of(branches) + written > allowance.tokens:
            return allowance.limiting_field
        path = self._critical_path_overhead(branches) + written
        return "critical_tokens" if path > allowance.critical_path_cap - sequence.critical_path else None

    def _raise_unaffordable(self, sequence: SequenceState) -> None:
        """Raise what a fork that has to come lacks."""
        branches, budget = self.options.min_branches, self.options.budget
        tokens, calls = 2 * self.overhead.of(branches), self._calls_for(branches)
        limit = self._blocking_limit(sequence, branches)
        raise BudgetExceeded(
            f"a fork needs at least {tokens} tokens and {calls} calls here: {limit} of {budget} is too low"
        )
