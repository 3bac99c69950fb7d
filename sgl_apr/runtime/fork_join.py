"""Starts the branches of a fork, and joins them: as text, in the KV cache, or by message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sgl_apr.engine.quoted_text import encode_quoted, truncate_plain
from sgl_apr.errors import AprError
from sgl_apr.formats.branch_prompts import branch_prompt
from sgl_apr.formats.completion import PLACEHOLDER
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allowance import Allowance
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.join_policy import deadline_seconds
from sgl_apr.runtime.kv_join import KvJoiner
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.phase_output import FAILURE_NOTE
from sgl_apr.runtime.sequence import BranchIdentity, SequenceState
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.tokenizer import Tokenizer, plain_ids, truncate_tokens
from sgl_apr.trajectory.spans import Span


class ForkJoin:
    """Forks and joins under the options of one trajectory.

    Args:
        options: Of the trajectory.
        kv_joiner: Joins in the KV cache, if the options ask for it.
    """

    def __init__(self, options: ReasonOptions, kv_joiner: KvJoiner) -> None:
        self.options, self.dialect, self.kv_joiner = options, options.dialect, kv_joiner
        self.grammar = options.dialect.grammar
        self.by_message = options.dialect.branch_context == "message"

    def announce(self, group: BranchGroup, outlines: Sequence[Outline]) -> list[BranchIdentity]:
        """Name the branches of a fork, and emit it."""
        first = self.dialect.first_number + len(group.branches)
        return group.announce([(o.number or str(first + k), o.text) for k, o in enumerate(outlines)])

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
        group: BranchGroup,
        identity: BranchIdentity,
        share: Allowance,
        scope: CancelScope,
        max_prompt_tokens: int | None = None,
    ) -> SequenceState:
        """Start a branch with its header, or with its prompt in a context of its own.

        Args:
            group: The group of the branch.
            identity: From `announce`.
            share: What it may spend.
            scope: Until when the branches of the fork may run.
            max_prompt_tokens: Tokens of its prompt. None for its share.
        """
        tolerate = self.options.on_branch_failure == "skip"
        if not self.by_message:
            header = self.grammar.render_rule("header", identity.number)
            return group.start_with_header(identity, share, scope, header, tolerate_failure=tolerate)
        # The prompt comes out of the branch's share.
        max_tokens = min(
            share.tokens if max_prompt_tokens is None else max_prompt_tokens, share.critical_path_cap
        )
        tokenizer = group.parent.graph.tokenizer
        context = tokenizer.decode(group.parent.context)
        prompt, ids = self.message_prompt(tokenizer, context, identity.outline, max_tokens)
        return group.start_with_prompt(
            identity, share, scope, prompt, token_ids=ids, tolerate_failure=tolerate
        )

    def message_prompt(
        self, tokenizer: Tokenizer, context: str, outline: str, max_tokens: int
    ) -> tuple[str, list[int]]:
        """The prompt of a branch in a context of its own, as text and as ids.

        Args:
            tokenizer: Of the model.
            context: The text of the sequence that forks.
            outline: What the branch is to do.
            max_tokens: Tokens that the prompt may have, without those of a template.
        """
        text = branch_prompt(self.dialect.branch_prompt).make_prompt(context, outline)
        quoted = outline if outline in text else text
        pieces = len(plain_ids(tokenizer, quoted)) - len(
            tokenizer.encode(quoted)
        )  # of spellings of added tokens
        prompt = truncate_tokens(tokenizer, text, max(0, max_tokens - pieces)) or PLACEHOLDER
        quoted = outline if outline in prompt else prompt
        if self.options.branch_prompt_template:
            prompt = apply_template(self.options.branch_prompt_template, prompt)
        return prompt, encode_quoted(tokenizer, prompt, [quoted], add_special_tokens=True)

    def open(self, sequence: SequenceState) -> None:
        """Write what stands before the branches of a block, or drop the call that forked them."""
        if self.dialect.removes_call_from_context:
            sequence.drop_fork()
        else:
            sequence.inject("lead", self.grammar.render_rule("lead"))

    def join(self, group: BranchGroup, share: Allowance) -> int:
        """Write the branches of a block that have all ended into their parent.

        Returns:
            Tokens of the parent that the engine has not computed.
        """
        sequence, branches = group.parent, group.branches
        for branch in branches:
            sequence.merge(branch)
        if self.by_message:
            return self.write_results(sequence, branches, self.max_result_tokens(group, share))
        fork = len(sequence.context)
        in_cache = self.options.join == "kv" and self.kv_joiner.join(sequence, fork, branches)
        sequence.append_branches(branches)
        before = len(sequence.context)
        sequence.inject("tail", self.grammar.render_rule("tail"))
        uncached = 0 if in_cache else sum(branch.uncached_tokens for branch in branches)
        return len(sequence.context) - before + uncached

    @staticmethod
    def max_result_tokens(group: BranchGroup, share: Allowance) -> list[int]:
        """Tokens that the result of each branch may have."""
        if group.leases is None:
            return [min(share.tokens, share.critical_path_cap)] * len(group.branches)
        leases = [group.leases.of(branch) for branch in group.branches]
        return [min(lease.result_tokens, lease.path_result_tokens) for lease in leases]

    def final_tokens(self, branch: SequenceState, max_result_tokens: int) -> int:
        """Tokens that a branch that has ended takes, with the result that it returns as a message."""
        if not self.by_message:
            return branch.tokens_used
        text, result = self._render_result(branch, max_result_tokens)
        return branch.tokens_used + len(self._encode_result(branch, text, result))

    def decoded_result_tokens(self, sequence: SequenceState, ids: Sequence[int]) -> int:
        """Tokens of its result that a branch has decoded so far.

        Args:
            sequence: The branch.
            ids: What its running phase has decoded.
        """
        if not self.by_message:
            return 0
        tokenizer = sequence.graph.tokenizer
        text = tokenizer.decode(ids, sequence.context)
        if not self.grammar.closing_literal("body", sequence.identity.number):  # the text may be its result
            spans = [s for s in sequence.spans if s.path == sequence.path and s.role == "body"]
            return sum(s.tokens for s in spans) + len(plain_ids(tokenizer, text))
        opening = self.grammar.opening_literal("closer")
        return len(plain_ids(tokenizer, text.partition(opening)[2])) if opening and opening in text else 0

    def write_results(
        self, sequence: SequenceState, branches: Sequence[SequenceState], max_tokens: Sequence[int]
    ) -> int:
        """Write what branches returned into the sequence that forked them.

        Args:
            sequence: The sequence that continues after them.
            branches: Branches that have ended. Each result waits for its own branch.
            max_tokens: Tokens that the result of each branch may have.

        Returns:
            The number of new tokens.
        """
        before = len(sequence.context)
        sequence.inject("lead", self.grammar.render_rule("lead"))
        for branch, max_result_tokens in zip(branches, max_tokens, strict=True):
            text, result = self._render_result(branch, max_result_tokens)
            ids = self._encode_result(branch, text, result)
            sequence.inject(
                "result",
                text,
                result.strip(),
                result_of=branch.identity,
                waits_for=branch.frontier,
                token_ids=ids,
            )
        sequence.inject("tail", self.grammar.render_rule("tail"))
        return len(sequence.context) - before

    def _render_result(self, branch: SequenceState, max_tokens: int) -> tuple[str, str]:
        """The text of a branch's result with its tags, and without them."""
        identity, result = branch.identity, self._result(branch, max_tokens)
        rule = "failure" if not result and "failure" in self.grammar.rules else "result"
        return self.grammar.render_rule(rule, identity.number, result, identity.outline), result

    @staticmethod
    def _encode_result(branch: SequenceState, text: str, result: str) -> list[int]:
        """The token ids of a rendered result. What the branch wrote has no added tokens: it may quote a stranger."""
        return encode_quoted(branch.graph.tokenizer, text, [result, branch.identity.outline])

    def _result(self, branch: SequenceState, max_tokens: int) -> str:
        """What a branch returns. Empty if it was cut before it had written a result."""
        grammar, tokenizer = self.grammar, branch.graph.tokenizer
        if branch.finish == "failed" and "failure" not in grammar.rules:
            return truncate_tokens(tokenizer, FAILURE_NOTE, max_tokens)
        spans = [s for s in branch.spans if s.path == branch.path]
        closers = [s for s in spans if s.role == "closer"]
        if grammar.closing_literal("body", branch.identity.number):
            text = closers[0].label if closers and all(s.origin == "decoded" for s in closers) else ""
        else:
            body = "".join(
                s.text for s in _after_results(spans) if s.role == "body" and s.origin == "decoded"
            )
            text = branch_prompt(self.dialect.branch_prompt).extract_result(body)
        text = truncate_plain(tokenizer, text, max_tokens)
        return text if not any(tag in text for tag in grammar.tag_literals) else ""


def _after_results(spans: list[Span]) -> list[Span]:
    """The spans after the last result of a tool."""
    last = max((i for i, span in enumerate(spans) if span.role == "observation"), default=-1)
    return spans[last + 1 :]


def apply_template(template: Callable[[str], str], message: str) -> str:
    """Return the prompt that a branch prompt template makes of a message.

    Raises:
        AprError: It makes something else than text.
    """
    prompt: object = template(message)
    if not isinstance(prompt, str):
        raise AprError(f"branch_prompt_template returned {shorten(prompt)}, expected text")
    return prompt
