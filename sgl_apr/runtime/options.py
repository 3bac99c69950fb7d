"""The options of one trajectory, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, BudgetExceeded, KvJoinUnavailable
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.branch_scoring import BranchScoring
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.join_policy import Policy
from sgl_apr.runtime.option_checks import (
    ANSWER_CHECKS,
    IMPLIED_BY_SCORING,
    Mode,
    OnBranchFailure,
    check_function,
    check_options,
)
from sgl_apr.runtime.option_checks import REQUEST_FIELDS as REQUEST_FIELDS
from sgl_apr.runtime.pacing import Pacing, PacingFunction
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.tools.request import RunTool
from sgl_apr.runtime.tools.tool import Tool
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.tokenizer import Tokenizer

DEFAULT_DIALECT = "threadweaver"  # for models without tags of their own


DEFAULT_BUDGET, DEFAULT_PACING, DEFAULT_RETRY = Budget(), Pacing(), Retry()


@dataclass(frozen=True)
class ReasonOptions:
    """What is asked of one trajectory.

    Attributes:
        dialect: The format.
        budget: Limits.
        join: How branches join: "text", "kv" or "message". None takes "kv" if the model's tokenizer declares a dialect that was
            published so (`apr_dialects`) and the engine can; else what works everywhere with this dialect.
        mode: "auto" lets the model decide, "sequential" forbids forks, "parallel" requires one.
        min_blocks: Forks that the trunk has to make. The text before a required fork is bounded and has no `<`. Where
            the tokens run out, fewer are made.
        max_blocks: Forks that the trunk may make. None leaves it to the budget.
        min_width: Branches that a fork has at least. None leaves it to the dialect.
        policy: When branches join: "all", "first" or "quorum:k" of them have ended, "deadline:s" seconds have passed,
            or a function of the ended branches returns true. Failed branches do not count. The others are cut where
            they are. None takes the policy of the dialect.
        pacing: How many branches run at once. None never asks the engine for its load.
        cap_width_by_load: A fork is at most as wide as would run at once. What is written then depends on the load.
        eager_branches: Start each branch as soon as its outline is written, while the fork still lists others. Only for
            dialects whose branches see nothing but their message. Such a branch does not wait for `pacing`.
        scoring: Ends weak branches of a fork while they are written, as a scorer judges them. The strong ones get their
            tokens. The scorer's problem is the text before the fork.
        retry: How often a failed request is repeated.
        on_branch_failure: What happens when the requests of a branch fail for good: "skip" closes the branch with a note
            that the model reads, "retry" restarts it once and then skips it, "raise" ends the trajectory.
        seed: The seeds of all requests are derived from it, if the engine supports seeds. None draws one.
        branch_prompt_template: Makes a prompt from the message of a branch with a context of its own, as a chat
            template does.
        constrain: Decode under the grammar. Without it the text may leave the dialect.
        forbid_angle_brackets: Keep `<` out of free text, for models too small to tell tags from text.
        logprobs: Record the log-probability of every decoded token in `trajectory.calls`.
        top_logprobs: Record as many of the most likely tokens in the place of each, too.
        sampling: SGLang's sampling parameters for every request.
        request_fields: Further fields of every request under SGLang's names (`REQUEST_FIELDS`). What is cached under one
            adapter or salt is not found under another.
        tools: What the model may call, in the trunk and in every branch: `Tool`s, and typed functions.
        tool_choice: "auto" lets the model decide, "none" forbids calls, "required" makes the trunk call a tool before it
            answers, and the name of a tool makes it call that one.
        parallel_tool_calls: Let the model call several tools at once, if its format allows that.
        tool_call_parser: How the model writes calls: a name that `--tool-call-parser` of SGLang accepts. None takes the
            server's.
        run_tool: Runs the tools that have no function, and limits its own time. An async function of a `ToolRequest` that
            returns text.
        answer_schema: JSON schema of the final text, which is then JSON.
        stop: Texts that end the final text: what decodes it ends as soon as it has written one. The trajectory has what was
            decoded up to there.
    """

    dialect: Dialect
    budget: Budget = DEFAULT_BUDGET
    join: str | None = None
    mode: Mode = "auto"
    min_blocks: int = 0
    max_blocks: int | None = None
    min_width: int | None = None
    policy: Policy | None = None
    pacing: PacingFunction | None = DEFAULT_PACING
    cap_width_by_load: bool = False
    eager_branches: bool = False
    scoring: BranchScoring | None = None
    retry: Retry = DEFAULT_RETRY
    on_branch_failure: OnBranchFailure = "skip"
    seed: int | None = None
    branch_prompt_template: Callable[[str], str] | None = None
    constrain: bool = True
    forbid_angle_brackets: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    request_fields: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Tool] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    tool_call_parser: str | None = None
    run_tool: RunTool | None = None
    answer_schema: str | None = None
    stop: tuple[str, ...] = ()

    @cached_property
    def width(self) -> int:
        """Branches that a fork may have, and has where the fork does not list them."""
        return self.budget.width or self.dialect.width

    @cached_property
    def min_branches(self) -> int:
        """Branches that a fork has at least."""
        return (
            self.width
            if self.dialect.unlabelled_branches
            else self.min_width or min(self.dialect.min_width, self.width)
        )

    @cached_property
    def min_forks(self) -> int:
        """Forks that the trunk has to make."""
        return max(1, self.min_blocks) if self.mode == "parallel" else self.min_blocks

    @cached_property
    def max_forks(self) -> int | None:
        """Forks that the trunk may make; None leaves it to the budget."""
        return 0 if self.mode == "sequential" else self.max_blocks

    @cached_property
    def effective_policy(self) -> Policy:
        """The policy, by default the dialect's."""
        return self.policy or self.dialect.policy

    @cached_property
    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools as a chat template shows them to the model; None if it must not call any."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.to_openai() for tool in self.tools]

    def __post_init__(self) -> None:
        if not isinstance(self.dialect, Dialect):
            raise AprError(f"dialect={shorten(self.dialect)}, expected a Dialect")
        values = vars(self)
        checked = check_options(
            {name: values[name] for name, default in _defaults().items() if values[name] is not default}
        )
        for name in checked:
            if name in ANSWER_CHECKS or name in IMPLIED_BY_SCORING:
                object.__setattr__(self, name, checked[name])
        self._check_consistent()

    @classmethod
    def of_checked(cls, dialect: Dialect, checked: Mapping[str, Any]) -> ReasonOptions:
        """Options from what `check_options` has returned, which is not checked once more."""
        made = object.__new__(cls)
        vars(made).update(_defaults(), sampling={}, request_fields={}, dialect=dialect)
        vars(made).update(checked)
        made._check_consistent()
        return made

    def with_learned_join(self, engine: Engine) -> ReasonOptions:
        """These options for an engine: a join that nobody chose is the one that the model has learned, if the engine can."""
        declared = getattr(engine.tokenizer, "declared_dialects", ())
        learned = self.dialect.name in declared and self.dialect.published_join == "kv"
        if self.join is not None or not learned or "kv" not in self.dialect.joins or not engine.joins_kv:
            return self
        made = object.__new__(ReasonOptions)
        vars(made).update({f.name: vars(self)[f.name] for f in fields(self)}, join="kv")
        return made

    def _check_consistent(self) -> None:
        """Check what depends on the dialect, and on several options."""
        if self.tools or self.tool_choice != "auto" or self.answer_schema is not None:
            self._check_tools()
        d, b = self.dialect, self.budget
        if self.width > d.max_width:
            raise BudgetExceeded(
                f"{d.name} has at most {d.max_width} branches a block, not width={self.width}"
            )
        if b.depth > d.max_depth:
            raise BudgetExceeded(f"{d.name} nests at most {d.max_depth} deep, not depth={b.depth}")
        if not 1 <= self.min_branches <= self.width:
            raise BudgetExceeded(f"min_width={self.min_width}, expected 1 to the width {self.width}")
        if self.join is not None and self.join not in d.joins:
            expected = f"{d.name} joins by {' or '.join(sorted(d.joins))}"
            raise (KvJoinUnavailable if self.join == "kv" else AprError)(
                f"{expected}, not join={self.join!r}"
            )
        policy = self.effective_policy
        if d.asynchronous and not (isinstance(policy, str) and policy.startswith(("all", "deadline"))):
            raise AprError(
                f'{d.name} joins when the model says so: policy={policy!r}, expected "all" or "deadline:s"'
            )
        if self.eager_branches and not (d.removes_call_from_context and "outline" in d.grammar.rules):
            raise AprError(
                f"{d.name} starts no branch before its fork is complete: eager_branches=True, expected a dialect "
                "with outlines whose branches see only their message, such as apr or spawn"
            )
        if self.scoring and (d.asynchronous or self.eager_branches):
            raise AprError(
                "scoring compares the branches of a fork, expected a dialect whose branches start together, and eager_branches=False"
            )
        if self.eager_branches and self.tools:
            raise AprError("eager_branches=True cannot be combined with tools")
        if "trunk" not in d.grammar.rules and (self.max_forks == 0 or self.min_forks > 1):
            raise AprError(
                f"{d.name} forks once, always: not mode={self.mode!r}, min_blocks={self.min_forks}"
            )

    def _check_tools(self) -> None:
        """Check that the options about tools fit one another."""
        choice, names = self.tool_choice, [tool.name for tool in self.tools]
        if choice not in ("auto", "none", "required", *names):
            expected = f"the name of a tool: {', '.join(names)}" if names else "tools with that name"
            raise AprError(
                f'tool_choice={shorten(choice)}, expected "auto", "required", "none", or {expected}'
            )
        if choice not in ("auto", "none"):
            if not names:
                raise AprError(f"tool_choice={choice!r} needs tools")
            if not self.constrain:
                raise AprError(f"tool_choice={choice!r} needs the grammar, found constrain=False")
            if self.budget.tool_calls == 0:
                raise BudgetExceeded(
                    f"tool_choice={choice!r} needs a call of a tool, found budget tool_calls=0"
                )
        if self.answer_schema is not None and not self.constrain:
            raise AprError("answer_schema needs the grammar, found constrain=False")
        for tool in self.tools:
            if tool.function is None and self.run_tool is None:
                raise AprError(
                    f"the tool {tool.name!r} has no function, expected one, or run_tool, which runs it"
                )


