"""Best of N against the papers: prompts and judgements, the choice, and verifiers that fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

import sgl_apr as apr
from sgl_apr.methods.best_of_n import best_of_n
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.reward_model import RewardModel
from sgl_apr.methods.task import Inapplicable, SampledTask, SelfJudgedTask, Task

REPLIES = ("so 1", "so 2", "hm 2", "so 3", "none")  # in turn
SURE = {"1": "5", "2": "4", "3": "7"}


class Digits(SampledTask[str], SelfJudgedTask[str]):
    """The digit that a reply ends with; 2 is right, and how sure the model is of each is said above."""

    name, max_tokens, step_tokens = "digits", 10, 4

    def prompt(self, problem: str) -> Prompt:
        return Prompt(f"{problem}?")

    def answer(self, text: str) -> str:
        return text[-1:] if text[-1:].isdigit() else ""

    def verify(self, problem: str, answer: str) -> bool:
        return answer == "2"

    def judge_prompt(self, problem: str) -> Prompt:
        return Prompt(" sure?", tokens=2)

    def judge_score(self, completion: Completion) -> float:
        return int(completion.text[0]) / 10


class Checked(Digits):
    verifiable = True


def best(
    kind: type[Task[Any]] = Digits, said: Any = None, **options: Any
) -> tuple[MethodResult, apr.ScriptedEngine]:
    """What it comes to for replies in turn, and the engine."""
    replies = iter(REPLIES * 30)

    def script(request: apr.Request, prompt: str) -> Any:
        if prompt.endswith("sure?"):
            return said(prompt) if said else SURE[prompt.removesuffix(" sure?")[-1]]
        return next(replies)

    engine = apr.ScriptedEngine(script)
    options = {"n": 5, "seed": 0, **options}
    found = asyncio.run(best_of_n(engine, "which", task=kind(engine), **options))
    assert not engine.active
    return found, engine


def asked(engine: apr.ScriptedEngine) -> list[str]:
    return [bytes(r.input_ids).decode(errors="ignore") for r in engine.requests]


def test_the_highest_score_is_chosen():
    heard = list[tuple[str, str]]()

    def verifier(problem: str, text: str) -> float:
        heard.append((problem, text))
        return -len(text) - (text == "so 2")  # of whole replies, not of answers

    found, engine = best(verifier=verifier)
    assert heard == [("which", text) for text in REPLIES[:4]]  # one has no answer
    assert (found.answer, found.score, found.label) == ("1", -4.0, "exact")
    assert asked(engine) == ["which?"] * 5
    assert engine.commits == [tuple(b"which?")]
    assert {r.sampling["temperature"] for r in engine.requests} == {0.7}


@pytest.mark.parametrize(("select", "answer", "score"), [("argmax", "3", 0.9), ("weighted", "2", 1.0)])
def test_a_weighted_vote_sums_the_scores_of_an_answer(select: Any, answer: str, score: float):
    worth = {"so 1": 0.6, "so 2": 0.5, "hm 2": 0.5, "so 3": 0.9}

    async def verifier(problem: str, text: str) -> float:
        await asyncio.sleep(0)
        return worth[text]

    found, _ = best(verifier=verifier, select=select)
    assert (found.answer, found.score) == (answer, score)


def test_the_earliest_wins_a_tie():
    found, _ = best(verifier=lambda problem, text: 1)
    assert (found.answer, found.score) == ("1", 1.0)


def test_a_verifiable_task_is_its_own_verifier():
    found, engine = best(Checked)
    assert (found.answer, found.score) == ("2", 1.0)
    assert len(engine.requests) == 5  # no judge


def test_otherwise_the_model_judges_in_a_fork_after_each_reply():
    found, engine = best()
    assert (found.answer, found.score) == ("3", 0.7)  # what is right is not looked up
    assert sorted(asked(engine)[5:]) == sorted(f"which?{text} sure?" for text in REPLIES[:4])
    assert sum(span.text == " sure?" for span in found.trajectory.spans) == 4
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)
    found, _ = best(Checked, verifier="judge", select="weighted")
    assert (found.answer, found.score) == ("2", pytest.approx(0.8))


def test_replies_and_their_judges_run_in_parallel():
    under_way = list[int]()
    engine = apr.ScriptedEngine(
        lambda request, prompt: under_way.append(len(engine.active)) or apr.Reply("5 is 1", delay=0.005)
    )
    asyncio.run(best_of_n(engine, "which", task=Digits(engine), n=4))
    assert under_way == [0, 1, 2, 3] * 2


def test_a_judge_or_verifier_that_fails_costs_its_reply():
    def broken(prompt: str) -> Any:
        return apr.Reply("7", error=apr.EngineError("broken", 400)) if "3" in prompt else "4"

    found, _ = best(said=broken)
    assert (found.answer, found.score) == ("1", 0.4)

    def down(problem: str, text: str) -> float:
        if text != "hm 2":
            raise apr.EngineError("down")
        return 0.1

    found, _ = best(verifier=down)
    assert (found.answer, found.score) == ("2", 0.1)
    with pytest.raises(apr.EngineError, match="down"):
        best(verifier=down, on_branch_failure="raise")

    def gone(problem: str, text: str) -> float:
        raise apr.EngineError("gone")

    with pytest.raises(apr.EngineError, match="gone"):
        best(verifier=gone)


def test_a_reply_that_fails_is_not_judged():
    replies = iter(["so 1", apr.Reply("so 3", error=apr.EngineError("broken", 400)), "so 2"])
    engine = apr.ScriptedEngine(lambda request, prompt: "4" if prompt.endswith("sure?") else next(replies))
    found = asyncio.run(best_of_n(engine, "which", task=Digits(engine), n=3))
    assert (found.answer, len(engine.requests)) == ("1", 5)


@pytest.mark.parametrize(
    ("tokens", "replies", "judges", "answer"),
    [(1, 0, 0, ""), (18, 1, 1, "1"), (40, 2, 2, "1"), (100, 5, 4, "3")],
)
def test_a_budget_has_fewer_replies_and_leaves_some_for_their_judges(
    tokens: int, replies: int, judges: int, answer: str
):
    found, engine = best(n=100, budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert sum(prompt == "which?" for prompt in asked(engine)) == replies
    assert sum(prompt.endswith("sure?") for prompt in asked(engine)) == judges
    assert "tokens" in {limit.limit for limit in found.trajectory.limits}
    assert found.answer == answer


def test_calls_and_time_are_limited():
    found, engine = best(n=100, budget=apr.Budget(calls=7))
    assert [prompt.endswith("sure?") for prompt in asked(engine)] == [False] * 3 + [True] * 3
    assert (found.answer, found.metrics.engine_calls) == ("1", 7)

    async def slow(problem: str, text: str) -> float:
        await asyncio.sleep(60 if text != "so 2" else 0)
        return 1.0

    found, _ = best(verifier=slow, budget=apr.Budget(seconds=0.3))
    assert (found.answer, found.score) == ("2", 1.0)


@pytest.mark.parametrize("said", [-0.5, float("nan"), float("inf")])
def test_scores_that_cannot_be_summed(said: float):
    with pytest.raises(apr.AprError, match=f"the verifier returned {said}, expected 0 or more"):
        best(verifier=lambda problem, text: said, select="weighted")


def test_invalid_arguments_and_tasks_are_errors():
    with pytest.raises(apr.AprError, match=r'select=.most., expected "argmax" or "weighted"'):
        best(select="most")

    class Silent(SampledTask[str]):
        name, prompt, answer = Digits.name, Digits.prompt, Digits.answer

    with pytest.raises(Inapplicable, match="digits cannot judge an answer"):
        best(Silent)
    assert method("best_of_n") is best_of_n


async def served(handler: Any, program: Any) -> Any:
    """What a program comes to with the URL of a server that answers by a function."""
    app = web.Application()
    app.router.add_post("/{route:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        return await program(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    finally:
        await runner.cleanup()


def test_a_served_reward_model():
    heard = list[Any]()

    async def scores(request: web.Request) -> web.Response:
        body = await request.json()
        heard.append((request.path, body, request.headers.get("Authorization")))
        if request.path == "/classify":
            return web.json_response({"embedding": [-1.5], "meta_info": {}})
        return web.json_response([{"score": 0.25, "document": body["documents"][0], "index": 0}])

    async def program(url: str) -> Any:
        shown = RewardModel(url, show=lambda problem, text: f"{problem}: {text}", api_key="k")
        return await shown("Q", "A"), await RewardModel(url, "v1/rerank")("Q", "A")

    assert asyncio.run(served(scores, program)) == (-1.5, 0.25)
    assert heard == [
        ("/classify", {"text": "Q: A"}, "Bearer k"),
        ("/v1/rerank", {"query": "Q", "documents": ["A"]}, None),
    ]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, {"embedding": [0.1, 0.9]}, "expected one score"),
        (200, {"error": "no reward model"}, "expected one score"),
        (200, "<html>", "no answer"),
        (400, {"message": "no such model"}, "answered 400: .*no such model"),
    ],
)
def test_answers_without_a_score(status: int, body: Any, error: str):
    async def answer(request: web.Request) -> web.Response:
        kind = "text/html" if isinstance(body, str) else "application/json"
        return web.Response(
            status=status, text=body if isinstance(body, str) else json.dumps(body), content_type=kind
        )

    async def program(url: str) -> Any:
        return await RewardModel(url)("Q", "A")

    with pytest.raises(apr.EngineError, match=error) as raised:
        asyncio.run(served(answer, program))
    assert raised.value.status == (400 if status == 400 else None)


def test_no_reward_model_and_a_silent_one():
    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(0.5)  # its server waits for it
        return web.Response()

    async def program(url: str) -> Any:
        with pytest.raises(apr.EngineTimeout, match=r"did not answer within 0.1 s"):
            await RewardModel(url, timeout=0.1)("Q", "A")

    asyncio.run(served(silent, program))
    with pytest.raises(apr.EngineError, match=r"no answer from http://127\.0\.0\.1:1/classify"):
        asyncio.run(RewardModel("http://127.0.0.1:1")("Q", "A"))
