"""An engine that uses an SGLang TokenizerManager in this process: that of the server itself, or of an `sgl.Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput

from sgl_apr.engine.base import Load, Request, Result, TokenSink
from sgl_apr.engine.chat_template import content_format, encode_by_template, normalized_messages
from sgl_apr.engine.logprobs import CollectedLogprobs, logprob_fields
from sgl_apr.engine.routing import dp_rank, routing_key
from sgl_apr.engine.server_requests import request_ids
from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.engine.sglang_request import (
    LOAD_FIELDS,
    check_chunk,
    check_finished,
    make_result,
    new_token_ids,
    stream_interval,
    sum_loads,
    with_layout,
)
from sgl_apr.engine.step_timer import StepTimer
from sgl_apr.engine.worker_group import GROUP_SETTINGS, WorkerGroupEngine, group_kinds
from sgl_apr.errors import AprError, EngineError, EngineTimeout, UnsupportedEngine
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
log = logging.getLogger(__name__)
NAME = "the engine"  # in messages


class InProcessEngine(WorkerGroupEngine):
    """An engine on a TokenizerManager of SGLang. It belongs to the event loop that the manager runs in.

    Args:
        manager: The TokenizerManager.
        tokenizer: The model's tokenizer. None loads it from the path that the manager names.
        timeout: The longest time, in seconds, between two chunks of a response.

    Raises:
        UnsupportedEngine: The grammar backend is neither llguidance nor xgrammar, or the tokenizer cannot be loaded.
    """

    def __init__(self, manager: Any, *, tokenizer: Tokenizer | None = None, timeout: float = 120.0) -> None:
        self.manager, self._timeout, self._step_timer = manager, timeout, StepTimer()
        self._active_rids: set[str] = set()
        backend = manager.config_value("grammar_backend")
        if backend not in get_args(GrammarBackend):
            raise UnsupportedEngine(
                f"the engine runs grammar_backend={backend!r}, expected {' or '.join(get_args(GrammarBackend))}"
            )
        self.grammar_backend: GrammarBackend = backend
        self.supports_seeds = bool(manager.config_value("enable_deterministic_inference"))
        self._ranks = int(manager.config_value("dp_size")) * int(manager.config_value("attn_dp_size"))
        self.resumes_grammar = True
        self.joins_kv = manager.config_value("radix_cache_backend") == RADIX_CACHE_BACKEND
        self.groups = group_kinds({name: manager.config_value(name) for name in GROUP_SETTINGS})
        self.default_interval = stream_interval(manager.config_value("stream_interval"))
        self.tool_call_parser = manager.config_value("tool_call_parser") or None
        self.context: int | None = int(manager.model_config.context_len)
        self.vocab_size = int(manager.model_config.vocab_size)
        self._tokenizer = tokenizer or load_tokenizer(str(manager.config_value("tokenizer_path")))

    async def abort(self, rid: str) -> None:
        for active in [r for r in self._active_rids if r.startswith(rid)]:
            try:
                self.manager.abort_request(rid=active)
            except Exception:  # the socket to a scheduler that is gone
                log.warning("%s could not be aborted", active, exc_info=True)

    async def load(self) -> Load:
        self._check_loop()
        ranks = await self.manager.get_loads()
        if not ranks:
            raise EngineError("the engine does not report its load yet")
        return sum_loads(
            [{name: getattr(rank, name) for name in LOAD_FIELDS} for rank in ranks], self._step_timer.steps
        )

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of chat messages, rendered by the template of the model's tokenizer.

        Args:
            messages: The messages in OpenAI's form.
            tools: The tools in OpenAI's form.

        Raises:
            UnsupportedEngine: The model has no chat template.
            AprError: The template refuses the messages.
        """
        tokenizer = self.manager.tokenizer
        template = getattr(tokenizer, "chat_template", None)
        apply_template = None
        if template:
            apply_template = tokenizer.apply_chat_template
            messages = normalized_messages(messages, content_format(str(template)))
        defaults = self.manager.config_value("default_chat_template_kwargs") or {}
        return await encode_by_template(
            self._tokenizer,
            apply_template,
            messages,
            tools,
            engine_name="the model",
            template_options=defaults,
        )

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of chat messages, up to where the reply begins. Spellings of tags in them become tags.

        Raises:
            UnsupportedEngine: The model has no chat template.
            AprError: The template refuses the messages.
        """
        tokenizer = self.manager.tokenizer
        if not (template := getattr(tokenizer, "chat_template", None)):
            raise UnsupportedEngine("the model has no chat template, expected one to answer a conversation")
        shown = normalized_messages(messages, content_format(str(template)))
        defaults = self.manager.config_value("default_chat_template_kwargs") or {}
        options = {**defaults, "tokenize": False, "add_generation_prompt": True}
        try:
            return str(tokenizer.apply_chat_template(shown, **options))
        except Exception as error:  # of the template, which is a program
            raise AprError(f"the chat messages cannot be rendered: {error}") from error

    async def _generate(
        self, request: Request, sampling: Mapping[str, Any], on_tokens: TokenSink | None
    ) -> Result:
        self._check_loop()
        received, logprobs = list[int](), CollectedLogprobs(NAME, request.on_top_logprobs)
        meta: dict[str, Any] = {}
        at = 0.0
        body = {
            **request.fields,
            "rid": request.rid,
            "input_ids": list(request.input_ids),
            "sampling_params": with_layout(sampling, request.layout),
            **logprob_fields(request),
        }
        async with contextlib.aclosing(self._chunks(body)) as chunks:
            async for data in chunks:
                meta = check_chunk(NAME, data)
                new = new_token_ids(NAME, data, len(received), self.vocab_size)
                logprobs.add(meta)
                if new:
                    now = time.monotonic()
                    if received:
                        self._step_timer.record_step(len(new), now - at)
                    at = now
                    received += new
                    if on_tokens:
                        on_tokens(new)
        check_finished(NAME, meta)
        return make_result(NAME, received, logprobs, meta, request)

    def _group_chunks(self, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        self._check_loop()
        return self._chunks(body)

    def _response_limits(self) -> tuple[str, int]:
        return NAME, self.vocab_size

    async def _chunks(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what the manager yields for a request or a batch. Closing the generator early aborts it."""
        rids = request_ids(body)
        self._active_rids.update(rids)
        rank = dp_rank(routing_key(rids[0]), self._ranks) if self._ranks > 1 else None
        try:
            manager_request = GenerateReqInput(**{"routed_dp_rank": rank, **body}, stream=True)
            now = asyncio.get_running_loop().time
            async with (
                asyncio.timeout(self._timeout) as silence,
                contextlib.aclosing(self.manager.generate_request(manager_request)) as chunks,
            ):
                with self._step_timer.running(len(rids)):
                    async for data in chunks:
                        silence.reschedule(now() + self._timeout)
                        yield data
        except TimeoutError as error:
            raise EngineTimeout(f"the engine did not answer within {self._timeout:g} s") from error
        except HTTPException as error:
            raise EngineError(
                f"the engine answered {error.status_code}: {error.detail}", error.status_code
            ) from error
        except (ValueError, TypeError) as error:  # SGLang's own checks of the request
            raise EngineError(f"the engine rejected the request: {error}", 400) from error
        except Exception as error:
            raise EngineError(f"the engine failed: {error!r}", 500) from error
        finally:
            self._active_rids.difference_update(rids)

    def _check_loop(self) -> None:
        """Check the event loop: SGLang's sockets belong to the first one, and calls in another one never return."""
        loop = self.manager.event_loop
        if loop is not None and loop is not asyncio.get_running_loop():
            raise UnsupportedEngine(
                "this sgl.Engine was first used in another event loop: await in that loop, "
                "or use only `LocalEngine.run` and `LocalEngine.wait`"
            )