@cache
def _defaults() -> dict[str, object]:
    """The options that do not depend on the dialect, with their defaults, which need no check."""
    return {f.name: f.default for f in fields(ReasonOptions) if f.name != "dialect"}


def make_options(
    dialect_: Dialect | str | None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    /,
    **options: Any,
) -> ReasonOptions:
    """Options from keyword arguments.

    Args:
        dialect_: The dialect or its name. Without one it is the one whose tags the tokenizer has, else
            `DEFAULT_DIALECT`.
        tokenizer: Of the model.
        vocab_size: Number of token ids that the model has. None if it is not known.
        options: Fields of `ReasonOptions`, names of `REQUEST_FIELDS`, and sampling parameters. `budget`, `pacing` and
            `retry` may be mappings, and `budget` text such as `tokens=400,width=4`.

    Raises:
        AprError: An option has an unknown name, a wrong type, or a value that is not possible.
    """
    checked = check_options(options, vocab_size)
    if dialect_ is None:
        dialect_ = (dialect_for(tokenizer) if tokenizer else None) or DEFAULT_DIALECT
    return ReasonOptions.of_checked(resolve_dialect(dialect_), checked)


def resolve_dialect(name: Any) -> Dialect:
    """Return a dialect, or the one of that name.

    Raises:
        AprError: It is neither.
    """
    if isinstance(name, Dialect):
        return name
    if not isinstance(name, str):
        raise AprError(f"dialect={shorten(name)}, expected the name of a dialect, or a Dialect")
    return dialect(name)


def check_call(
    dialect_: Dialect | str | None, options: Mapping[str, Any], on_event: OnEvent | None = None
) -> None:
    """Check the arguments of a call before there is an engine.

    Without a dialect it is not known yet, so what depends on it is checked later.

    Raises:
        AprError: An option has an unknown name, a wrong type, or a value that is not possible.
    """
    if on_event is not None:
        check_function("on_event", on_event)
    if dialect_ is None:
        check_options(options)
    else:
        make_options(dialect_, **options)
