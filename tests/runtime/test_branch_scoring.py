"""Branches of a fork that a scorer ends: tournaments and thresholds on a script."""

from __future__ import annotations

import asyncio
import re
import time
from math import log
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.runtime.option_checks import check_options
from sgl_apr.trajectory.calls import TokenLogprob
from tests.support.threadweaver_traces import TAGS

WIDTH = 4
OUTLINES = "".join(f"<Outline>{k}: way {k}</Outline>\n" for k in range(1, WIDTH + 1))
FORK = f"<Parallel>\n<Outlines>\n{OUTLINES}</Outlines>"
QUALITY = {1: 3, 2: 7, 3: 1, 4: 5}


def sure(likely: float) -> Any:
    return (TokenLogprob(0, log(likely)), TokenLogprob(1, log(1 - likely)))


class Script:
    """Branch k has three thoughts, which name its quality, and so many letters."""

    def __init__(self, letters: int = 5, *failing: int) -> None:
        self.failing, self.letters = failing, letters
        self.engine = apr.ScriptedEngine(self, apr.ByteTokenizer(TAGS))

    def __call__(self, request: apr.Request, prompt: str) -> apr.Reply:
        if found := re.search(r"<Thread>\n(\d):([^<]*)$", prompt):
            k = int(found[1])
            thoughts = f"........q{QUALITY[k]}\n" * 3 + "x" * self.letters + "</Thread>"
            error = apr.EngineError("boom", 400) if k in self.failing else None
            likely = sure(0.5 + QUALITY[k] / 20)
            thoughts = "" if error else thoughts.removeprefix(found[2])
            return apr.Reply(thoughts, delay=0.01, error=error, top_logprobs=likely)
        return apr.Reply(FORK if "<Parallel>" not in prompt else "</Parallel>Done.", delay=0.0)

    def run(self, scorer: Any = None, **options: Any) -> apr.Trajectory:
        scoring = {"scorer": scorer or quality, **options.pop("scoring", {})}
        trajectory = asyncio.run(
            apr.areason(self.engine, "Q: ", "threadweaver", scoring=scoring, seed=0, **options)
        )
        apr.dialect("threadweaver").validate(trajectory.text)
        assert trajectory.answer == "Done."
        assert not self.engine.active
        return trajectory


def quality(before: str, text: str) -> float:
    assert before.startswith("Q: ")
    assert before.endswith("</Outlines>\n")
    return float(re.findall(r"q(\d)", text)[-1])


def outcomes(trajectory: apr.Trajectory) -> list[str | None]:
    return [b.outcome for b in trajectory.blocks[0].branches]


def test_each_border_is_a_tournament():
    trajectory = Script().run()
    assert outcomes(trajectory) == ["aborted", "ok", "aborted", "aborted"]
    texts = [b.text for b in trajectory.blocks[0].branches]
    assert [text.count("q") for text in texts[:3]] == [1, 3, 1]  # half of four end at the first border
    assert texts[3].count("\n") == 2  # and half of two at the second
    assert {limit.limit for limit in trajectory.limits} == {"value"}
    for branch in trajectory.blocks[0].branches:
        assert trajectory.spans[branch.spans[-1]].origin == (
            "decoded" if branch.outcome == "ok" else "injected"
        )


def test_a_threshold_asks_for_no_comparison():
    assert outcomes(Script().run(scoring={"threshold": 4.0})) == ["aborted", "ok", "aborted", "ok"]
    everything = outcomes(Script().run(scoring={"threshold": 100.0}))
    assert everything.count("ok") == 1, "the last one goes on"


def test_the_strong_get_the_tokens_of_the_weak():
    budget = apr.Budget(tokens=480)
    assert (
        outcomes(Script(150).run(lambda before, text: 1.0, scoring={"keep": 1.0}, budget=budget)).count("ok")
        == 0
    )
    trajectory = Script(150).run(budget=budget)
    assert outcomes(trajectory) == ["aborted", "ok", "aborted", "aborted"]
    assert trajectory.metrics().total <= 480


def test_the_model_judges_its_branches_by_its_confidence():
    trajectory = Script().run("confidence")
    assert outcomes(trajectory) == ["aborted", "ok", "aborted", "aborted"]
    checked = check_options({"scoring": {"keep": 0.25}})
    assert (checked["logprobs"], checked["top_logprobs"]) == (True, 20)
    options = apr.ReasonOptions(apr.dialect("threadweaver"), scoring=apr.BranchScoring())
    assert (options.logprobs, options.top_logprobs) == (True, 20)


