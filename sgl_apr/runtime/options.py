"""What is asked of one trajectory, and whether it can be had; nothing here runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from sgl_apr.errors import AprError, BudgetExceeded, KvJoinUnavailable
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.join_policy import POLICY_HELP, Policy, is_valid_policy
from sgl_apr.runtime.pacing import Pacing, PacingFunction
from sgl_apr.runtime.retry import Retry
from sgl_apr.tokenizer import Tokenizer

DEFAULT_DIALECT = "threadweaver"  # for models without tags of their own
Mode = Literal["auto", "sequential", "parallel"]
Failed = Literal["skip", "retry", "raise"]
REQUEST_FIELDS = ("lora_path", "cache_salt", "extra_key", "priority")


@dataclass(frozen=True)
class ReasonOptions:
    """What is asked of one trajectory, checked when it is made.

    mode: "auto" lets the model decide, "sequential" forbids forks, "parallel" wants at least one.
    min_blocks, max_blocks: forks the trunk has to make, and may make (None: as many as the budget bears).
        The text before a fork that has to come is bounded and without `<`; where tokens run out, fewer come.
    min_width: branches that a fork has at least; None leaves it to the dialect.
    join: how branches join. policy: when: "all", "first" or "quorum:k" of them have ended, "deadline:s"
        seconds have passed, or a function of the branches that have ended says so; a branch that failed does
        not count. The others are cut where they are. None takes what the dialect was published with, as far
        as it works here.
    pacing: how many branches run at once (`Pacing`); None never asks the engine. cap_width_by_load: a fork that is yet
        to be written is bounded by that too, so that what is written depends on how busy the engine is.
    retry: how often a request is repeated that failed in passing.
    on_branch_failure: what becomes of a branch whose requests fail for good: "skip" closes it with a note that the
        model reads, "retry" begins it anew once and then skips it, "raise" gives the trajectory up.
    seed: every request samples by a seed derived from it, if the engine honours them; None draws one.
    branch_prompt_template: makes a prompt of the message of a branch that has a context of its own, as a chat template does.
    constrain: decode under the grammar; without it the text may leave the dialect.
    forbid_angle_brackets: keep `<` out of free text, for models too small to tell tags from text.
    logprobs: note the log-probability of every decoded token, in `trajectory.calls`.
    sampling: SGLang sampling parameters for every request (temperature, top_p, ...).
    request_fields: further fields of every request, under SGLang's names (`FIELDS`): what is cached under one adapter
        or salt is not found under another.
    """

    dialect: Dialect
    budget: Budget = field(default_factory=Budget)
    join: str | None = None
    mode: Mode = "auto"
    min_blocks: int = 0
    max_blocks: int | None = None
    min_width: int | None = None
    policy: Policy | None = None
    pacing: PacingFunction | None = field(default_factory=Pacing)
    cap_width_by_load: bool = False
    retry: Retry = field(default_factory=Retry)
    on_branch_failure: Failed = "skip"
    seed: int | None = None
    branch_prompt_template: Callable[[str], str] | None = None
    constrain: bool = True
    forbid_angle_brackets: bool = False
    logprobs: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    request_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Branches that a fork may have; exactly so many where a fork does not list them."""
        return self.budget.width or self.dialect.width

    @property
    def min_branches(self) -> int:
        """Branches that a fork has at least."""
        return (
            self.width
            if self.dialect.unlabelled_branches
            else self.min_width or min(self.dialect.min_width, self.width)
        )

    @property
    def min_forks(self) -> int:
        """Forks that the trunk has to make."""
        return max(1, self.min_blocks) if self.mode == "parallel" else self.min_blocks

    @property
    def max_forks(self) -> int | None:
        """Forks that the trunk may make; None leaves it to the budget."""
        return 0 if self.mode == "sequential" else self.max_blocks

    @property
    def effective_policy(self) -> Policy:
        """The policy, or the dialect's own."""
        return self.policy or self.dialect.policy

    def __post_init__(self) -> None:
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
        if not is_valid_policy(policy):
            raise AprError(f"policy={policy!r}, expected {POLICY_HELP}")
        if d.asynchronous and not (isinstance(policy, str) and policy.startswith(("all", "deadline"))):
            raise AprError(
                f'{d.name} joins when the model says so: policy={policy!r}, expected "all" or "deadline:s"'
            )
        if self.on_branch_failure not in get_args(Failed):
            raise AprError(
                f'on_branch_failure={self.on_branch_failure!r}, expected "skip", "retry" or "raise"'
            )
        if self.cap_width_by_load and self.pacing is None:
            raise AprError("cap_width_by_load=True bounds a fork by its pacing, and there is none")
        if self.mode not in ("auto", "sequential", "parallel"):
            raise AprError(f'mode={self.mode!r}, expected "auto", "sequential" or "parallel"')
        if self.mode == "sequential" and self.min_blocks:
            raise AprError(f'mode="sequential" forbids the min_blocks={self.min_blocks} blocks asked for')
        min_forks, max_forks = self.min_forks, self.max_forks
        if "trunk" not in d.grammar.rules and (max_forks == 0 or min_forks > 1):
            raise AprError(f"{d.name} forks once, always: not mode={self.mode!r}, min_blocks={min_forks}")
        if min_forks < 0 or (max_forks is not None and max_forks < min_forks):
            raise AprError(f"min_blocks={min_forks}, max_blocks={max_forks}: expected 0 <= min <= max")


def make_options(
    dialect_: Dialect | str | None, tokenizer: Tokenizer | None = None, **options: Any
) -> ReasonOptions:
    """A `Plan`, with the dialect by name or as it is; what is no field of it is one of `FIELDS`, or a
    sampling parameter.

    Without a dialect it is the one whose tags the tokenizer has as tokens, else `DEFAULT`.
    """
    known = {f.name for f in fields(ReasonOptions)}
    request = {
        **options.pop("request_fields", {}),
        **{k: options.pop(k) for k in REQUEST_FIELDS if k in options},
    }
    sampling = {**options.pop("sampling", {}), **{k: v for k, v in options.items() if k not in known}}
    options = {k: v for k, v in options.items() if k in known} | {"request_fields": request}
    if dialect_ is None:
        dialect_ = (dialect_for(tokenizer) if tokenizer else None) or DEFAULT_DIALECT
    return ReasonOptions(
        dialect(dialect_) if isinstance(dialect_, str) else dialect_, sampling=sampling, **options
    )
