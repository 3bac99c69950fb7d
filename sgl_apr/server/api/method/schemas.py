"""JSON schemas of the fields of a request for a method."""

from __future__ import annotations

from sgl_apr.methods.chat_tasks import chat_task_names
from sgl_apr.methods.registry import METHOD_NAMES
from sgl_apr.server.api.schema_parts import Schema, describe


def method_schemas() -> dict[str, Schema]:
    """Return the schemas of `method`, `options` and `task`, fields of `apr` in chat completions."""
    return {
        "method": describe(
            {"type": "string", "enum": list(METHOD_NAMES)},
            "Answer by this method, and not in the format of the model",
        ),
        "options": describe(
            {"type": "object"}, "Options of the method, under the names that it has in Python"
        ),
        "task": describe(
            {"type": "string", "enum": chat_task_names()},
            "What the method takes the last message for: an open question, or one whose answer is a formula",
        ),
    }
