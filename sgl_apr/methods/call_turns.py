"""The turns of a text that calls tools: it is decoded, its calls are answered, and it continues after their results."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from sgl_apr.engine.base import Engine
from sgl_apr.methods.prompt import Completion
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.cancel_scope import ScopeCancelled
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.runner import ToolRunner

DecodeTurn = Callable[[int, bool], Awaitable[Completion]]  # tokens, and whether it may call tools


async def decode_turns(
    runner: ToolRunner,
    engine: Engine,
    sequence: SequenceState,
    decode: DecodeTurn,
    tokens: int,
    group: BranchGroup | None,
) -> Completion:
    """Decode, run the calls, and continue, until a text ends without calls.

    Another branch of the group may run while tools do.

    Args:
        runner: Runs the calls.
        engine: Of the sequence.
        sequence: The sequence that continues.
        decode: Decodes one text, and appends it to the sequence.
        tokens: Tokens of all texts and results.
        group: The group that the sequence is a branch of.

    Returns:
        The last text.
    """
    end, may_call = sequence.tokens_used + tokens, True
    while True:
        completion = await decode(end - sequence.tokens_used, may_call)
        left = end - sequence.tokens_used
        if completion.cut_call:
            runner.record_cut(sequence, completion.cut_call)
            may_call = False
            if sequence.scope.cancel_reason or left < 1:
                return replace(completion, text="")
        elif completion.calls:
            if group:
                group.release_slot(sequence)
            if engine.context is not None:
                left = min(left, engine.context - len(sequence.context) - 1)
            new = await runner.run_calls(engine, sequence, completion.calls, max_tokens=left)
            may_call = new > 0
            if group:
                with suppress(ScopeCancelled):
                    await sequence.scope.run(group.acquire_slots(sequence))
        else:
            return completion
