"""The backend for `@sgl.function` programs that sends token ids and runs `apr.reason` and `apr.solve`."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from sglang.lang.chat_template import get_chat_template
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

from sgl_apr.engine.base import Request, Result
from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.server_url import normalize_url
from sgl_apr.errors import AprError, EngineError
from sgl_apr.runtime.events import Delta, Event, OnEvent
from sgl_apr.runtime.frontend.engine_call import EngineCall, Reason
from sgl_apr.runtime.frontend.event_loop import EventLoopThread, wait_for
from sgl_apr.runtime.frontend.program_backend import ProgramBackend
from sgl_apr.runtime.frontend.program_engine import DecodeCall, ProgramEngine, resolve_future
from sgl_apr.runtime.frontend.program_requests import (
    PROGRAM_SAMPLING_PARAMS,
    check_no_images,
    trajectory_meta,
)
from sgl_apr.runtime.frontend.program_text import ProgramText
from sgl_apr.runtime.frontend.sglang_patch import patch_frontend
from sgl_apr.runtime.frontend.token_ledger import (
    TOKENS_VARIABLE,
    ProgramTokens,
    program_tokens,
)
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.causal_graph import context_layout
from sgl_apr.trajectory.trajectory import Trajectory

T = TypeVar("T")


class Endpoint(ProgramBackend):
    """A running SGLang server as the backend of `@sgl.function` programs.

    Everything that works on SGLang's own `RuntimeEndpoint` works here (gen, select, fork, roles, streaming, batches),
    and also `apr.reason` and `apr.solve`. A program sends the ids that it received, and does not encode its text
    again. If a program fails, reading its variables raises the error.

    Args:
        base_url: The server.
        api_key: Sent as a bearer token.
        verify: As in `RuntimeEndpoint`.
        chat_template_name: The name of a chat template of SGLang. None guesses it.
        tokenizer: As in `HttpEngine.connect`, also the following.
        timeout: The longest time, in seconds, between two chunks of a response.
        reconnect_timeout: How many seconds requests wait for a server that is down.

    Raises:
        EngineError: No server answers at `base_url`.
        UnsupportedEngine: The server cannot be used (see `HttpEngine.connect`).
    """

    raises_errors = True

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        timeout: float = 120.0,
        reconnect_timeout: float = 0.0,
    ) -> None:
        patch_frontend()
        base_url = normalize_url(base_url)
        # By program: what a native fork of the loop has to commit, and the results.
        self.pending_commits: dict[str, Request] = {}
        self.commit_results: dict[str, Result] = {}
        self._running: dict[str, Future[Any]] = {}
        self._loop = EventLoopThread("apr-endpoint")
        try:
            self.http = self._wait(
                HttpEngine.connect(
                    base_url,
                    api_key=api_key,
                    tokenizer=tokenizer,
                    timeout=timeout,
                    reconnect_timeout=reconnect_timeout,
                )
            )
            try:
                super().__init__(base_url, api_key, verify, chat_template_name)
            except (RuntimeError, OSError) as error:  # a router with --dp-aware reports no model
                self._wait(self.http.close())
                raise EngineError(f"{base_url} does not report its model: {error}") from error
        except BaseException:
            self._loop.close()
            raise
        # Who only names an endpoint as SGLang's default backend has no occasion to close it.
        self._close_unused = weakref.finalize(self, self._loop.close_soon, self.http.close)
        self._close_unused.atexit = False  # the connections end with the process
        # The runtime joins as text. SGLang's own concatenation posts to a route that no server has.
        self.support_concate_and_append = False
        # SGLang guesses the template from the model's path. The tags of the tokenizer are more reliable.
        guessed = chat_template_name is None and self.get_chat_template().name == "default"
        if guessed and self.tokenizer.special_token_id("<|im_start|>") is not None:
            self.chat_template = get_chat_template("chatml")

    def close(self) -> None:
        """Cancel running programs, abort their requests on the server, and close connections and threads.

        An endpoint that nothing refers to any more closes itself.
        """
        self._close_unused.detach()
        if self._loop.is_running:
            self._loop.close(self.http.close)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def cancel(self, state: ProgramState) -> None:
        """Stop a program. Its requests are aborted on the server, and reading the program raises an error."""
        if future := self._running.get(state.stream_executor.sid):
            future.cancel()

    # Called by SGLang's interpreter.

    def generate(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> tuple[Any, dict[str, Any]]:
        match sampling_params.dtype:
            case Reason() as expression:
                running = self._reason(s, self._options(s, expression, sampling_params), expression.on_event)
                return self._finish(s, self._wait(running, s), s.text_)
            case DecodeCall() as call:
                return self._branch(s, call)
            case EngineCall() as expression:
                result = self._wait(expression.run(ProgramEngine(self, s)), s)
                return result.answer, {**trajectory_meta(result.trajectory), "result": result}
        body = self._body(s, sampling_params)
        answer = self._wait(self._send(s, body, self.http.post), s)
        if isinstance(answer, list):  # n > 1: the program continues with the first one, as in SGLang
            self._record_answer(s, s.text_, answer[0])
            return [a["text"] for a in answer], answer[0]["meta_info"]
        self._record_answer(s, s.text_, answer)
        return answer["text"], answer["meta_info"]

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(sampling_params.dtype, Reason):
            yield from self._stream_reason(s, sampling_params.dtype, sampling_params)
            return
        if isinstance(sampling_params.dtype, EngineCall):
            yield self.generate(s, sampling_params)
            return
        chunks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

        async def forward(body: dict[str, Any]) -> None:
            async for chunk in self.http.events(body):
                chunks.put(chunk)

        body = self._body(s, sampling_params)
        future = self._start(self._send(s, body, forward), s, lambda: chunks.put(None))
        before, sent = s.text_, 0
        ids: list[int] = []
        while (chunk := chunks.get()) is not None:
            text, sent = chunk["text"][sent:], len(chunk["text"])
            ids = chunk["output_ids"] if len(chunk["output_ids"]) > len(ids) else [*ids, *chunk["output_ids"]]
            yield text, chunk["meta_info"]
        wait_for(future)
        self._record_answer(s, before, {"text": s.text_[len(before) :], "output_ids": ids})

    def check_may_wait(self) -> None:
        """Check that waiting for a program here would not stop the event loop that runs it."""
        self._loop.check_may_wait()

    def _branch(self, s: StreamExecutor, call: DecodeCall) -> tuple[str, dict[str, Any]]:
        """Run a gen inside a native fork: decode the request of the loop and return the result, or the error, to it."""
        try:
            result = self._decode_branch(s, call)
        except BaseException as error:
            self._loop.call_soon(resolve_future, call.done, None, error)
            return "", {}
        self._loop.call_soon(resolve_future, call.done, result, None)
        text = s.variables[TOKENS_VARIABLE].text[len(s.text_) :]
        return text, {"prompt_tokens": result.prompt_tokens, "cached_tokens": result.cached_tokens}

    def _decode_branch(self, s: StreamExecutor, call: DecodeCall) -> Result:
        """Decode the request of the loop in a native fork, and store the tokens of the branch with its variables."""
        tokens = program_tokens(s.text_, s.variables, self.tokenizer)
        context = call.request.input_ids
        if context[: len(tokens.ids)] == tokens.ids:
            s.text_ += self.tokenizer.decode(context[len(tokens.ids) :], tokens.ids)  # what the loop injected
        else:  # a branch with a context of its own
            s.text_ = self.tokenizer.decode(context)
        s.variables[TOKENS_VARIABLE] = ProgramTokens(s.text_, context)
        future = self._loop.submit(self.http.decode(call.request, call.on_tokens))
        # A branch that the loop has cancelled is aborted. The future of an ended loop is never awaited.
        self._loop.call_soon(
            call.done.add_done_callback, lambda done: future.cancel() if done.cancelled() else None
        )
        result = future.result()
        text = self.tokenizer.decode(result.token_ids, context)
        s.variables[TOKENS_VARIABLE] = ProgramTokens(s.text_ + text, (*context, *result.token_ids))
        return result

    def _reason(
        self, s: StreamExecutor, options: ReasonOptions, on_event: OnEvent | None
    ) -> Coroutine[Any, Any, Trajectory]:
        tokens = self._program_tokens(s)
        layout = tokens.layout if tokens.joined_layout else ()
        return run_with_options(ProgramEngine(self, s), tokens.ids, options, on_event, prompt_layout=layout)

    def _options(self, s: StreamExecutor, expression: Reason, params: SglSamplingParams) -> ReasonOptions:
        check_no_images(f"apr.reason({expression.name!r})", s.images_)
        return expression.resolve_options(
            self.tokenizer, {name: getattr(params, name) for name in PROGRAM_SAMPLING_PARAMS}
        )

    def _finish(self, s: StreamExecutor, trajectory: Trajectory, before: str) -> tuple[str, dict[str, Any]]:
        """Put the trace without the answer into the program, because SGLang appends the answer.

        Returns:
            The answer and its meta information.
        """
        trace, answer = trajectory.text, trajectory.answer
        layout = context_layout(trajectory) or ()
        s.variables[TOKENS_VARIABLE] = ProgramTokens(before + trace, trajectory.context_ids, layout)
        s.text_ = before + trace[: len(trace) - len(answer)]
        return answer, trajectory_meta(trajectory)

    def _stream_reason(
        self, s: StreamExecutor, expression: Reason, params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Stream an `apr.reason` expression.

        The text of the program grows as the trunk is written, and block by block where it forks. The variable streams
        the answer as it is written if the trunk cannot fork, else it gets the answer at the end. If an answer is
        retried after an error, the stream contains both.
        """
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        before, options = s.text_, self._options(s, expression, params)

        def on_event(event: Event) -> None:
            events.put(event)
            if expression.on_event:
                expression.on_event(event)

        future = self._start(self._reason(s, options, on_event), s, lambda: events.put(None))
        text = ProgramText(streams_answer=options.max_forks == 0)
        while (event := events.get()) is not None:
            s.text_, answer = text.feed(s.text_, event)
            if answer:
                yield answer, {}
            elif isinstance(event, Delta) and not event.path:
                s.stream_text_event.set()
        trajectory = wait_for(future)
        answer, meta = self._finish(s, trajectory, before)
        s.text_ += answer
        s.variables[expression.name] = answer
        yield "", meta

    def _start(self, work: Coroutine[Any, Any, T], s: StreamExecutor, then: Any) -> Future[T]:
        future = self._loop.submit(work)
        self._running[s.sid] = future
        future.add_done_callback(lambda _: (self._running.pop(s.sid, None), then()))
        return future

    def _wait(self, work: Coroutine[Any, Any, T], s: StreamExecutor | None = None) -> T:
        """Run `work` in the endpoint's event loop and return its result. Cancelling the program `s` cancels it."""
        try:
            self.check_may_wait()
        except AprError:
            work.close()
            raise
        return wait_for(self._start(work, s, lambda: None) if s else self._loop.submit(work))
