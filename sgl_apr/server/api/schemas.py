"""JSON schemas of our requests and responses for `/openapi.json`, made of the tables by which they are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from sgl_apr.formats.dialects import dialect_names
from sgl_apr.formats.options import JOIN_POLICY_PATTERN, FormatOptions
from sgl_apr.runtime.branch_scoring import BranchScoring
from sgl_apr.runtime.event_json import EVENT_TYPES
from sgl_apr.runtime.option_checks import (
    CHOICES,
    MAX_TOP_LOGPROBS,
    OBJECT_TYPES,
    OPTION_TYPES,
    REQUEST_FIELD_TYPES,
)
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.value_checks import (
    MAX_LOGIT_BIAS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
    MIN_TOP_P,
    SAMPLING_TYPES,
    number_types,
)
from sgl_apr.server.api.fork.request import FORK_REQUEST_OPTIONS
from sgl_apr.server.api.fork.schemas import fork_components
from sgl_apr.server.api.method.schemas import method_schemas
from sgl_apr.server.api.openai.response_options import STREAMS, ResponseOptions
from sgl_apr.server.api.options import MAX_ATTEMPTS
from sgl_apr.server.api.schema_parts import (
    REFERENCE,
    Schema,
    attribute_texts,
    describe,
    nullable,
    object_schema,
    reference,
)
from sgl_apr.server.api.tools.request import ALL_TOOLS
from sgl_apr.server.api.worker_group import GROUP_FIELD, group_schema
from sgl_apr.trajectory.trajectory import SCHEMA, Trajectory

METHOD_REQUEST = "ChatCompletionRequest"  # the one that a method may answer
OPENAI_REQUESTS = (
    "ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest",
)  # fmt: skip
JSON_TYPES: Mapping[type, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    float: {"type": "number"},
    bool: {"type": "boolean"},
}
SAMPLING_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, MAX_TEMPERATURE), "top_p": (MIN_TOP_P, 1), "top_k": (-1, MAX_TOP_K), "min_p": (0, 1),
    "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2), "repetition_penalty": (MIN_REPETITION_PENALTY, 2),
}  # fmt: skip
# By object and field: what the constructors of these objects check.
NUMBER_BOUNDS: Mapping[str, Mapping[str, Schema]] = {
    "budget": {
        "tokens": {"minimum": 1}, "critical_tokens": {"minimum": 1}, "branch_tokens": {"minimum": 1},
        "width": {"minimum": 2}, "depth": {"minimum": 1}, "blocks": {"minimum": 0}, "calls": {"minimum": 1},
        "outline_chars": {"minimum": 1}, "seconds": {"exclusiveMinimum": 0},
        "tool_calls": {"minimum": 0}, "tool_seconds": {"exclusiveMinimum": 0}, "tool_result_tokens": {"minimum": 1},
        "reserve": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    },
    "pacing": {
        "min_speedup": {"minimum": 1}, "expected_fill": {"exclusiveMinimum": 0, "maximum": 1},
        "max_parallel": {"minimum": 1},
    },
    "retry": {
        "attempts": {"minimum": 1, "maximum": MAX_ATTEMPTS}, "wait": {"minimum": 0}, "max_wait": {"minimum": 0},
    },
}  # fmt: skip


def option_schemas() -> dict[str, Schema]:
    """Return the schema of every option of a trajectory, by name. Each may also be null, which counts as absent."""
    texts = attribute_texts(ReasonOptions)
    schemas: dict[str, Schema] = {"dialect": {"type": "string", "enum": dialect_names()}}
    schemas |= {n: _numbers_schema(n, kind) for n, kind in OBJECT_TYPES.items() if kind is not BranchScoring}
    schemas["scoring"] = _scoring_schema()
    schemas["sampling"] = object_schema(
        {name: nullable(schema) for name, schema in _sampling_schemas().items()}
    )
    for name, kind in {**OPTION_TYPES, **REQUEST_FIELD_TYPES}.items():
        schemas[name] = dict(JSON_TYPES[kind])
        if name in CHOICES:
            schemas[name]["enum"] = list(CHOICES[name])
    for name in ("min_blocks", "max_blocks"):
        schemas[name]["minimum"] = 0
    schemas["min_width"]["minimum"] = 1
    schemas["top_logprobs"] |= {"minimum": 0, "maximum": MAX_TOP_LOGPROBS}
    schemas["policy"]["pattern"] = f"^(?:{JOIN_POLICY_PATTERN.pattern})$"
    schemas["tool_call_parser"] = {"type": "string"}
    schemas |= _sampling_schemas()
    return {name: describe(nullable(schema), texts.get(name, "")) for name, schema in schemas.items()}


def add_components(openapi: Schema) -> Schema:
    """Add our schemas to an OpenAPI document, and the property `apr` to those of OpenAI's requests. Returns it."""
    components = openapi.setdefault("components", {}).setdefault("schemas", {})
    components |= _components()
    for name in OPENAI_REQUESTS:
        if name in components:
            kinds = [reference("Options"), {"type": "boolean", "const": False}, {"type": "null"}]
            if name == METHOD_REQUEST:
                kinds.append(reference("MethodOptions"))
            components[name]["properties"]["apr"] = {"anyOf": kinds}
    return openapi


