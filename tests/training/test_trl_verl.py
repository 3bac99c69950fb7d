"""Rewards as TRL and verl call them, against the same rewards of the trajectory."""

from __future__ import annotations

from functools import partial

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.training.rewards import gated, npr, parallel_r1
from sgl_apr.training.trl import TrlRollouts, for_trl
from sgl_apr.training.verl import for_verl
from tests.training.test_rewards import FORKED, PARALLEL, SEQUENTIAL, TOKENIZER


def right(answer: str, truth: object) -> bool:
    return answer.strip() == truth


def test_trl():
    paid = for_trl(gated, right, TOKENIZER)
    chat = [{"role": "assistant", "content": FORKED}]
    found = paid(
        prompts=["Q"] * 4, completions=[FORKED, FORKED, "six", chat], answer=["42", "41", "six", "42"]
    )
    expected = gated(PARALLEL, True)
    assert found == [expected, 0.0, 1.0, expected]
    assert expected > 1


def test_trl_drops_special_tokens_from_its_texts():
    paid = for_trl(gated, right, TOKENIZER)
    ids = [*TOKENIZER.encode(FORKED), min(TOKENIZER.eos_ids)]
    assert paid(completions=["42"], completion_ids=[ids], answer=["42"]) == [gated(PARALLEL, True)]


def test_messages_of_tools_are_not_read():
    """A tool may return tags, which would count as branches that the model forked."""

    def threads(trajectory, correct: bool) -> float:
        return float(sum(len(block.branches) for block in trajectory.blocks)) + correct

    paid = for_trl(threads, right, TOKENIZER)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    chat = [call, {"role": "tool", "name": "f", "content": FORKED}, {"role": "assistant", "content": "41"}]
    ids = TOKENIZER.encode("<tool_call>f</tool_call>" + FORKED + "41")
    assert paid(completions=[chat], answer=["41"]) == [1.0]
    assert paid(completions=[chat], completion_ids=[ids], answer=["41"]) == [1.0]
    forked = [*chat[:2], {"role": "assistant", "content": FORKED}]
    assert paid(completions=[forked], completion_ids=[ids], answer=["42"]) == [3.0]


def test_trajectories_of_the_runtime_are_judged_as_they_are():
    paid = for_trl(gated, right, TOKENIZER)
    trajectories = [PARALLEL, SEQUENTIAL]
    found = paid(completions=["?", "?"], trajectory=trajectories, answer=["42", "?"])
    assert found == [gated(PARALLEL, True), gated(SEQUENTIAL, False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "found temperature"),
        ({"logprobs": True}, "found logprobs"),
        ({"join": "kv"}, 'expected join="text"'),
        ({"widht": 2}, "no option 'widht'"),
    ],
)
def test_options_that_rollouts_for_trl_do_not_take(options: dict, message: str):
    with pytest.raises(apr.AprError, match=message):
        TrlRollouts("http://127.0.0.1:1", "multiverse", **options)


def test_rollouts_for_trl_join_as_text_where_they_can():
    assert TrlRollouts("http://127.0.0.1:1", "multiverse").options == {"join": "text"}
    assert TrlRollouts("http://127.0.0.1:1", "spawn").options == {}


def test_verl():
    score = for_verl(gated, right, TOKENIZER, "threadweaver")
    assert score("math", FORKED, "42", {"index": 1}) == gated(PARALLEL, True)
    assert score("math", "<Thread>", "42") == 0.0


BROKEN = {
    "a branch is never closed": FORKED.replace("</Thread><Thread>", "<Thread>", 1),
    "a thread too few": FORKED.replace("<Thread>\n2: y y y y</Thread>", ""),
    "a block is never closed": FORKED.replace("</Parallel>", ""),
    "a wrong number": FORKED.replace("2: y", "7: y"),
    "only a stray tag": "<Thread>\n42",
    "text among the outlines": FORKED.replace("<Outlines>\n", "<Outlines>\nfirst "),
}
STRUCTURE_STEP = partial(parallel_r1, step=9)


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", [None, "threadweaver"])
def test_a_malformed_completion_with_a_right_answer(text: str, name: str | None):
    def always(answer: str, truth: object) -> bool:
        return True

    for reward, trl, verl in ((STRUCTURE_STEP, -1.0, -1.0), (npr, None, 0.0), (gated, 1.0, 1.0)):
        arguments = (reward, always, TOKENIZER, name)
        assert for_trl(*arguments)(completions=[text], answer=["42"]) == [trl]
        assert for_trl(*arguments)(
            completions=["?"], completion_ids=[TOKENIZER.encode(text)], answer=["42"]
        ) == [trl]
        assert for_verl(*arguments)("math", text, "42") == verl


@pytest.mark.parametrize(("text", "structure"), [(FORKED, 1.2), ("six times seven is\n42", 1.0)])
def test_a_valid_completion_is_not_malformed(text: str, structure: float):
    def last_line(answer: str, truth: object) -> bool:
        return answer.splitlines()[-1] == truth

    for reward, expected in ((STRUCTURE_STEP, structure), (npr, 1.0)):
        assert for_trl(reward, last_line, TOKENIZER)(completions=[text], answer=["42"]) == [expected]


@pytest.mark.parametrize("name", dialect_names())
def test_an_empty_completion_raises_nothing(name: str):
    for reward in (STRUCTURE_STEP, npr, gated):
        (score,) = for_trl(reward, right, TOKENIZER, name)(completions=[""], answer=["42"])
        assert score is None or score <= 0