@pytest.mark.parametrize(("default", "sent"), [(32, 4), (2, None), (None, None)])
def test_a_border_is_noticed_soon_on_a_server_with_large_chunks(default: int | None, sent: int | None):
    script = Script()
    script.engine.default_interval = default  # type: ignore[attr-defined]
    assert outcomes(script.run()).count("aborted") == 3
    intervals = [request.sampling.get("stream_interval") for request in script.engine.requests]
    assert intervals.count(4) == (WIDTH if sent else 0)


def slow(before: str, text: str) -> float:
    time.sleep(0.3)
    return 1.0


def broken(before: str, text: str) -> float:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "scorer", [broken, slow, lambda b, t: float("nan"), lambda b, t: None, lambda: 1.0, lambda b, t: "x"]
)
def test_a_hostile_scorer_ends_nothing(scorer: Any):
    assert outcomes(Script().run(scorer, scoring={"timeout": 0.05})) == ["ok"] * WIDTH


def test_a_failed_branch_is_not_waited_for():
    assert outcomes(Script(5, 2).run()) == ["aborted", "failed", "aborted", "ok"]


def fork_of(*numbers: str) -> str:
    """A fork of Multiverse."""
    outlines = "".join(f"<Outline>\n{n}: way {n}</Outline>\n" for n in numbers)
    return f"<Parallel>\n<Goal>\n{outlines}</Goal>"


def test_branches_of_a_branch_have_tournaments_of_their_own():
    """The first of two branches forks into three, whose scores are all above that of the second branch."""
    scores = {"1.1": 5, "1.2": 8, "1.3": 6, "2": 1}

    def scorer(before: str, text: str) -> float:
        return float(re.findall(r"q(\d)", text)[-1])

    def reply(request: apr.Request, prompt: str) -> apr.Reply:
        if prompt.endswith("<Conclusion>\n"):
            after = " Done." if "<Path>\n2:" in prompt else " then</Path>"
            return apr.Reply(f" so</Conclusion>\n</Parallel>{after}", delay=0.0)
        if found := re.search(r"<Path>\n([\d.]+):([^<]*)$", prompt):
            number, written = found.groups()
            if number == "1":
                return apr.Reply(fork_of("1.1", "1.2", "1.3"), delay=0.0)
            thoughts = f"........q{scores[number]}\n" * 3 + "end</Path>"
            return apr.Reply(thoughts.removeprefix(written), delay=0.01)
        return apr.Reply(fork_of("1", "2"), delay=0.0)

    engine = apr.ScriptedEngine(reply, apr.ByteTokenizer(apr.dialect("multiverse").tags))
    trajectory = asyncio.run(
        apr.areason(
            engine,
            "Q: ",
            "multiverse",
            budget=apr.Budget(tokens=4000, depth=2),
            scoring=apr.BranchScoring(scorer),
            seed=0,
        )
    )
    apr.dialect("multiverse").validate(trajectory.text)
    by_path = {block.path: [b.outcome for b in block.branches] for block in trajectory.blocks}
    assert trajectory.answer == "Done."
    assert by_path == {(1,): ["ok", "ok"], (1, 1, 1): ["aborted", "ok", "aborted"]}


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"keep": 0}, "keep=0, expected a share above 0"),
        ({"keep": "x"}, "keep='x', expected a number"),
        ({"border": ""}, "border='', expected the text"),
        ({"timeout": -1}, "timeout=-1, expected more than 0"),
        ({"threshold": float("nan")}, "threshold=nan, expected a number"),
        ({"scorer": "best"}, "scorer='best', expected a function"),
        ({"kep": 1}, "kep"),
        (3, "scoring=3, expected an object with fields of BranchScoring"),
    ],
)
def test_wrong_values_are_refused(scoring: Any, message: str):
    with pytest.raises(apr.AprError, match=re.escape(message)):
        check_options({"scoring": scoring})


def test_scoring_needs_branches_that_start_together():
    asynchronous = next(d for name in apr.dialect_names() if (d := apr.dialect(name)).asynchronous)
    for dialect, eager in ((asynchronous, False), (apr.dialect("spawn"), True)):
        with pytest.raises(apr.AprError, match="expected a dialect whose branches start together"):
            apr.ReasonOptions(dialect, scoring=apr.BranchScoring(), eager_branches=eager)
