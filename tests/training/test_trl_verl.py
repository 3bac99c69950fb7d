"""Rewards as TRL and verl call them, against the same rewards of the trajectory."""

from __future__ import annotations

from sgl_apr.training.rewards import gated
from sgl_apr.training.trl_verl import for_trl, for_verl
from tests.training.test_rewards import FORKED, PARALLEL, TOKENIZER


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


def test_verl():
    score = for_verl(gated, right, TOKENIZER, "threadweaver")
    assert score("math", FORKED, "42", {"index": 1}) == gated(PARALLEL, True)
    assert score("math", "<Thread>", "42") == 0.0
