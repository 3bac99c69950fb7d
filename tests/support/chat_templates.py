"""Chat templates in the style of published models, and a tokenizer of bytes that applies one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sgl_apr.engine.scripted import ByteTokenizer

TAGS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TAGS += (
    "<think>",
    "</think>",
    "<Parallel>",
    "</Parallel>",
    "<Thread>",
    "</Thread>",
    "<Conclusion>",
    "</Conclusion>",
)

CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# In the style of Qwen3: tools, calls, results, and reasoning that is dropped from all turns but the last.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nCall as <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if reasoning and loop.index0 > ns.last %}{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# In the style of Llama 3: content is trimmed, and parts stand next to one another.
TRIMMED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content | trim }}
    {%- else %}{%- for part in message.content %}{{- part.text | trim }}{%- endfor %}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- for tool in tools or [] %}{%- for key in tool.function %}{{- '<' + key + '>' }}{%- endfor %}{%- endfor %}
{{- '<|im_start|>assistant\\n' }}"""

# It counts characters and changes the text, so a placeholder does not survive it.
SHORTENED = """\
{%- for message in messages %}{{- '<|im_start|>' + message.content[:8] | upper + message.content + '<|im_end|>' }}{%- endfor %}"""

TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "trimmed": TRIMMED, "shortened": SHORTENED}


@cache
def compiled(template: str) -> Template:
    """A template as the transformers library compiles it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template)


class ChatTokenizer(ByteTokenizer):
    """A tokenizer of bytes and tags with a chat template."""

    def __init__(self, template: str, tags: Sequence[str] = TAGS) -> None:
        super().__init__(tags)
        self.chat_template = template

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: bool = False, **variables: Any
    ) -> str:
        assert not tokenize
        return compiled(self.chat_template).render(messages=messages, **variables)
