"""The method for any model: it chooses one by the model, the task, the budget, the deadline, and the load of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.engine.base import Engine, Load
from sgl_apr.errors import EngineError
from sgl_apr.formats.presets import known_dialects
from sgl_apr.methods.method_options import check_method_options
from sgl_apr.methods.native_formats import forks_fit, run_format
from sgl_apr.methods.pacore import HIGH, LOW, MEDIUM
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import AggregationTask, SampledTask, Task, require_family
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.option_checks import make_object

MAX_REPLIES = 40  # of self_consistency (Wang 2022, arXiv 2203.11171, section 3.1)
MIN_REPLIES = 3  # fewer cannot outvote one another


@dataclass(frozen=True, slots=True)
class Plan:
    """What `pro` runs.

    Attributes:
        method: The name of the method; "" for the format of the model.
        options: Its options.
        reason: Why, for people.
    """

    method: str
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)


async def pro(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    single_temperature: float | None = None,
    **options: Any,
) -> MethodResult:
    """Choose the method, its width, its rounds and when it stops, and run it. The label of the result says which, and why.

    The rule, in this order:

    1. A model that forks by itself does so, in the first format that it declares: it decides the width for each problem. Without a
       deadline, it forks only from `min_fork_tokens` of the task on (two complete attempts): branches save time, not tokens.
    2. Otherwise, as many replies are sampled as fit the tokens of the budget, its deadline at the measured time of a decoding
       step, and the free KV cache of the engine. Where that is one or two, there is one reply.
    3. If the task can verify replies, `best_of_n` chooses by the verifier.
    4. If the answers of two replies can be equal, `self_consistency` votes, and ends when the vote is settled ("beta").
    5. If the model can make one reply of several, `pacore` does, with the widths of the paper that fit.
    6. Otherwise there is one reply.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`.
        single_temperature: The temperature where the answer is one reply, in the format of the model or without forks: nothing
            chooses among samples there. `temperature`, if it is given, has the last word.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    sampled = require_family(task, SampledTask)
    single = {} if single_temperature is None else {"temperature": single_temperature}
    check_method_options({name: value for name, value in options.items() if name != "on_event"})
    given = options.get("budget")
    budget: Budget = Budget() if given is None else make_object("budget", given)
    dialects = known_dialects(engine.tokenizer)
    if dialects and not forks_fit(budget, task):
        result = await method("sequential")(engine, problem, task=task, **{**single, **options})
        reason = f"{budget.tokens:,} tokens do not pay for forks, which save time"
        return MethodResult("pro", result.answer, result.trajectory, label=f"sequential: {reason}")
    if dialects:
        form = dialects[0]
        result = await run_format(form.name, form, engine, problem, task=task, options=single | options)
        label = f"{form.name} ({result.label}): the model forks by itself"
        return MethodResult("pro", result.answer, result.trajectory, label=label)
    try:
        load = await engine.load()
    except EngineError:
        load = None
    prompt = len(engine.tokenizer.encode(sampled.prompt(problem).text))
    replies, limit = affordable_replies(budget, task.max_tokens, prompt, load)
    plan = choose(task, replies, limit)
    chosen = {**plan.options, **(single if plan.method == "sequential" else {}), **options}
    result = await method(plan.method)(engine, problem, task=task, **chosen)
    return MethodResult(
        "pro", result.answer, result.trajectory, result.score, f"{plan.method}: {plan.reason}"
    )


def affordable_replies(budget: Budget, tokens: int, prompt: int, load: Load | None) -> tuple[int, str]:
    """How many replies of that length can run at once, and what limits them.

    Args:
        budget: The budget.
        tokens: Tokens of a reply.
        prompt: Tokens of the prompt, which all replies share.
        load: The load of the engine, None if it is not known.

    Returns:
        A number from 1 to 40, and the reason for people.
    """
    choices = [
        (MAX_REPLIES, f"at most {MAX_REPLIES} replies"),
        ((budget.tokens - prompt) // tokens, f"{budget.tokens:,} tokens"),
    ]
    if budget.calls is not None:
        choices.append((budget.calls - 1, f"{budget.calls} calls"))
    if load is not None:
        choices.append(((load.free_tokens - prompt) // tokens, f"{load.free_tokens:,} free KV tokens"))
        if budget.seconds is not None:
            widths = range(MAX_REPLIES, 0, -1)
            in_time = (n for n in widths if tokens * (load.step_s(load.running + n) or 0.0) <= budget.seconds)
            choices.append((next(in_time, 1), f"{budget.seconds:g} seconds"))
    replies, limit = min(choices, key=lambda choice: choice[0])
    return max(1, replies), limit


def choose(task: Task[Any], replies: int, limit: str) -> Plan:
    """Steps 2 to 6 of the rule of `pro`.

    Args:
        task: The task.
        replies: How many replies can run.
        limit: What limits them.
    """
    fit = f"{replies} replies fit ({limit})"
    if replies < MIN_REPLIES:
        return Plan("sequential", f"{fit}, and so few cannot outvote one another")
    if task.verifiable:
        return Plan("best_of_n", f"{fit}, and the task verifies them", {"n": replies})
    if task.comparable:
        return Plan(
            "self_consistency", f"{fit}, and a vote ends when it is settled", {"n": replies, "stop": "beta"}
        )
    widths = next((w for w in (HIGH, MEDIUM, LOW) if sum(w) + 1 <= replies), None)
    if isinstance(task, AggregationTask) and widths:
        return Plan("pacore", f"{fit}, and the model makes one of them", {"widths": widths})
    return Plan("sequential", f"{fit}, but nothing chooses among them")
