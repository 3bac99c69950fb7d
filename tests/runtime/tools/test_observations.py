"""The form of results, from chat templates in the style of several families of models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import sgl_apr as apr
from sgl_apr.formats.tool_syntax import ToolSyntax
from sgl_apr.runtime.tools.observations import PLAIN_FORM, PROBE, ObservationForm, observation_form
from tests.support.chat_templates import CHATML, QWEN

QWEN_CODER = QWEN.replace(
    """{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}""",
    """{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}""",
).replace(
    """            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}""",
    """            {%- for name, value in call.function.arguments.items() %}
                {{- '<parameter=' + name + '>\\n' + value + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}""",
)
# In the style of Llama 3.1: one call at a time, and results as JSON strings.
LLAMA = """\
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('single calls only') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""
# In the style of Mistral: calls are a list with ids.
MISTRAL = """\
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
            {{- ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last else '' }}
        {%- endfor %}
        {{- ']</s>' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- endif %}
{%- endfor %}"""


class Templated(apr.ByteTokenizer):
    """Bytes, and any chat template."""

    def __init__(self, template: str) -> None:
        super().__init__(["<|eot_id|>"])
        self._eos_ids = frozenset({self.EOS, *self._tags.values()})
        environment = ImmutableSandboxedEnvironment()
        environment.globals["raise_exception"] = self._refuse
        self._template = environment.from_string(template)

    @staticmethod
    def _refuse(message: str) -> None:
        raise ValueError(message)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self._template.render(messages=messages, **options)


def form_of(template: str, parser: str) -> ObservationForm:
    engine = apr.ScriptedEngine(lambda request, prompt: "", Templated(template))
    return asyncio.run(observation_form(engine, ToolSyntax(parser, (PROBE,))))


QWEN_FORM = ObservationForm(
    "<|im_end|>\n<|im_start|>user\n<tool_response>\n",
    "\n</tool_response><|im_end|>\n<|im_start|>user\n<tool_response>\n",
    "\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.parametrize(
    ("template", "parser", "form"),
    [
        (QWEN, "qwen25", QWEN_FORM),
        (QWEN, "hermes", QWEN_FORM),
        (QWEN_CODER, "qwen3_coder", QWEN_FORM),
        (
            LLAMA,
            "llama3",
            ObservationForm(
                '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"',
                '"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
                '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"',
                '"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
                quoted=True,
            ),
        ),
        (
            MISTRAL,
            "mistral",
            ObservationForm(
                '</s>[TOOL_RESULTS] {"content": ',
                '}[/TOOL_RESULTS][TOOL_RESULTS] {"content": ',
                "}[/TOOL_RESULTS]",
            ),
        ),
        (CHATML, "qwen25", PLAIN_FORM),
        (QWEN, "qwen3_coder", QWEN_FORM),  # a parser of another family
    ],
    ids=["qwen", "hermes", "coder", "llama", "mistral", "no tools", "mismatch"],
)
def test_the_form_is_cut_out_of_the_template(template: str, parser: str, form: ObservationForm):
    assert form_of(template, parser) == form


def test_a_template_that_quotes_results_gets_them_escaped():
    form = form_of(LLAMA, "llama3")
    assert form.escaped('say "é"\n') == 'say \\"é\\"\\n'
    assert QWEN_FORM.escaped('"') == '"'


def test_an_engine_that_fails_to_render_is_asked_again():
    class Failing(apr.ScriptedEngine):
        failures = 1

        async def encode_chat(self, messages: Any, tools: Any = None) -> Any:
            if self.failures:
                self.failures -= 1
                raise apr.EngineError("busy", 503)
            return await super().encode_chat(messages, tools)

    engine = Failing(lambda request, prompt: "", Templated(QWEN))
    syntax = ToolSyntax("qwen25", (PROBE,))
    forms = [asyncio.run(observation_form(engine, syntax)) for _ in range(2)]
    assert forms == [PLAIN_FORM, QWEN_FORM]
