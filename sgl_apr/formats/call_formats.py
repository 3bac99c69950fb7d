"""The form of tool calls in the text of a model, taken from the function-call detectors of SGLang."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from sgl_apr.errors import AprError, UnsupportedEngine

NAME = "\0"  # stands for the name of a tool in `CallFormat.begin`
INDEX = "\1"  # stands for the index of a call


@dataclass(frozen=True, slots=True)
class ParameterTags:
    """How a tagged format writes one parameter.

    Attributes:
        begin: Stands before the name of the parameter.
        middle: Stands between its name and its value.
        end: Stands after its value.
        json_middle: Stands there instead if the value is JSON; empty if that makes no difference.
        strips_space: Whether white space around a value is removed. If not, one line break at each end is.
        reads_null: Whether the text `null` is no value.
    """

    begin: str
    middle: str
    end: str
    json_middle: str = ""
    strips_space: bool = False
    reads_null: bool = False


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes calls of tools: `section_begin call (separator call)* section_end`.

    Attributes:
        begin: The text before the arguments of a call, with `NAME` and perhaps `INDEX`.
        end: The text after the arguments.
        section_begin: The text before all calls of a message.
        section_end: The text after all calls of a message.
        separator: The text between two calls.
        parallel: Whether a message can have several calls.
        parameters: How parameters are written, None if the arguments are one JSON object.
    """

    begin: str
    end: str
    section_begin: str = ""
    section_end: str = ""
    separator: str = ""
    parallel: bool = True
    parameters: ParameterTags | None = None

    @property
    def trigger(self) -> str:
        """The fixed text with which calls begin: a tag, or the first piece that is not a space."""
        text = (self.section_begin + self.begin).split(NAME)[0]
        match = re.match(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\S+", text)
        return match[0] if match else text


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the form of a parser's calls is found: a class of SGLang, and a function of one of its instances."""

    module: str
    detector: str
    build: Callable[[Any], CallFormat]


def _wrapped(separator: str, *, parallel: bool = True) -> Callable[[Any], CallFormat]:
    """Every call stands between `begin` and `end` of the detector's structure info."""

    def build(detector: Any) -> CallFormat:
        info = detector.structure_info()(NAME)
        return CallFormat(info.begin, info.end, separator=separator, parallel=parallel)

    return build


def _sectioned(separator: str = "") -> Callable[[Any], CallFormat]:
    """All calls stand between `bot_token` and `eot_token` of the detector."""

    def build(detector: Any) -> CallFormat:
        info = detector.structure_info()(NAME)
        begin, end = detector.bot_token, detector.eot_token
        return CallFormat(info.begin.removeprefix(begin), info.end.removesuffix(end), begin, end, separator)

    return build


def _kimi(detector: Any) -> CallFormat:
    """The calls of a section are numbered from 0."""
    plain = _sectioned()(detector)
    return CallFormat(
        plain.begin.replace(f"{NAME}:0", f"{NAME}:{INDEX}"), plain.end, plain.section_begin, plain.section_end
    )


def _qwen_coder(detector: Any) -> CallFormat:
    """The line breaks are those of the chat template of Qwen3-Coder."""
    tags = ParameterTags(
        detector.parameter_prefix, ">\n", f"\n{detector.parameter_end_token}\n", reads_null=True
    )
    begin = f"{detector.tool_call_start_token}\n{detector.tool_call_prefix}{NAME}>\n"
    end = f"{detector.function_end_token}\n{detector.tool_call_end_token}"
    return CallFormat(begin, end, separator="\n", parameters=tags)


def _deepseek_tags(detector: Any) -> CallFormat:
    """The line breaks are those of the encoding of DeepSeek V3.2."""
    info = detector.structure_info()(NAME)
    parameter = f"{detector.dsml_token}{detector.parameter_tag_name}"
    middle = '" string="{}">'
    tags = ParameterTags(
        f'<{parameter} name="',
        middle.format("true"),
        f"</{parameter}>\n",
        middle.format("false"),
        strips_space=detector.strip_string_param_value,
    )
    section = (detector.bot_token + "\n", detector.eot_token)
    return CallFormat(info.begin + "\n", info.end + "\n", *section, parameters=tags)


_SOURCES = {
    "deepseekv3": _Source("deepseekv3_detector", "DeepSeekV3Detector", _sectioned("\n")),
    "deepseekv31": _Source("deepseekv31_detector", "DeepSeekV31Detector", _sectioned()),
    "deepseekv32": _Source("deepseekv32_detector", "DeepSeekV32Detector", _deepseek_tags),
    "hermes": _Source("hermes_detector", "HermesDetector", _wrapped("\n")),
    "interns1": _Source("internlm_detector", "InternlmDetector", _wrapped("")),
    "kimi_k2": _Source("kimik2_detector", "KimiK2Detector", _kimi),
    "llama3": _Source("llama32_detector", "Llama32Detector", _wrapped("", parallel=False)),
    "mistral": _Source("mistral_detector", "MistralDetector", _sectioned(", ")),
    "nanbeige": _Source("qwen3_coder_detector", "Qwen3CoderDetector", _qwen_coder),
    "qwen": _Source("qwen25_detector", "Qwen25Detector", _wrapped("\n")),
    "qwen25": _Source("qwen25_detector", "Qwen25Detector", _wrapped("\n")),
    "qwen3_coder": _Source("qwen3_coder_detector", "Qwen3CoderDetector", _qwen_coder),
    "step3p5": _Source("qwen3_coder_detector", "Qwen3CoderDetector", _qwen_coder),
}


def supported_parsers() -> tuple[str, ...]:
    """Return the tool-call parsers of SGLang whose calls can be constrained and parsed."""
    return tuple(sorted(_SOURCES))


@lru_cache(maxsize=32)
def call_detector(parser: str) -> Any:
    """Return a detector of SGLang. Its import takes seconds.

    Raises:
        UnsupportedEngine: The parser is not supported, or SGLang is not installed.
    """
    source = _SOURCES.get(parser) if isinstance(parser, str) else None
    if source is None:
        raise UnsupportedEngine(
            f"tools with the tool-call parser {parser!r:.60} are not supported, expected one of "
            f"{', '.join(supported_parsers())}"
        )
    return getattr(_module(source.module), source.detector)()


def infer_type(schema: Mapping[str, Any]) -> str | None:
    """Return the type as which SGLang reads a tagged parameter, None if its schema names none."""
    kind: str | None = _module("utils").infer_type_from_json_schema(dict(schema))
    return kind


def _module(name: str) -> Any:
    """A module of SGLang's detectors."""
    try:
        return import_module(f"sglang.srt.function_call.{name}")
    except ImportError as error:
        raise UnsupportedEngine(
            f"tools need SGLang, whose detectors define the form of calls: pip install sglang ({error})"
        ) from error


@lru_cache(maxsize=32)
def call_format(parser: str) -> CallFormat:
    """Return how a parser of SGLang expects calls.

    Args:
        parser: A name that `--tool-call-parser` of SGLang accepts.

    Raises:
        UnsupportedEngine: The parser is not supported, or SGLang is not installed.
        AprError: The detector of this SGLang version describes another form than the one known here.
    """
    detector = call_detector(parser)
    built = _SOURCES[parser].build(detector)
    if NAME not in built.begin:
        raise AprError(f"the tool-call parser {parser!r} of this SGLang does not place the name of a tool")
    return built


@lru_cache(maxsize=64)
def call_tag_names(form: CallFormat) -> tuple[str, ...]:
    """Return the names of the tags in the form of calls, as `text_excluding` takes them."""
    parameters = form.parameters
    texts = [form.section_begin, form.begin, form.end, form.section_end]
    texts += [parameters.begin, parameters.middle, parameters.end] if parameters else []
    names = re.findall(rf"</?([^<>\s{NAME}]+)", "\n".join(texts))
    return tuple(dict.fromkeys(n.rstrip("=") for n in names))
