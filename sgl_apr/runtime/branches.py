"""How a branch begins: its identity, its share of the allowance, its time, and its header or prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allocation import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.join_policy import deadline_seconds
from sgl_apr.runtime.message_join import make_branch_prompt
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.sequence import BranchIdentity, SequenceState
from sgl_apr.trajectory.spans import Path


class BranchStarter:
    """Starts branches under the options of one trajectory."""

    def __init__(self, options: ReasonOptions) -> None:
        self.options, self.dialect = options, options.dialect

    def identities(self, block: Path, outlines: Sequence[Outline], first: int = 0) -> list[BranchIdentity]:
        """The identities of the branches of a block, from branch `first` (counted from 0) on."""
        return [
            BranchIdentity((*block, k + 1), o.number or str(self.dialect.first_number + k), o.text)
            for k, o in enumerate(outlines, first)
        ]

    def scope(self, sequence: SequenceState) -> CancelScope:
        """The scope of the branches of a fork. They leave the sequence its reserve of time."""
        scope, now = sequence.scope, asyncio.get_running_loop().time()
        left, policy_s = scope.remaining_seconds(), deadline_seconds(self.options.effective_policy)
        deadlines = []
        if left is not None:
            deadlines.append((now + left * (1 - self.options.budget.reserve), scope.limit))
        if policy_s is not None:
            deadlines.append((now + policy_s, "policy"))
        deadline, limit = min(deadlines, default=(None, ""))
        return CancelScope(scope, deadline, limit)

    def start(
        self,
        sequence: SequenceState,
        identity: BranchIdentity,
        share: Allowance,
        scope: CancelScope,
        fork_span: int,
    ) -> SequenceState:
        """Begin a branch of `sequence`, with its header, or with its prompt in a context of its own.

        Args:
            sequence: The sequence that has just forked.
            identity: Who the branch is.
            share: What it may spend. Its critical path counts from where the branch begins.
            scope: Until when all branches of the fork may run.
            fork_span: The last span of the fork, which a branch with a context of its own waits for.
        """
        by_message = self.dialect.branch_context == "message"
        branch = SequenceState(
            identity,
            sequence.graph,
            context=() if by_message else sequence.context,
            frontier=() if by_message else sequence.frontier,
            allowance=replace(share),
            scope=CancelScope(scope),
            prefix_tokens=0 if by_message else len(sequence.context),
            tolerate_failure=self.options.on_branch_failure == "skip",
            kv_layout=sequence.kv_layout,
        )
        if by_message:  # the prompt comes out of the branch's share
            max_tokens = min(share.tokens, share.critical_path_cap)
            prompt = make_branch_prompt(self.dialect, sequence, identity.outline, max_tokens)
            if self.options.branch_prompt_template:
                prompt = self.options.branch_prompt_template(prompt)
            branch.allowance = share.starting_at(sequence.critical_path)
            branch.inject("header", prompt, identity.outline, waits_for=(fork_span,))
        else:  # the header was set aside
            header = self.dialect.grammar.render_rule("header", identity.number)
            branch.inject("header", header, identity.outline, charged=False)
            branch.allowance = share.starting_at(branch.critical_path)
        return branch
