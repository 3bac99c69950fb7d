"""The fields of requests to OpenAI's routes that have `apr`: which are honoured, which do nothing, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.runtime.option_checks import GRAMMAR, NOT_AVAILABLE, ONE_REPLY, STOP, TOKEN_IDS
from sgl_apr.server.api.openai.request_fields import FieldTable

MEDIA = "a trajectory is made of text alone"
# Of /v1/responses and /v1/messages.
CLIENT_TOOLS = 'this route runs tools of the server only, "apr": {"tools": [...]}; send tools of the client to /v1/chat/completions'
ROUTING = "the requests of a trajectory are routed together, by its id"
SESSION = "a trajectory caches by its token ids, without sessions"
IDENTIFIERS = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "custom_labels",
)  # they change no reply
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
PROMPT_FIELDS = (
    "messages", "prompt", "input_ids", "chat_template_kwargs", "continue_final_message", "thinking", "task",
)  # fmt: skip
HONOURED = (
    "model", "apr", *PROMPT_FIELDS, "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "seed", "n", "stop", "stream",
    "stream_options", "response_format", "logprobs", "top_logprobs", "reasoning_effort", "reasoning",
    "separate_reasoning", "lora_path", "cache_salt", "extra_key", "priority", *TOOL_FIELDS, *IDENTIFIERS,
)  # fmt: skip
# Fields of which only some values can be had: those values, and why there are no others.
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "the server stores no responses"),
    "service_tier": (("auto", "default"), "the server has one tier; `priority` orders requests"),
    "modalities": ((["text"],), MEDIA),
    "verbosity": (("medium",), "the model decides how long its answer is"),
    "stream_reasoning": ((True,), "use apr={'separate_reasoning': false} to get one text"),
    "skip_special_tokens": ((False,), TOKEN_IDS),
    "prompt_cache_retention": (("in_memory",), "the cache of the server is in its memory"),
}
REFUSED: Mapping[str, str] = {
    "best_of": ONE_REPLY, "echo": ONE_REPLY, "suffix": ONE_REPLY,
    "session_id": SESSION, "session_params": SESSION,
    "functions": "use tools", "function_call": "use tool_choice",
    "regex": GRAMMAR, "ebnf": GRAMMAR, "json_schema": "use response_format",
    "custom_logit_processor": GRAMMAR, "custom_params": GRAMMAR, "watermark": GRAMMAR,
    "stop_token_ids": STOP, "stop_regex": STOP, "min_tokens": STOP, "ignore_eos": STOP, "no_stop_trim": STOP,
    "return_hidden_states": NOT_AVAILABLE, "return_routed_experts": NOT_AVAILABLE,
    "routed_experts_start_len": NOT_AVAILABLE, "return_cached_tokens_details": NOT_AVAILABLE,
    "return_spec_tokens_details": NOT_AVAILABLE, "return_meta_info": NOT_AVAILABLE,
    "return_sampling_mask": NOT_AVAILABLE, "sampling_logprobs_mode": NOT_AVAILABLE,
    "return_flat_raw_output_top_logprobs": NOT_AVAILABLE, "return_flat_raw_top_logprobs_b64": NOT_AVAILABLE,
    "return_token_ids": "use apr={'trajectory': true}", "return_prompt_token_ids": "use apr={'trajectory': true}",
    "return_input_ids_in_sglext": "use apr={'trajectory': true}",
    "return_output_ids_in_sglext": "use apr={'trajectory': true}",
    "rid": "a trajectory has request ids of its own", "prediction": "the model decodes every token",
    "web_search_options": "the server searches nothing", "audio": MEDIA,
    "max_dynamic_patch": MEDIA, "min_dynamic_patch": MEDIA, "use_audio_in_video": MEDIA, "images_config": MEDIA,
    "video_config": MEDIA, "mm_processor_kwargs": MEDIA,
    "bootstrap_host": ROUTING, "bootstrap_port": ROUTING, "bootstrap_room": ROUTING, "routed_dp_rank": ROUTING,
    "disagg_prefill_dp_rank": ROUTING, "data_parallel_rank": ROUTING,
}  # fmt: skip
OPENAI_FIELDS = FieldTable(HONOURED, ONLY, REFUSED)
