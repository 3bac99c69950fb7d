"""JSON schemas of a fork of a context: its request, its response and the events of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.formats.options import JOIN_POLICY_PATTERN
from sgl_apr.methods.fork_result import ForkResult, TaskResult
from sgl_apr.methods.fork_task import MAX_NAME_CHARS, MAX_STOP_CHARS, MAX_STOPS, MAX_TASKS, ForkTask, Merge
from sgl_apr.runtime.value_checks import SAMPLING_TYPES
from sgl_apr.server.api.fork.request import FORK_REQUEST_OPTIONS, MERGE_FIELDS, TASK_FIELDS
from sgl_apr.server.api.schema_parts import attribute_texts, describe, nullable, object_schema, reference

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1, "pattern": r"\S"}
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]},
}
RESPONSE_FORMAT: Schema = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object", "properties": {"schema": {"type": "object"}}, "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}  # fmt: skip
STOP: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        {
            "type": "array", "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        },
    ]
}  # fmt: skip
FIELD_SCHEMAS: Mapping[str, Schema] = {
    "prompt": {"anyOf": [TEXT, MESSAGES]},
    "messages": MESSAGES,
    "name": {"type": "string", "maxLength": MAX_NAME_CHARS},
    "response_format": RESPONSE_FORMAT,
    "tools": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"const": "all"}]},
    "tool_choice": {"type": "string"},
    "max_tokens": {"type": "integer", "minimum": 1},
    "stop": STOP,
    "join": {"type": "string", "enum": ["text", "kv"]},
}


def fork_components(
    options: Mapping[str, Schema], prompts: Mapping[str, Schema], stream: Schema
) -> dict[str, Schema]:
    """Return the schemas of requests, responses and events, by name.

    Args:
        options: The schemas of all options of a trajectory.
        prompts: Those of the fields that are the prompt, without messages.
        stream: That of the field `stream`.
    """
    fork_options = {name: options[name] for name in FORK_REQUEST_OPTIONS}
    all_prompts = {**prompts, "messages": MESSAGES}
    one_prompt = [{"required": [name], "properties": {name: schema}} for name, schema in all_prompts.items()]
    request = object_schema(
        {
            **{name: nullable(schema) for name, schema in all_prompts.items()},
            "tasks": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_TASKS,
                "items": {"anyOf": [TEXT, MESSAGES, _fields(TASK_FIELDS, ForkTask, options)]},
            },
            "merge": nullable({"anyOf": [TEXT, MESSAGES, _fields(MERGE_FIELDS, Merge, options)]}),
            "policy": nullable({"type": "string", "pattern": f"^(?:{JOIN_POLICY_PATTERN.pattern})$"}),
            "stream": stream,
            "tools": nullable(describe(FIELD_SCHEMAS["tools"], 'Names of the operator\'s tools, or "all"')),
            "tool_choice": nullable(FIELD_SCHEMAS["tool_choice"]),
            "parallel_tool_calls": nullable({"type": "boolean"}),
            **fork_options,
        }
    )
    result = _result_properties()
    event = {name: schema for name, schema in result.items() if name != "trajectory"}
    last_event = object_schema({"event": {"type": "string", "const": "fork_result"}, **event}, required=True)
    return {
        "AprForkRequest": {**request, "required": ["tasks"], "oneOf": one_prompt},
        "AprTaskResult": _task_result(),
        "AprForkResult": object_schema(result, required=True),
        "AprForkEvent": {"anyOf": [reference("Event"), last_event]},
    }


def _fields(names: tuple[str, ...], kind: type, options: Mapping[str, Schema]) -> Schema:
    """The schema of a task or merge that is an object."""
    texts = attribute_texts(kind)
    schemas = {**FIELD_SCHEMAS, "budget": options["budget"], "sampling": options["sampling"]}
    properties = {name: describe(nullable(schemas[name]), texts.get(name, "")) for name in names}
    properties |= {name: options[name] for name in SAMPLING_TYPES}
    one_prompt = [
        {"required": [name], "properties": {name: FIELD_SCHEMAS[name]}} for name in ("prompt", "messages")
    ]
    return {**object_schema(properties), "oneOf": one_prompt}


def _result_properties() -> dict[str, Schema]:
    texts = attribute_texts(ForkResult)
    return {
        "results": describe({"type": "array", "items": reference("TaskResult")}, texts["results"]),
        "merge": describe(nullable(reference("TaskResult")), texts["merge"]),
        "answer": {"type": "string"},
        "shared_tokens": describe({"type": "integer", "minimum": 0}, texts["shared_tokens"]),
        "usage": _usage(),
        "trajectory": describe(reference("Trajectory"), texts["trajectory"]),
    }


def _task_result() -> Schema:
    texts = attribute_texts(TaskResult)
    properties: dict[str, Schema] = {
        "name": {"type": "string"},
        "text": {"type": "string"},
        "finish": {"type": "string"},
        "usage": _usage(),
        "tool_calls": {"type": "array", "items": reference("ToolCall")},
        "path": {"type": "array", "items": {"type": "integer"}},
    }
    described = {name: describe(schema, texts[name]) for name, schema in properties.items()}
    return object_schema({**described, "outcome": {"type": "string"}}, required=True)


def _usage() -> Schema:
    count: Schema = {"type": "integer", "minimum": 0}
    names = {"prompt_tokens": count, "cached_tokens": nullable(count), "output_tokens": count}
    return object_schema(names, required=True)
