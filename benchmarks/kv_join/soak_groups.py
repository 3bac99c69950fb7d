"""The operations of the soak with groups of workers: random groups of both kinds, aborts and disconnects."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Literal

from benchmarks.common.worker_groups import block_ends
from benchmarks.kv_join.soak_operations import (
    GroupAnswer,
    GroupEnded,
    Soak,
    SoakSequence,
    Violation,
    random_ids,
)
from sgl_apr.engine.sglang_names import GROUP_PARAM
from tests.support.group_reference import group_think_rows, hogwild_rows

MAX_WORKERS = 4
MAX_GROUP_PROMPT_TOKENS = 150
STEP_END = "e"  # the random model writes it in one of ten tokens
LOGIT_TOLERANCE = 1e-3  # below the highest logit, where both implementations round
GROUP_FAILED = "worker group:"  # how the message begins when a group had to make room for others


def random_group(soak: Soak, rng: random.Random, new: int) -> GroupAnswer:
    """A group of either kind with up to `new` tokens a worker, after a prompt that may be cached."""
    linear = [s.ids for s in soak.sequences if not s.joined and len(s.ids) <= MAX_GROUP_PROMPT_TOKENS]
    prompt = rng.choice([*linear[-4:], random_ids(rng, 8, 60)])
    kind: Literal["group_think", "hogwild"] = rng.choice(("group_think", "hogwild"))
    headers = tuple(random_ids(rng, 1, 3) for _ in range(rng.randint(2, MAX_WORKERS)))
    step_end = rng.choice([None, STEP_END]) if kind == "hogwild" else None
    limits = tuple(rng.randint(1, new) for _ in headers)
    return GroupAnswer(kind, prompt, headers, limits, (), new + 4, step_end)


def group_body(group: GroupAnswer, rids: list[str], **fields: Any) -> dict[str, Any]:
    """The request of a group."""
    params: dict[str, Any] = {
        "kind": group.kind, "workers": len(group.headers), "prompt_tokens": len(group.prompt),
    }  # fmt: skip
    if group.kind == "group_think":
        params["position_range"] = group.position_range
    else:
        params["step_end"] = group.step_end
    sampling = [
        {
            "max_new_tokens": new, "temperature": 0, "ignore_eos": True,
            "custom_params": {GROUP_PARAM: params | {"worker": worker}},
        }
        for worker, new in enumerate(group.limits)
    ]  # fmt: skip
    prompts = [[*group.prompt, *header] for header in group.headers]
    return {"input_ids": prompts, "rid": rids, "sampling_params": sampling, **fields}


async def send_group(soak: Soak, group: GroupAnswer, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Send a group, and return what each worker has decoded. Raises `GroupEnded` if the group had to make room for others."""
    rids = [f"{rng.getrandbits(64):016x}" for _ in group.headers]
    async with soak.session.post(f"{soak.url}/generate", json=group_body(group, rids)) as response:
        if response.status != 200:
            text = await response.text()
            if response.status == 503 and GROUP_FAILED in text:
                raise GroupEnded
            raise Violation(f"{response.status}: {text[:200]}")
        workers = await response.json()
    reasons = [worker["meta_info"]["finish_reason"] for worker in workers]
    if any(GROUP_FAILED in str(reason.get("message")) for reason in reasons):
        raise GroupEnded
    outputs = tuple(tuple(worker["output_ids"]) for worker in workers)
    if tuple(map(len, outputs)) != group.limits:
        raise Violation(f"{tuple(map(len, outputs))} tokens, expected {group.limits}: {reasons}")
    soak.computed_tokens += sum(group.limits) + sum(map(len, group.headers))
    return outputs


async def run_group(soak: Soak, rng: random.Random) -> None:
    """Decode with a group to the end, and remember what it has decoded for the comparison."""
    group = random_group(soak, rng, 12)
    outputs = await send_group(soak, group, rng)
    soak.groups.append(replace(group, outputs=outputs))


async def read_text_of_group(soak: Soak, rng: random.Random) -> None:
    """Send what a worker has read and decoded as an ordinary prompt: its header and its tokens are not in the cache."""
    group = random_group(soak, rng, 12)
    outputs = await send_group(soak, group, rng)
    worker = rng.randrange(len(outputs))
    ids = (*group.prompt, *group.headers[worker], *outputs[worker])
    known = soak.known_prefix(ids)
    soak.linear.append(ids)
    answer = await soak.send(SoakSequence(ids), rng.randint(1, 4))
    soak.answers.append(answer)
    if answer.cached > max(len(group.prompt), known) + 2:  # two more tokens may be equal by chance
        raise Violation(
            f"{answer.cached} tokens of a worker's text were found: its prompt has {len(group.prompt)}"
        )


async def abort_group(soak: Soak, rng: random.Random) -> None:
    """Abort one worker or all, or close the connection, at a random time."""
    group = random_group(soak, rng, 120)
    rids = [f"{rng.getrandbits(64):016x}" for _ in group.headers]
    body = group_body(group, rids, stream=rng.random() < 0.5)

    async def send() -> None:
        async with soak.session.post(f"{soak.url}/generate", json=body) as response:
            await response.read()

    task = asyncio.create_task(send())
    await asyncio.wait([task], timeout=rng.uniform(0, 0.3))
    if rng.random() < 0.6:
        for rid in rng.choice([[rng.choice(rids)], rids]):
            async with soak.session.post(f"{soak.url}/abort_request", json={"rid": rid}) as response:
                await response.read()
    else:
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def send_malformed_group(soak: Soak, rng: random.Random) -> None:
    """Send what is no group. With pages of several tokens, no group is."""
    group = random_group(soak, rng, 8)
    body = group_body(group, [f"{rng.getrandbits(64):016x}" for _ in group.headers])
    if not soak.has_pages:
        params = body["sampling_params"][-1]["custom_params"][GROUP_PARAM]
        field, value = rng.choice(
            [("workers", 9), ("worker", 0), ("kind", "other"), ("prompt_tokens", 10**6), ("name", "mine")]
        )
        params[field] = value
    async with soak.session.post(f"{soak.url}/generate", json=body) as response:
        if response.status != 400:
            raise Violation(f"{response.status} for a malformed group: {(await response.text())[:200]}")


def group_differs(model: Any, tokenizer: Any, group: GroupAnswer) -> bool:
    """Whether a token of a group is not the most likely one of a forward pass with an explicit mask and explicit positions."""
    if group.kind == "group_think":
        rows = group_think_rows(model, group.prompt, group.headers, group.outputs, group.position_range)
    else:
        ends = [block_ends(tokenizer, output, group.step_end) for output in group.outputs]
        rows = hogwild_rows(model, group.prompt, group.headers, group.outputs, block_ends=ends)
    return any(
        float(row.max()) - float(row[token]) > LOGIT_TOLERANCE
        for worker, output in zip(rows, group.outputs, strict=True)
        for row, token in zip(worker, output, strict=True)
    )


GROUP_OPERATIONS: dict[Callable[[Soak, random.Random], Awaitable[None]], int] = {
    run_group: 12, read_text_of_group: 4, abort_group: 8, send_malformed_group: 1,
}  # fmt: skip
PAGE_OPERATIONS = {send_malformed_group: 1}  # with pages of several tokens