def describe_openapi(app: Any) -> None:
    """Make the OpenAPI document of an application include our schemas."""
    stock: Callable[[], Schema] = app.openapi

    def openapi() -> Schema:
        return stock() if app.openapi_schema else add_components(stock())

    app.openapi = openapi


def json_body(name: str) -> Schema:
    """Return the OpenAPI description of a route's body, by the name of its schema without `Apr`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference(name)}}}}


def json_responses(name: str, *, events: str | None = None) -> dict[int | str, Schema]:
    """Return the OpenAPI description of a route's responses.

    Args:
        name: The name of the schema of its JSON response, without `Apr`.
        events: The same of its server-sent events.
    """
    content: Schema = {"application/json": {"schema": reference(name)}}
    if events:
        content["text/event-stream"] = {"itemSchema": reference(events)}
    error = {"content": {"application/json": {"schema": reference("Error")}}}
    return {
        200: {"description": "Successful response", "content": content},
        "4XX": {"description": "The client can change the request so that it succeeds", **error},
        "5XX": {"description": "The server is busy (503, with Retry-After) or the engine failed", **error},
    }


def _components() -> dict[str, Schema]:
    options = option_schemas()
    response_options = attribute_texts(ResponseOptions)
    tool_names = describe(
        {"anyOf": [{"const": ALL_TOOLS}, {"type": "array", "items": {"type": "string"}}]},
        "Tools that this server runs, by their names, or all of them. GET /apr/tools lists them",
    )
    openai_options = {
        "stream": describe(
            {"type": "string", "enum": list(STREAMS)},
            "What a stream has: the deltas of the content, or all sequences, tagged by their paths",
        ),
        "separate_reasoning": describe({"type": "boolean"}, response_options["separate_reasoning"]),
        "trajectory": describe({"type": "boolean"}, response_options["include_trajectory"]),
    }
    method_options = {n: s for n, s in options.items() if n in FORK_REQUEST_OPTIONS} | openai_options
    openai_options |= {"tools": tool_names}
    openai_options = {name: nullable(schema) for name, schema in openai_options.items()}
    tool_options = {
        "tools": tool_names,
        "tool_choice": describe(
            {"type": "string", "minLength": 1}, "auto, none, required, or the name of a tool"
        ),
        "parallel_tool_calls": describe({"type": "boolean"}, "Let a sequence call several tools at once"),
    }
    tool_options = {name: nullable(schema) for name, schema in tool_options.items()}
    prompts: dict[str, Schema] = {
        "prompt": {"type": "string", "minLength": 1},
        "input_ids": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            "minItems": 1,
        },
    }
    single_prompts = prompts
    one_prompt = [{"required": [name], "properties": {name: schema}} for name, schema in prompts.items()]
    prompts = {name: nullable(schema) for name, schema in prompts.items()}
    stream = nullable(describe({"type": "boolean"}, "Send events while the trajectory is written"))
    trajectory, nested = _dataclass_schema(Trajectory)
    trajectory["properties"] = {"schema": {"type": "string", "const": SCHEMA}, **trajectory["properties"]}
    trajectory["required"] = ["schema", *trajectory["required"]]
    events = []
    for name, kind in EVENT_TYPES.items():
        event, more = _dataclass_schema(kind)
        event["properties"] = {"event": {"type": "string", "const": name}, **event["properties"]}
        event["required"] = ["event", *event.get("required", [])]
        events.append(event)
        nested |= more
    return {
        **nested,
        "AprOptions": object_schema(options | openai_options),
        "AprMethodOptions": object_schema(method_options | method_schemas()) | {"required": ["method"]},
        "AprGenerateRequest": {
            **object_schema(
                prompts | options | tool_options | {"stream": stream, GROUP_FIELD: group_schema()}
            ),
            "oneOf": one_prompt,
        },
        "AprTrajectory": trajectory,
        "AprEvent": {"oneOf": events},
        **fork_components(options, single_prompts, stream),
        "AprDialects": _dialects_schema(),
        "AprTools": _tools_schema(),
        "AprStats": _stats_schema(),
        "AprError": _error_schema(),
    }


def _sampling_schemas() -> dict[str, Schema]:
    schemas: dict[str, Schema] = {}
    for name, kind in SAMPLING_TYPES.items():
        if name == "logit_bias":
            bias = {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS}
            keys = {"pattern": "^[0-9]{1,20}$"}
            schemas[name] = {"type": "object", "propertyNames": keys, "additionalProperties": bias}
        else:
            low, high = SAMPLING_BOUNDS[name]
            schemas[name] = {**JSON_TYPES[kind], "minimum": low, "maximum": high}
    schemas["top_k"]["not"] = {"const": 0}
    return schemas


def _numbers_schema(name: str, kind: type) -> Schema:
    """Return the schema of an option whose fields are numbers."""
    texts = attribute_texts(kind)
    properties = {
        field: describe(nullable(JSON_TYPES[type_] | NUMBER_BOUNDS[name][field]), texts[field])
        for field, type_ in number_types(kind).items()
    }
    defaults = {f.name: f.default for f in fields(kind)}
    for field, schema in properties.items():
        schema["default"] = defaults[field]
    return object_schema(properties)


def _scoring_schema() -> Schema:
    """Return the schema of `scoring`, whose scorer cannot be a function here."""
    texts, defaults = attribute_texts(BranchScoring), BranchScoring()
    properties: dict[str, Schema] = {
        "scorer": {"type": "string", "enum": ["confidence"]},
        "border": {"type": "string", "minLength": 1},
        "keep": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "threshold": {"type": "number"},
        "timeout": {"type": "number", "exclusiveMinimum": 0},
    }
    described = {name: describe(nullable(schema), texts[name]) for name, schema in properties.items()}
    return object_schema(
        {name: {**schema, "default": getattr(defaults, name)} for name, schema in described.items()}
    )


def _dataclass_schema(kind: type) -> tuple[Schema, dict[str, Schema]]:
    """Return the schema of a dataclass's JSON, and those that it refers to."""
    schema = TypeAdapter(kind).json_schema(mode="serialization", ref_template=REFERENCE)
    return schema, {f"Apr{name}": nested for name, nested in schema.pop("$defs", {}).items()}


