"""The requests of a program's own expressions: gens, selections and the commits of forks, in token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from sgl_apr.engine.base import Request, Result
from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.routing import ROUTING_KEY_FIELD
from sgl_apr.runtime.frontend.joined_requests import body_with_layout, continues_joins, send_joined
from sgl_apr.runtime.frontend.program_requests import (
    gen_body,
    image_prompt,
    new_rid,
    program_routing_key,
    with_ids,
)
from sgl_apr.runtime.frontend.token_ledger import (
    TOKENS_VARIABLE,
    ProgramTokens,
    program_tokens,
    stored_tokens,
)
from sgl_apr.runtime.prompts import encode_text
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout

T = TypeVar("T")


class ProgramBackend(ABC, RuntimeEndpoint):  # type: ignore[misc]  # SGLang has no types
    """Sends the requests of programs through an `HttpEngine`.

    Attributes:
        http: The connection to the server.
        pending_commits: What a native fork of the loop has to commit, by program.
        commit_results: The results of these commits, by program.
    """

    http: HttpEngine
    pending_commits: dict[str, Request]
    commit_results: dict[str, Result]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the served model."""
        return self.http.tokenizer

    @abstractmethod
    def _wait(self, work: Coroutine[Any, Any, T], s: StreamExecutor | None = None) -> T:
        """Run work in an event loop and return its result. Cancelling the program `s` cancels it."""

    # Called by SGLang's interpreter.

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        pending = self.pending_commits.get(s.sid)
        if s.images_ and not pending:
            body = image_prompt(s.text_, s.images_) | {"sampling_params": {"max_new_tokens": 0}}
            self._wait(self.http.post(self._routed(s, body)), s)
            return
        if pending:
            self.commit_results[s.sid] = self._wait(self.http.commit(pending), s)
            return
        tokens, fields = self._program_tokens(s), {ROUTING_KEY_FIELD: self.route(s)}

        def commit(layout: Layout | None) -> Coroutine[Any, Any, Result]:
            return self.http.commit(Request(new_rid(), tokens.ids, layout=layout, fields=fields))

        self._wait(send_joined(self.http, tokens, self.route(s), commit), s)

    def cache_prefix(self, prefix_str: str) -> None:
        ids = encode_text(self.tokenizer, prefix_str)
        self._wait(self.http.commit(Request(new_rid(), ids)))

    def select(
        self, s: StreamExecutor, choices: list[str], temperature: float, choices_method: ChoicesSamplingMethod
    ) -> ChoicesDecision:
        decision = super().select(s, choices, temperature, choices_method)
        if not s.images_:  # the ids that were scored, which the cache has
            s.variables[TOKENS_VARIABLE] = self._tokens(s, s.text_ + decision.decision)
        return decision

    def _generate_http_request(self, s: StreamExecutor, data: dict[str, Any]) -> Any:
        """Send a request of `select`, with token ids in place of text."""
        if s.images_:
            data = image_prompt(s.text_, s.images_) | data
        else:
            data = with_ids(data, lambda text: self._tokens(s, text).ids)
        return self._wait(self.http.post(self._routed(s, data)), s)

    def prepare_fork(self, s: StreamExecutor) -> None:
        """Give a program the variables that its forks share.

        SGLang copies variables to forks. What only the forks have becomes a list when `join` gathers variables.
        """
        self.route(s)
        s.variables.setdefault(TOKENS_VARIABLE, ProgramTokens())

    def route(self, s: StreamExecutor) -> str:
        """Return the routing key that keeps a program and its forks on one replica. Forks copy it as a variable."""
        return program_routing_key(s.variables)

    def _routed(self, s: StreamExecutor, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, ROUTING_KEY_FIELD: self.route(s)}

    def _tokens(self, s: StreamExecutor, text: str) -> ProgramTokens:
        """Return the tokens of a text that continues the program, and store nothing."""
        return stored_tokens(s.variables).extended_to(text, self.tokenizer)

    def _program_tokens(self, s: StreamExecutor) -> ProgramTokens:
        return program_tokens(s.text_, s.variables, self.tokenizer)

    def _record_answer(self, s: StreamExecutor, before: str, answer: dict[str, Any]) -> None:
        """Add the tokens of an answer to the program. SGLang appends its text afterwards."""
        if s.images_:  # the server has encoded the prompt
            return
        tokens = program_tokens(before, s.variables, self.tokenizer)
        s.variables[TOKENS_VARIABLE] = tokens.with_decoded(
            answer["text"], answer["output_ids"], self.tokenizer
        )

    def _body(self, s: StreamExecutor, params: SglSamplingParams) -> dict[str, Any]:
        self._handle_dtype_to_regex(params)
        prompt = (
            image_prompt(s.text_, s.images_)
            if s.images_
            else {"input_ids": list(self._program_tokens(s).ids)}
        )
        return gen_body(prompt, params, self.route(s))

    def _send(
        self,
        s: StreamExecutor,
        body: dict[str, Any],
        send: Callable[[dict[str, Any]], Coroutine[Any, Any, T]],
    ) -> Coroutine[Any, Any, T]:
        """Send the request of a gen. It continues what the program has joined in the KV cache, where it can."""
        if s.images_ or not continues_joins(body):
            return send(body)
        tokens = self._program_tokens(s)
        return send_joined(
            self.http, tokens, self.route(s), lambda layout: send(body_with_layout(body, layout))
        )
