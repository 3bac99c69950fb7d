"""Checks the JSON of a body before SGLang reads it: its size, its prompts, and what would multiply them.

These checks read fields by name, whatever the route. They need neither the engine nor a tokenizer, so that a body that
is too large costs no more than its parse. `request_checks` then checks the values of a request to the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from sgl_apr.runtime.value_checks import shorten, unknown_name
from sgl_apr.server.guard.json_counter import MEDIA_FIELDS, JsonCounter
from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.refusal import RequestRefused, over_limit
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM

# Fields of which each entry is a prompt, over all routes of SGLang and ours.
BATCH_FIELDS = (
    "text",
    "prompt",
    "input",
    "input_ids",
    "items",
    "documents",
    "instances",
    "tokens",
    "questions",
)
# Fields whose text makes up one prompt together.
CHAT_FIELDS = ("messages", "tools", "system", "instructions", "input")
# Objects in which a route has sampling parameters: SGLang's, Vertex AI's, Ollama's.
SAMPLING_OBJECTS = ("sampling_params", "parameters", "options", "sampling")
COUNT_FIELDS = ("n", "best_of", "beam_width")
GRAMMAR_FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")
# SGLang sets these itself. A client that sets them would go past checks, `stop_regex`'s among them.
INTERNAL_FIELDS = ("is_normalized", "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len")
MAX_STOP_IDS = 4096
MAX_CUSTOM_BYTES = 65_536  # of custom_params as JSON, without the layout of a join
MAX_TOKEN_ID = 2**31 - 1
ID_FIELDS = ("rid", "request_id")
HEALTH_CHECK_PREFIX = "HEALTH_CHECK"  # SGLang's scheduler answers such requests only while it is idle
CLOSE_SESSION_FIELDS = {"session_id", *ID_FIELDS, "http_worker_ipc"}
OFF_LOOP_TOKENS = (
    4  # how many prompts' tokens one request may have in all, in contexts of the model, per prompt
)


def check_json(body: Any, limits: GuardLimits, size: ModelSize) -> int:
    """Check the parsed body of a request.

    Returns:
        The number of entries of all of its lists.

    Raises:
        RequestRefused: The body is above a limit, or has a field that the operator does not allow.
    """
    if not isinstance(body, dict):
        return len(body) if isinstance(body, list) else 0
    max_chars = limits.prompt_chars or size.prompt_chars
    walk = JsonCounter(limits)
    chat_chars = 0
    for name, value in body.items():
        walk.count_key(name)
        if not isinstance(value, str | list | dict) or name in MEDIA_FIELDS:
            walk.count_values(value, 2)
            continue
        walk.chars = walk.longest = 0
        walk.count_values(value, 2)
        _check_length(name, walk.longest, max_chars)
        if name in CHAT_FIELDS and _is_chat(value):
            chat_chars += walk.chars
            _check_length(name, chat_chars, max_chars)
    _check_prompts(body, limits, size)
    _check_messages(body, limits)
    if body.get("input_embeds") is not None and not size.allows_embeds:
        raise RequestRefused(
            "input_embeds is set, expected a server with --disable-radix-cache", "input_embeds"
        )
    _check_names(body, size)
    _check_ids_of_requests(body)
    _check_sessions(body, limits)
    for sampling in sampling_objects(body):
        check_sampling_fields(sampling, limits)
    return walk.entries


def _is_chat(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))


def sampling_objects(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the body and all objects in it that a route reads sampling parameters from."""
    found = [body]
    for name in SAMPLING_OBJECTS:
        value = body.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                found.append(entry)
                if name == "parameters":
                    found.extend(sampling_objects(entry)[1:])
    return found


def check_sampling_fields(sampling: Mapping[str, Any], limits: GuardLimits) -> None:
    """Check the fields that multiply a request, and those whose cost the client chooses.

    Raises:
        RequestRefused: A field is above a limit or not allowed.
    """
    for name in COUNT_FIELDS:
        value = sampling.get(name)
        if isinstance(value, int | float) and value > limits.n:
            raise over_limit(name, value, "--apr-max-n", limits.n, name)
    if sampling.get("stop_regex") and not limits.stop_regex:
        raise RequestRefused(
            "stop_regex is not allowed on this server, expected none (--apr-allow-stop-regex)", "stop_regex"
        )
    for name in INTERNAL_FIELDS:
        if name in sampling:
            raise RequestRefused(f"{name} is set by the server, expected a request without it", name)
    for name in GRAMMAR_FIELDS:
        value = sampling.get(name)
        if isinstance(value, str) and len(value) > limits.grammar_chars:
            raise over_limit(
                f"{name}'s length", len(value), "--apr-max-grammar-chars", limits.grammar_chars, name
            )

    ids = sampling.get("stop_token_ids")
    if isinstance(ids, list) and len(ids) > MAX_STOP_IDS:
        raise RequestRefused(
            f"stop_token_ids has {len(ids)} entries, expected at most {MAX_STOP_IDS}", "stop_token_ids"
        )
    custom = sampling.get("custom_params")
    if isinstance(custom, dict):  # the layout has limits of its own
        custom = {name: value for name, value in custom.items() if name != LAYOUT_PARAM}
    if custom and (size := json_bytes(custom)) > MAX_CUSTOM_BYTES:
        raise RequestRefused(
            f"custom_params has {size} bytes of JSON, expected at most {MAX_CUSTOM_BYTES}", "custom_params"
        )


