"""What the loop does where a phase has ended with calls of tools."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from sgl_apr.engine.base import Engine
from sgl_apr.formats.options import Phase
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.cancel_scope import ScopeCancelled
from sgl_apr.runtime.fork_rules import ForkRules, PhaseLimits
from sgl_apr.runtime.phase_output import PhaseOutput
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import CallLimits, CallRules
from sgl_apr.runtime.tools.runner import ToolRunner


@dataclass(slots=True)
class CallTurn:
    """Where a sequence is between its calls.

    Attributes:
        resumed: Its next phase continues after the results of calls.
        may_call: No call of it was dropped for want of tokens. Another one would be dropped as well.
    """

    resumed: bool = False
    may_call: bool = True


class CallLoop:
    """Answers the calls of the sequences of one trajectory.

    Args:
        tools: Runs the calls.
        call_rules: Limits the calls of a phase.
        fork_rules: Limits its tokens.
    """

    def __init__(self, tools: ToolRunner, call_rules: CallRules, fork_rules: ForkRules) -> None:
        self.tools, self.call_rules, self.fork_rules = tools, call_rules, fork_rules

    def limits(self, sequence: SequenceState, limits: PhaseLimits, turn: CallTurn) -> CallLimits:
        """The calls that the next phase of a sequence may end with."""
        return self.call_rules.phase_calls(sequence, limits, resumed=turn.resumed, may_call=turn.may_call)

    def labelled(self, sequence: SequenceState, output: PhaseOutput) -> PhaseOutput:
        """The output with the ids of its calls as the label of their span."""
        *pieces, call = output.pieces
        ids = self.tools.call_ids(sequence, len(output.calls) or 1)
        return replace(output, pieces=(*pieces, call._replace(label=" ".join(ids))))

    async def answer(
        self,
        engine: Engine,
        sequence: SequenceState,
        phase: Phase,
        output: PhaseOutput,
        turn: CallTurn,
        group: BranchGroup | None,
    ) -> int:
        """Append the results of the calls that a phase has ended with. Another branch may run meanwhile.

        Args:
            engine: The engine of the sequence.
            sequence: The sequence, to which the output was appended.
            phase: The phase, which continues after the results.
            output: What the phase has written.
            turn: Is updated.
            group: The group that the sequence is a branch of.

        Returns:
            Tokens of the sequence that the engine has not computed.
        """
        turn.resumed = True
        if output.cut_call:
            self.tools.record_cut(sequence, output.pieces[-1].text)
            turn.may_call = False
            return 0
        tokens, limit = self.fork_rules.max_new_tokens(sequence, phase, 0)
        tokens -= self._fork_tokens(sequence)
        if group:
            group.release_slot(sequence)
        new = await self.tools.run_calls(
            engine, sequence, output.calls, max_tokens=tokens, limiting_field=limit
        )
        turn.may_call = new > 0
        if group:
            with suppress(ScopeCancelled):
                await sequence.scope.run(group.acquire_slots(sequence))
        return new

    def _fork_tokens(self, sequence: SequenceState) -> int:
        """Tokens that results have to leave for a fork that has to come."""
        rules = self.fork_rules
        if sequence.path or sequence.blocks >= rules.options.min_forks or not rules.may_fork(sequence):
            return 0
        return 2 * rules.overhead.of(rules.options.min_branches)
