"""Records one trajectory while it is written: its spans, its requests, and the events for a listener."""

from __future__ import annotations

import json

from sgl_apr.runtime.allowance import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.events import Done, OnEvent, assemble_trajectory
from sgl_apr.runtime.request_log import RequestLog
from sgl_apr.runtime.sequence import TRUNK, SequenceState
from sgl_apr.runtime.span_graph import EventEmitter, SpanGraph
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout
from sgl_apr.trajectory.spans import Span
from sgl_apr.trajectory.trajectory import Trajectory


class TrajectoryRecorder:
    """Begins a trajectory with its prompt, and assembles it at the end.

    Attributes:
        events: Passes events to the listener.
        graph: Appends spans.
        request_log: Records requests and decisions.
    """

    def __init__(self, tokenizer: Tokenizer, on_event: OnEvent | None) -> None:
        self.events = EventEmitter(on_event)
        self.graph = SpanGraph(tokenizer, self.events)
        self.request_log = RequestLog(self.events)
        self._prompt_layout = ""

    def start_trunk(
        self,
        prompt_ids: tuple[int, ...],
        allowance: Allowance,
        scope: CancelScope,
        prompt_layout: Layout = (),
    ) -> SequenceState:
        """Append the prompt and return the trunk that follows it.

        Args:
            prompt_ids: The token ids of the prompt.
            allowance: What the trunk may spend.
            scope: Until when it may send requests.
            prompt_layout: The layout of the beginning of the prompt up to the end of its last join in the KV cache.
        """
        text = self.graph.tokenizer.decode(prompt_ids)
        prompt = self.graph.add(Span("prompt", "prompt", text, prompt_ids, ()))
        self._prompt_layout = json.dumps(prompt_layout) if prompt_layout else ""
        trunk = SequenceState(TRUNK, self.graph, prompt_ids, (prompt,), allowance, scope, [prompt])
        trunk.kv_layout = prompt_layout
        return trunk

    def finish(
        self,
        trunk: SequenceState,
        dialect: str,
        seed: int | None,
        *,
        seeds_honoured: bool,
        tokens_shared: bool,
    ) -> Trajectory:
        """The trajectory, once the trunk has ended."""
        log = self.request_log
        limits, decisions, joins = tuple(log.limits), tuple(log.decisions), tuple(log.joins)
        order = tuple(trunk.span_order)
        done = Done(
            order, dialect, log.seconds, limits, decisions, joins, seed, seeds_honoured, tokens_shared,
            self._prompt_layout, tuple(log.groups),
        )  # fmt: skip
        self.events.emit(done)
        return assemble_trajectory(self.graph.spans, log.calls, done, log.tool_calls)
