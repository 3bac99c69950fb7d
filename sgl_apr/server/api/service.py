"""Runs trajectories inside the server process: checks their options, admits, counts and cancels them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from sgl_apr.engine.in_process import InProcessEngine
from sgl_apr.errors import AprError, EngineError
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.kv_admission import Slot, fetch_pool_tokens
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.server.api.admission import AdmissionQueue
from sgl_apr.server.api.chat.turn_memory import MIB, TurnMemory
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.counters import ServerCounters
from sgl_apr.server.api.openai.reply_stream import ReplyStream
from sgl_apr.server.api.options import UNKNOWN_TOKEN_CHARS, CheckedRequest, OptionsParser, ReasonRequest
from sgl_apr.server.api.tools.client_calls import ClientCalls
from sgl_apr.server.api.tools.messages import Message
from sgl_apr.server.api.tools.operator_tools import OperatorTools
from sgl_apr.server.api.tools.session import ToolSession
from sgl_apr.server.api.tools.sessions import ToolSessions
from sgl_apr.tokenizer import load_tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

T = TypeVar("T")
log = logging.getLogger(__name__)


class TrajectoryService:
    """Runs trajectories on the engine of a TokenizerManager.

    Attributes:
        config: The operator's settings.
        admission: The trajectories that run and wait.
        counters: Counts of what has run so far.
        turn_memory: The token ids of replies, for the next turns.
        operator_tools: The tools that the operator runs.
        sessions: The trajectories whose clients run tools.
    """

    def __init__(self, manager: Any, config: ApiConfig) -> None:
        self.config = config
        self.counters = ServerCounters(
            str(manager.served_model_name), bool(manager.config_value("enable_metrics"))
        )
        self.admission = AdmissionQueue(config.limits, self.counters.set_load)
        self.turn_memory = TurnMemory(config.limits.turn_memory * MIB)
        self.operator_tools = OperatorTools(config.tool_sources)
        self.sessions = ToolSessions(config.limits, self.counters)
        self._manager = manager
        self._engine: InProcessEngine | None = None
        self._parser: OptionsParser | None = None

    @property
    def model_name(self) -> str:
        """The name of the served model."""
        return str(self._manager.served_model_name)

    async def start(self) -> None:
        """Start the MCP servers of the operator.

        Raises:
            LaunchError: One does not start.
        """
        await self.operator_tools.start()

    async def close(self) -> None:
        """End the trajectories that wait for their clients, and the MCP servers."""
        await self.sessions.close()
        await self.operator_tools.close()

    @property
    def tool_call_parser(self) -> str | None:
        """The name of the parser that the server was started with, as `--tool-call-parser` has it."""
        name = self._manager.config_value("tool_call_parser")
        return None if name is None else str(name)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's tokenizer can make a prompt of chat messages."""
        return bool(getattr(getattr(self._manager, "tokenizer", None), "chat_template", None))

    async def engine(self) -> InProcessEngine:
        """Return the engine. The first call makes it.

        Raises:
            UnsupportedEngine: The server's grammar backend or tokenizer is not supported.
        """
        if self._engine is None:
            path = str(self._manager.config_value("tokenizer_path"))
            tokenizer = await asyncio.to_thread(load_tokenizer, path)
            self._engine = self._engine or InProcessEngine(self._manager, tokenizer=tokenizer)
        if self.admission.kv.pool_tokens is None:
            self.admission.kv.pool_tokens = await fetch_pool_tokens(self._engine)
        return self._engine

    async def parser(self) -> OptionsParser:
        """Return what checks the options and prompts of requests. The first call makes it."""
        return self._make_parser(await self.engine())

    def _make_parser(self, engine: InProcessEngine) -> OptionsParser:
        if self._parser is None:
            model, tokenizer = self._manager.model_config, engine.tokenizer
            self._parser = OptionsParser(
                self.config.limits,
                tokenizer,
                int(model.context_len),
                int(model.vocab_size),
                getattr(tokenizer, "max_token_chars", UNKNOWN_TOKEN_CHARS),
            )
        return self._parser

    async def check(self, request: ReasonRequest) -> CheckedRequest:
        """Check the options of a request, and encode its prompt.

        Raises:
            AprError: The request is not valid.
        """
        prompt, options = await (await self.parser()).parse_in_thread(request)
        return CheckedRequest(prompt, options, request.layout, request.turn)

    async def run(
        self, request: ReasonRequest | CheckedRequest, on_event: OnEvent | None = None
    ) -> Trajectory:
        """Run a trajectory to its end. It may wait until others have ended.

        Cancelling the call cancels the trajectory.

        Raises:
            AprError: The request is not valid.
            ServerBusy: As many trajectories run and wait as the operator allows, or no slot became free in time.
            EngineError: The engine failed.
        """
        engine = await self.engine()
        checked = request if isinstance(request, CheckedRequest) else await self.check(request)
        prompt, options = checked.prompt, checked.options
        async with self.admit(len(prompt), options.budget.tokens) as slot:
            trajectory = slot.trajectory = await run_with_options(
                engine, prompt, options, on_event, prompt_layout=checked.layout
            )
        self.counters.count_finished(options, trajectory)
        self._remember(checked, trajectory)
        return trajectory

    def open_session(
        self,
        calls: ClientCalls,
        request: CheckedRequest,
        messages: tuple[Message, ...],
        reply: ReplyStream,
        owner: str,
    ) -> ToolSession:
        """Return a session for a trajectory whose client runs tools. `sessions.turn` starts it.

        Args:
            calls: The calls of the trajectory. The request has their function as an option.
            request: The request.
            messages: Its messages.
            reply: Splits the text of the trajectory for the responses.
            owner: Who may continue the trajectory.
        """

        async def run(checked: CheckedRequest, on_event: OnEvent) -> Trajectory:
            engine = await self.engine()
            with self._counting():
                trajectory = await run_with_options(
                    engine, checked.prompt, checked.options, on_event, calls.activity, checked.layout
                )
            self.counters.count_finished(checked.options, trajectory)
            self._remember(session.request, trajectory)  # of its last request
            return trajectory

        session = ToolSession(calls, request, messages, reply, run, self.admission, owner)
        return session

    def _remember(self, request: CheckedRequest, trajectory: Trajectory) -> None:
        """Remember the token ids of a reply for the next turn of its conversation."""
        if request.turn is None or self._engine is None:
            return
        try:
            request.turn.remember(trajectory, self._engine.tokenizer)
        except Exception:  # the reply itself is done
            log.exception("a reply is not remembered")

    @asynccontextmanager
    async def admit(self, prompt_tokens: int, max_tokens: int) -> AsyncIterator[Slot]:
        """Wait for a slot, and hold it for the duration of the block. If the block fails, that is counted.

        Args:
            prompt_tokens: Tokens of the prompt.
            max_tokens: Tokens that the trajectory may write.

        Raises:
            ServerBusy: As many trajectories run and wait as the operator allows, or no slot became free in time.
        """
        with self._counting():
            async with self.admission.slot(prompt_tokens, max_tokens) as slot:
                yield slot

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the trajectory of the block if it fails."""
        try:
            yield
        except asyncio.CancelledError:
            self.counters.count_outcome("cancelled")
            raise
        except Exception as error:
            is_refused = isinstance(error, AprError) and not isinstance(error, EngineError)
            self.counters.count_outcome("refused" if is_refused else "failed")
            raise

    async def stream(
        self, request: ReasonRequest | CheckedRequest
    ) -> AsyncGenerator[Event | Trajectory, None]:
        """Yield the events of a trajectory as they happen, then the trajectory.

        Closing the stream cancels the trajectory.

        The first event is that of the prompt. It is yielded together with the second one, so that a request that the
        engine refuses fails before there is any event.

        Raises:
            AprError: Same as for `run`.
        """
        async with aclosing(
            hold_first(stream_events(lambda on_event: self.run(request, on_event)))
        ) as events:
            async for event in events:
                yield event


async def hold_first(events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield the same events, the first one together with the second one."""
    async with aclosing(events):
        first = await anext(events)
        second = await anext(events)
        yield first
        yield second
        async for event in events:
            yield event
