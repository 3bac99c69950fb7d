"""Tools of every kind, and a sampler of masks of both grammar backends."""

from __future__ import annotations

import json
import random
from functools import cache, lru_cache

import numpy as np

from sgl_apr.formats.call_formats import call_detector
from sgl_apr.formats.tool_syntax import ToolDefinition, ToolSyntax, tool_syntax
from tests.support.masked_sampler import Masked

SEARCH = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "description": "what to look for"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        "kind": {"enum": ["web", "näher", 'a "quoted" kind']},
        "exact": {"type": "boolean", "default": False},
    },
    "required": ["query"],
}
NESTED = {
    "$defs": {
        "Point": {
            "title": "Point",
            "type": "object",
            "properties": {
                "x": {"type": "number"},
                "label": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["x"],
        }
    },
    "type": "object",
    "properties": {
        "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}, "minItems": 1, "maxItems": 2},
        "center": {"$ref": "#/$defs/Point"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "pair": {"type": ["integer", "null"]},
    },
    "required": ["points", "center"],
}
TOOLS = (
    ToolDefinition.from_schema("search", "Looks something up.", SEARCH),
    ToolDefinition.from_schema("search_more", "Looks up more.", {**SEARCH, "required": ["kind", "query"]}),
    ToolDefinition.from_schema("plot", "Draws.", NESTED),
    ToolDefinition("now", "Tells the time."),
)
STRINGS = [
    "",
    "<",
    "a < b",
    "null",
    "Ünïcode ☃",
    'say "x"',
    "back\\slash",
    "</Thread>",
    "<tool_call>",
    "a\nb",
]


@cache
def syntax(parser: str, tools: tuple[ToolDefinition, ...] = TOOLS) -> ToolSyntax:
    return tool_syntax(parser, tools)


def detected(parser: str, text: str, tools: tuple[ToolDefinition, ...] = TOOLS) -> list[tuple[str, object]]:
    """The calls that SGLang's own detector reads in a text."""
    from sglang.srt.entrypoints.openai.protocol import Tool

    known = [Tool.model_validate(resolved(tool).as_openai()) for tool in tools]
    calls = type(call_detector(parser))().detect_and_parse(text, known).calls
    return [(call.name, json.loads(call.parameters)) for call in calls]


def resolved(tool: ToolDefinition) -> ToolDefinition:
    """A tool whose parameters do not refer to definitions, which the detectors of tagged calls do not follow."""
    from sgl_apr.formats.tagged_values import parameter_schemas

    schema = tool.schema
    return ToolDefinition.from_schema(
        tool.name, tool.description, {**schema, "properties": parameter_schemas(schema)}
    )


class MaskSampler:
    """Samples text from masks. A tag is as likely as 20 letters, and what ends strings and objects as 4."""

    def __init__(self, tags: tuple[str, ...], backend: str, seed: int = 0) -> None:
        self.masked, self.backend, self.random = Masked(tags), backend, random.Random(seed)
        self.size = self.masked.backend.get_vocab_size()
        self.eos = next(iter(self.masked.eos_ids))
        self.weights = np.full(self.size, 0.05)
        for i in range(self.size):
            token = self.masked.backend.id_to_token(i)
            if len(token) > 1:
                self.weights[i] = 20
            elif token in '"}],<Ċ':
                self.weights[i] = 4
            elif token.isascii() and (token.isalnum() or token in "/> {[:."):
                self.weights[i] = 1

    @lru_cache(maxsize=256)  # noqa: B019  # as long as the test
    def compiled(self, grammar: str):
        if self.backend == "llguidance":
            return self.masked.compiled(grammar)
        return self._compiler.compile_grammar(grammar)

    @property
    def _compiler(self):
        return xgrammar_compiler(self.masked)

    def sample(self, grammar: str, start: str = "", max_tokens: int = 3000) -> tuple[list[int], bool]:
        """The ids of a random text of a grammar that begins with `start`, and whether it ended."""
        at = _Matcher(self.compiled(grammar), self.size)
        ids = self.masked.encode(start)
        for token in ids:
            at.accept(token)
        while len(ids) < max_tokens:
            allowed = at.allowed()
            odds = np.cumsum(self.weights * allowed)
            assert odds[-1] > 0, self.masked.decode(ids)[-200:]
            token = int(np.searchsorted(odds, self.random.random() * odds[-1], side="right"))
            if token == self.eos:
                return ids, True
            ids.append(token)
            at.accept(token)
        return ids, False

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether a text can be decoded, and decoding can end there."""
        at = _Matcher(self.compiled(grammar), self.size)
        ids = self.masked.encode(text)
        return all(at.try_accept(i) for i in ids) and bool(at.allowed()[self.eos])


@cache
def xgrammar_compiler(masked: Masked):
    import xgrammar
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=masked.backend, eos_token="<eos>")
    return xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.from_huggingface(
            fast, vocab_size=masked.backend.get_vocab_size(), stop_token_ids=list(masked.eos_ids)
        )
    )


class _Matcher:
    """One interface for the matchers of both backends."""

    def __init__(self, compiled, size: int) -> None:
        import llguidance.numpy as llguidance_masks

        self.size, self.is_llguidance = size, hasattr(compiled, "deep_copy")
        if self.is_llguidance:
            self.matcher, self._masks = compiled.deep_copy(), llguidance_masks
            self.bits = llguidance_masks.allocate_token_bitmask(1, size)
        else:
            import xgrammar

            self.matcher = xgrammar.GrammarMatcher(compiled)
            self.bits = xgrammar.allocate_token_bitmask(1, size)

    def allowed(self) -> np.ndarray:
        if self.is_llguidance:
            self._masks.fill_next_token_bitmask(self.matcher, self.bits)
            bits = self.bits
        else:
            self.matcher.fill_next_token_bitmask(self.bits)
            bits = self.bits.numpy()
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.size]

    def accept(self, token: int) -> None:
        assert self.try_accept(token), token

    def try_accept(self, token: int) -> bool:
        if self.is_llguidance:
            return self.matcher.try_consume_tokens([token]) == 1
        return bool(self.matcher.accept_token(token))