def _dialects_schema() -> Schema:
    from sgl_apr.server.api.http import DIALECT_FIELDS

    kinds = {f.name: type(f.default) for f in fields(FormatOptions)} | {"name": str, "tags": tuple}
    strings: Schema = {"type": "array", "items": {"type": "string"}}
    entry = {name: {tuple: strings, int: {"type": "integer"}}.get(kinds[name], {"type": "string"}) for name in DIALECT_FIELDS}  # fmt: skip
    dialects = {"type": "array", "items": object_schema(entry, required=True)}
    properties: dict[str, Schema] = {
        "default": {"type": "string"},
        "chat_template": {"type": "boolean"},
        "dialects": dialects,
    }
    return object_schema(properties, required=True)


def _tools_schema() -> Schema:
    text: Schema = {"type": "string"}
    function = object_schema(
        {"name": text, "description": text, "parameters": {"type": "object"}}, required=True
    )
    tool = object_schema({"type": {"const": "function"}, "function": function}, required=True)
    return object_schema({"tools": {"type": "array", "items": tool}}, required=True)


def _stats_schema() -> Schema:
    from sgl_apr.server.api.counters import COUNTERS, GAUGES, LABELS

    count: Schema = {"type": "integer", "minimum": 0}
    properties: dict[str, Schema] = {name: describe(count, text) for name, text in GAUGES.items()}
    for name, text in COUNTERS.items():
        values = LABELS.get(name, ("", ()))[1]
        schema = object_schema(dict.fromkeys(values, count), required=True) if values else count
        properties[name] = describe(schema, text)
    properties |= {
        "limits": describe({"type": "object"}, "The operator's limits"),
        "turn_memory": describe(
            {"type": "object", "additionalProperties": count},
            "The replies that are remembered for next turns",
        ),
        "default_options": describe({"type": "object"}, "The operator's default options"),
        "joins_kv": {"type": "boolean"},
        "groups": describe(
            {"type": "array", "items": {"type": "string"}},
            "The kinds of groups of workers that the server decodes",
        ),
        "grammar_backend": {"type": "string"},
        "supports_seeds": {"type": "boolean"},
        "attention": describe({"type": "string"}, "The attention backend, and why on a GPU"),
    }
    return object_schema(properties, required=True)


def _error_schema() -> Schema:
    text: Schema = {"type": "string"}
    names = {"message": text, "type": text, "param": nullable(text), "code": text}
    return object_schema({"error": object_schema(names, required=True)}, required=True)