def json_bytes(value: Any) -> int:
    """Return how many bytes a value has as JSON."""
    try:
        return len(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
    except TypeError:  # of a caller in this process
        return len(repr(value))


def _check_prompts(body: Mapping[str, Any], limits: GuardLimits, size: ModelSize) -> None:
    counts = [
        value
        for sampling in sampling_objects(body)
        for name in COUNT_FIELDS
        if isinstance(value := sampling.get(name), int | float)
    ]
    copies = max([1, *counts])
    for name in BATCH_FIELDS:
        value = body.get(name)
        if not isinstance(value, list) or not value or (name == "input" and _is_chat(value)):
            continue
        nested = isinstance(value[0], list | str | dict)
        if name != "tokens":  # which are decoded, not prompts
            _check_ids(name, value if nested else [value], size)
        if nested and len(value) * copies > limits.prompts:
            found = f"{len(value)} x n={copies:g}" if copies > 1 else len(value)
            raise over_limit(f"the number of entries of {name}", found, "--apr-max-prompts", limits.prompts, name)  # fmt: skip


def _check_messages(body: Mapping[str, Any], limits: GuardLimits) -> None:
    """Refuse long lists of messages, because SGLang tries each of them as every kind of message."""
    for name in ("messages", "input"):
        value = body.get(name)
        if isinstance(value, list) and (name == "messages" or _is_chat(value)):
            contents = [entry.get("content") for entry in value if isinstance(entry, dict)]
            count = len(value) + sum(len(content) for content in contents if isinstance(content, list))
            if count > limits.messages:
                raise over_limit(
                    f"the number of {name} and their parts",
                    count,
                    "--apr-max-messages",
                    limits.messages,
                    name,
                )


def _check_names(body: Mapping[str, Any], size: ModelSize) -> None:
    """Refuse names that SGLang looks up without a check, and answers with status 500."""
    for name, known in size.choices.items():
        value = body.get(name)
        if isinstance(value, str) and value not in known:
            raise RequestRefused(
                f"{name} is {shorten(value)}, expected one of {', '.join(sorted(known))}", name
            )
    parameters = body.get("parameters")
    if size.request_fields and "instances" in body and isinstance(parameters, dict):
        for name in parameters:
            if name not in size.request_fields:
                raise RequestRefused(unknown_name(name, size.request_fields, "parameter "), "parameters")
    tokens = body.get("tokens")
    if isinstance(tokens, list):
        for ids in tokens if tokens and isinstance(tokens[0], list) else [tokens]:
            check_token_ids("tokens", ids, MAX_TOKEN_ID + 1)


def _check_ids_of_requests(body: Mapping[str, Any]) -> None:
    """Refuse the ids of SGLang's own health checks, because such a request is dropped and never answered."""
    parameters = body.get("parameters")
    for fields in (body, parameters if isinstance(parameters, dict) else {}):
        for name in ID_FIELDS:
            value = fields.get(name)
            for rid in value if isinstance(value, list) else [value]:
                if isinstance(rid, str) and rid.startswith(HEALTH_CHECK_PREFIX):
                    raise RequestRefused(
                        f"{name} is {shorten(rid)}, expected one that does not begin with {HEALTH_CHECK_PREFIX}", name
                    )  # fmt: skip


def _check_sessions(body: Mapping[str, Any], limits: GuardLimits) -> None:
    """Refuse the bodies of `/open_session` and `/close_session`, which have no other fields."""
    if "capacity_of_str_len" in body or ("session_id" in body and body.keys() <= CLOSE_SESSION_FIELDS):
        check_session_allowed("session_id", limits)
    if body.get("session_params") is not None:
        check_session_allowed("session_params", limits)


def check_session_allowed(name: str, limits: GuardLimits) -> None:
    """Check that the operator allows sessions.

    Raises:
        RequestRefused: They are not allowed.
    """
    if not limits.sessions:
        raise RequestRefused(
            "sessions are not allowed on this server, expected a request without a session (--apr-allow-sessions)", name
        )  # fmt: skip


def check_token_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Check that all ids are in the vocabulary.

    Raises:
        RequestRefused: One is not.
    """
    if not isinstance(ids, Sequence) or not len(ids):
        return
    try:
        is_valid = min(ids) >= 0 and max(ids) < vocab_size
    except TypeError:
        is_valid = False
    if not is_valid:
        wrong = next((i for i in ids if not isinstance(i, int) or not 0 <= i < vocab_size), ids)
        raise RequestRefused(
            f"{name} has {shorten(wrong)}, expected token ids from 0 to {vocab_size - 1}", name
        )


def _check_ids(name: str, prompts: Iterable[Any], size: ModelSize) -> None:
    """Refuse a prompt of more token ids than the context has, before anything reads the ids one by one."""
    for prompt in prompts:
        if isinstance(prompt, list) and len(prompt) > size.context_length:
            raise RequestRefused(
                f"{name} has {len(prompt)} tokens, expected at most {size.context_length}, the context of the model", name
            )  # fmt: skip


def _check_length(name: str, chars: int, max_chars: int) -> None:
    if chars > max_chars:
        raise over_limit(f"the number of characters of {name}", chars, "--apr-max-prompt-chars", max_chars, name)  # fmt: skip


def chat_text(body: Mapping[str, Any]) -> str:
    """Return all text of the fields that make up the prompt of a chat."""
    return "\n".join(text for name in CHAT_FIELDS for text in _texts(body.get(name)))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, dict):
        for name, entry in value.items():
            if name not in MEDIA_FIELDS:
                yield from _texts(entry)
