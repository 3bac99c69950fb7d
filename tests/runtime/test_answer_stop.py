"""Stop texts end the final text early, and nothing before it."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from tests.runtime.test_loop import scripted

AFTER = "<Conclusion>so END it is</Conclusion>\n</Parallel>\n\nDone. END and more text, much more"


class SlowEngine(apr.ScriptedEngine):
    """Gives other tasks a turn after every token, as a server does."""

    async def decode(self, request, on_tokens=None):
        tokens: list[int] = []
        result = await super().decode(request, tokens.extend)
        for token in tokens:
            await asyncio.sleep(0)
            if on_tokens:
                on_tokens([token])
        return result


def run(stop, on_event=None, **options) -> apr.Trajectory:
    engine = scripted(after=AFTER)
    engine.__class__ = SlowEngine
    return asyncio.run(apr.areason(engine, "Q: ", "threadweaver", stop=stop, on_event=on_event, **options))


@pytest.mark.parametrize("listening", [True, False])
def test_the_final_text_ends_soon_after_a_stop_text(listening: bool):
    events: list = []
    t = run("END", events.append if listening else None, max_blocks=1)
    assert t.text.endswith("\n</Parallel>\n\nDone. END") or "Done. END" in t.text[:-1]
    assert len(t.text) < len(t.text.partition("Done.")[0]) + len("Done. END and")
    assert "<Conclusion>so END it is</Conclusion>" in t.text
    assert t.finish == "stop"
    if listening:
        assert apr.rebuild(events) == t


@pytest.mark.parametrize("options", [{}, {"max_blocks": 1, "logprobs": True}, {"max_blocks": 2}])
def test_a_text_that_may_fork_is_written_to_its_end(options: dict):
    assert run(["nowhere", "END"], **options).text.endswith("much more")


def test_a_reply_without_a_fork_stops():
    engine = scripted(trunk="One, two, three, four")
    engine.__class__ = SlowEngine
    t = asyncio.run(apr.areason(engine, "Q: ", "threadweaver", stop=("two", "three"), mode="sequential"))
    assert t.text.startswith("One, two")
    assert len(t.text) < len("One, two, three")
