"""The keyword arguments of `apr.reason`, `apr.areason` and the like, for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from sgl_apr.formats.options import JoinMethod
from sgl_apr.runtime.branch_scoring import BranchScoring, Scorer
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.join_policy import Policy
from sgl_apr.runtime.option_checks import Mode, OnBranchFailure
from sgl_apr.runtime.pacing import Pacing, PacingFunction
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.tools.request import RunTool
from sgl_apr.runtime.tools.tool import Tool


class BudgetFields(TypedDict, total=False):
    """The fields of `Budget`."""

    tokens: int
    critical_tokens: int | None
    branch_tokens: int | None
    width: int | None
    depth: int
    blocks: int | None
    calls: int | None
    outline_chars: int | None
    seconds: float | None
    tool_calls: int | None
    tool_seconds: float
    tool_result_tokens: int
    reserve: float


class PacingFields(TypedDict, total=False):
    """The fields of `Pacing`."""

    min_speedup: float
    expected_fill: float
    max_parallel: int | None


class RetryFields(TypedDict, total=False):
    """The fields of `Retry`."""

    attempts: int
    wait: float
    max_wait: float


class ScoringFields(TypedDict, total=False):
    """The fields of `BranchScoring`."""

    scorer: Scorer | Literal["confidence"]
    border: str
    keep: float
    threshold: float | None
    timeout: float


class SamplingParameters(TypedDict, total=False):
    """The sampling parameters of SGLang that a trajectory can have."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None


class ReasonArguments(SamplingParameters, total=False):
    """The options of a run, which `ReasonOptions` describes.

    Use it to pass options through a function of your own and have them checked there.

    Examples:
        >>> from typing import Unpack
        >>> async def answer(engine, question: str, **options: Unpack[apr.ReasonArguments]) -> str:
        ...     return (await apr.areason(engine, question, **options)).answer
    """

    budget: Budget | BudgetFields | str | None
    join: JoinMethod | None
    mode: Mode | None
    min_blocks: int | None
    max_blocks: int | None
    min_width: int | None
    policy: Policy | None
    pacing: Pacing | PacingFields | PacingFunction | None
    cap_width_by_load: bool | None
    eager_branches: bool | None
    scoring: BranchScoring | ScoringFields | None
    retry: Retry | RetryFields | None
    on_branch_failure: OnBranchFailure | None
    seed: int | None
    branch_prompt_template: Callable[[str], str] | None
    constrain: bool | None
    forbid_angle_brackets: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    sampling: SamplingParameters | None
    request_fields: Mapping[str, str | int] | None
    lora_path: str | None
    cache_salt: str | None
    extra_key: str | None
    priority: int | None
    tools: Sequence[Tool | Callable[..., Any]] | None
    tool_choice: str | None
    parallel_tool_calls: bool | None
    tool_call_parser: str | None
    run_tool: RunTool | None
    answer_schema: Mapping[str, Any] | str | None
    stop: str | Sequence[str] | None
