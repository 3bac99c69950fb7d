"""Replies of the base model: stored compactly, read strictly, decoded by a server, and those that come with the package."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.demonstrations.chat_prompt import SYSTEM_MESSAGE, chat_prompt
from sgl_apr.training.demonstrations.dataset import plain_demonstrations
from sgl_apr.training.demonstrations.plain_prompts import plain_messages
from sgl_apr.training.demonstrations.plain_replies import (
    PlainReply,
    generate_replies,
    is_loop,
    read_replies,
    write_replies,
)

REPLIES = [
    PlainReply("train", "Why?", "Because.\n\nNaïve, 日本", True),
    PlainReply("test", "How?", "Like th", False),
]


def test_replies_are_read_as_they_were_written(tmp_path: Path):
    for name in ("a", "b"):
        write_replies(tmp_path / name, REPLIES)
    assert read_replies(tmp_path / "a") == REPLIES
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"[]\n", lambda data: data[:12] + b"xxxx" + data[16:]]
)
def test_a_damaged_file_is_an_error(tmp_path: Path, damage):
    write_replies(tmp_path / "a", REPLIES)
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    with pytest.raises(apr.AprError, match="cannot be read as replies of the base model"):
        read_replies(tmp_path / "a")
    write_replies(tmp_path / "b", [PlainReply("other", "Why?", "", True)])  # type: ignore[arg-type]
    with pytest.raises(apr.AprError, match="expected a split"):
        read_replies(tmp_path / "b")
    with pytest.raises(apr.AprError, match="No such file"):
        read_replies(tmp_path / "none")


def test_the_replies_of_the_package():
    replies = read_replies()
    by_split = {split: [r for r in replies if r.split == split] for split in ("train", "test")}
    assert len(by_split["train"]) >= 100
    assert len(by_split["test"]) >= 100
    for split, own in by_split.items():
        assert {r.message for r in own} <= set(plain_messages(split, 2700 if split == "train" else 180))
        assert len({r.message for r in own}) == len(own)
    assert sum(r.is_complete for r in replies) > len(replies) / 5
    assert not any(is_loop(d.reply) for d, _ in zip(plain_demonstrations("train"), range(50), strict=False))


def test_one_message_has_one_prompt():
    prompts = [chat_prompt(message) for message in plain_messages("train", 200)]
    assert prompts == [chat_prompt(message) for message in plain_messages("train", 200)]
    assert 110 < sum(SYSTEM_MESSAGE in prompt for prompt in prompts) < 170


@pytest.mark.server
def test_a_server_replies(server: Server):
    messages = plain_messages("train", 3)
    replies = asyncio.run(generate_replies(server.url, messages, "train", chat_prompt, max_tokens=6))
    again = asyncio.run(generate_replies(server.url, messages, "train", chat_prompt, max_tokens=6))
    assert [r.message for r in replies] == messages
    assert replies == again
    assert all(r.reply or r.is_complete for r in replies)
    assert asyncio.run(generate_replies(server.url, messages, "train", chat_prompt, seconds=-1)) == []
