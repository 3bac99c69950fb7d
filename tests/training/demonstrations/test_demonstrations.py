"""Chat demonstrations: reproducible, valid, right, split by topic and wording, and not decided by one word."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import sgl_apr as apr
from sgl_apr.training.demonstrations.dataset import as_trajectory, demonstrations, prompt_trajectory
from sgl_apr.training.demonstrations.fork_reply import Demonstration
from sgl_apr.training.demonstrations.keywords import best_keyword, keyword_accuracy
from sgl_apr.training.demonstrations.plain_prompts import plain_messages
from sgl_apr.training.demonstrations.wordings import WORDINGS
from sgl_apr.training.training_tree import build_training_tree

DIALECT = apr.dialect("threadweaver")
TOKENIZER = apr.ByteTokenizer([*DIALECT.tags, "<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="module")
def made() -> dict[str, list[Demonstration]]:
    return {split: list(demonstrations(split, 1200, plain_share=0.3)) for split in ("train", "test")}


def test_the_same_seed_makes_the_same_demonstrations():
    first, again, other = (list(demonstrations("train", 40, seed, plain_share=0.5)) for seed in (3, 3, 4))
    assert first == again
    assert not {d for d in first if d.kind != "plain"} & set(other)
    assert list(demonstrations("train", 20, 3, plain_share=0.5)) == first[:20]
    with pytest.raises(apr.AprError, match="count = -1"):
        next(demonstrations("train", -1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_replies_are_valid_and_fork_where_there_are_several_parts(made, split: str):
    for each in made[split]:
        trajectory = DIALECT.parse(each.reply)
        assert "{" not in each.message + each.reply
        assert len(trajectory.blocks) == each.is_multi_part
        if not each.is_multi_part:
            continue
        branches = trajectory.blocks[0].branches
        assert 2 <= len(branches) <= 5
        if each.answers:
            assert len(branches) == len(each.answers)
            texts = re.findall(r"<Thread>\n\d+:(.*?)</Thread>", each.reply, re.DOTALL)
            assert all(answer in text for answer, text in zip(each.answers, texts, strict=True))
            assert all(answer in trajectory.answer for answer in each.answers)
    assert sum(each.is_multi_part for each in made[split]) == len(made[split]) / 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_and_the_like_are_right(made, split: str):
    """Statements such as "12 + 3 = 15." by another computation than the one that made them."""
    checked = 0
    for each in made[split]:
        for left, sign, right, result in re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)\.", each.reply):
            found = {
                "+": int(left) + int(right), "-": int(left) - int(right), "x": int(left) * int(right),
                "/": int(left) / int(right),
            }[sign]  # fmt: skip
            checked += found == int(result) or " + " in each.reply.partition(f"{left} {sign} {right}")[0][-8:]
        for low, high in re.findall(r"(\d+) is more than (\d+)", each.reply):
            assert int(low) > int(high)
    assert checked > 20


def test_topics_and_wordings_of_the_test_split_are_in_no_training_data(made):
    shared = {"numbers", "total", "extreme", "sorting", "alphabet", "story", "plain"}  # held out by wording
    topics = {split: {t for d in made[split] for t in d.topics} - shared for split in made}
    assert len(topics["train"]) > 40
    assert len(topics["test"]) > 15
    assert not topics["train"] & topics["test"]
    assert not {d.template for d in made["train"]} & {d.template for d in made["test"]}
    for name, wordings in WORDINGS.items():
        assert not set(wordings["train"]) & set(wordings["test"]), name
    assert not {d.message for d in made["train"]} & {d.message for d in made["test"]}
    assert not set(plain_messages("train", 2000)) & set(plain_messages("test", 180))
    with pytest.raises(apr.AprError, match="expected at most the 180 messages"):
        plain_messages("test", 181)


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_word_tells_whether_there_are_several_parts(made, split: str):
    word, says_several = best_keyword(made[split])
    assert keyword_accuracy(made[split], word, says_several) < 0.75, word
    for mark in "?.,\n":  # nor does how often a mark occurs
        for count in (1, 2, 3):
            many = [
                [d.message.count(mark) >= count for d in made[split] if d.is_multi_part == m]
                for m in (True, False)
            ]
            assert abs(sum(many[0]) / len(many[0]) - sum(many[1]) / len(many[1])) < 0.5, (mark, count)


def test_a_word_that_tells_is_found(made):
    marked = [replace(d, message=f"{d.message} several") if d.is_multi_part else d for d in made["train"]]
    word, says_several = best_keyword(marked)
    assert "several" in word
    assert says_several
    assert keyword_accuracy(marked, word, says_several) > 0.95


def test_losses_stand_where_the_model_decides(made):
    each = next(d for d in made["train"] if d.is_multi_part)
    trajectory = as_trajectory(each, TOKENIZER)
    tree = build_training_tree([trajectory], eos=256)
    assert len(tree.split()) == 1
    targets = TOKENIZER.decode([i for i in tree.targets.tolist() if i != 256])
    assert targets.startswith("<Parallel>\n<Outlines>\n<Outline>1:")
    assert targets.count("</Thread>") == len(trajectory.blocks[0].branches)
    assert "<Thread>" not in targets  # the runtime writes it
    assert tree.targets.tolist().count(256) == 1
    assert trajectory.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert each.message in trajectory.prompt


def test_a_reply_that_was_cut_has_no_end():
    complete = Demonstration("plain", "plain/train", ("plain",), "Why?", "Because", (), is_multi_part=False)
    for demonstration in (complete, replace(complete, is_complete=False)):
        tree = build_training_tree([as_trajectory(demonstration, TOKENIZER)], eos=256)
        assert (256 in tree.targets) == demonstration.is_complete


def test_a_model_without_the_tags_is_an_error():
    plain = apr.ByteTokenizer(["<|im_start|>"])
    each = next(demonstrations("train", 1))
    with pytest.raises(apr.AprError, match="<Parallel> is not a token of the model"):
        as_trajectory(each, plain)
    assert prompt_trajectory(each, plain).text == each.reply
