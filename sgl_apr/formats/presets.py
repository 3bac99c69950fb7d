"""Published checkpoints with the prompts that they were trained on, and the dialect of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sgl_apr.errors import GrammarError
from sgl_apr.formats.dialects import Dialect, dialect, dialect_names
from sgl_apr.formats.options import JoinMethod
from sgl_apr.tokenizer import Tokenizer

NO_SAMPLING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Preset:
    """A published model. It only forks if its prompt is the one that it was trained on.

    Attributes:
        name: The name of the preset.
        dialect: The dialect of the model. `dialect.joins` are the join methods that work here.
        models: Hub ids; empty if only a recipe was published.
        instruction: Follows the question in the user's turn.
        prompt_source: Where the published instruction can be found.
        sources: Papers, repositories and model cards of the model.
        sampling: Sampling parameters of its authors; empty if they do not state any.
        verbatim: Whether `instruction` is the published one. If not, it is our own.
    """

    name: str
    dialect: Dialect
    models: tuple[str, ...]
    instruction: str
    prompt_source: str
    sources: tuple[str, ...]
    sampling: Mapping[str, float] = field(default_factory=lambda: NO_SAMPLING, hash=False)
    verbatim: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, with `sampling` as a dict, because a read-only mapping cannot be pickled."""
        return {**self.__dict__, "sampling": dict(self.sampling)}

    @property
    def join(self) -> JoinMethod:
        """The join method that the model was trained for."""
        return self.dialect.published_join

    def format_question(self, question: str) -> str:
        """Return the text of the user's turn."""
        return f"{question}\n{self.instruction}" if self.instruction else question


def _presets() -> dict[str, Preset]:
    presets = [
        Preset(
            name="threadweaver",
            dialect=dialect("threadweaver"),
            models=(),
            instruction="",
            prompt_source="none: fine-tuned to fork without an instruction (arXiv 2512.07843, section 3)",
            sampling={"temperature": 1.0, "top_p": 1.0},
            sources=(
                "arXiv 2512.07843",
                "facebookresearch/threadweaver, threadweaver_rl/README.md (sampling; Qwen3-8B after its SFT recipe)",
            ),
        ),
        Preset(
            name="multiverse",
            dialect=dialect("multiverse"),
            models=("Multiverse4FM/Multiverse-32B",),
            instruction="Think in parallel.",
            prompt_source="arXiv 2506.09991, section 6: with and without the instruction to think in parallel",
            sources=("arXiv 2506.09991", "Multiverse4FM/Multiverse-Engine, README"),
        ),
        Preset(
            name="npr",
            dialect=dialect("npr"),
            models=("bigai-NPR/NPR-4B", "bigai-NPR/NPR-4B-non-thinking"),
            instruction=_NPR,
            prompt_source="the model card of bigai-NPR/NPR-4B-non-thinking: rules and an example, after the question",
            sources=("bigai-nlco/Native-Parallel-Reasoner", "hub: bigai-NPR"),
        ),
        Preset(
            name="parallel_r1",
            dialect=dialect("parallel_r1"),
            models=("Parallel-R1/Parallel-R1-Unseen_Step_200",),
            instruction=_PARALLEL_R1,
            prompt_source="zhengkid/Parallel-R1, code/verl/data_preprocess_scripts (variants with and without prompt)",
            sources=("arXiv 2509.07980", "zhengkid/Parallel-R1"),
        ),
    ]
    return {preset.name: preset for preset in presets}


_NPR = (
    "Write in stages. Begin each with a guideline: one plan, or several that can be carried out without one "
    "another, as <guideline>, then <plan>1: ...</plan> and so on, then </guideline>. Carry out each plan in a "
    "step of its own with the same number, as if you had not seen the other steps: <step>, 1: ..., </step>. "
    "Compare the steps in a <takeaway>, without new computation, and decide what comes next. When nothing is "
    "left, give the answer, its result in \\boxed{}."
)
_PARALLEL_R1 = (
    "Reason step by step. Where a second view helps, open <Parallel>, explore each view in a <Path> of its own, "
    "close </Parallel>, and draw them together in a <Summary>. Then go on, and end with the final answer."
)


def preset(name: str) -> Preset:
    """Return a preset by its name or by the hub id of one of its models.

    Raises:
        GrammarError: There is no such preset. The message lists the names.
    """
    presets = _presets()
    for candidate in presets.values():
        if name == candidate.name or name in candidate.models:
            return candidate
    raise GrammarError(f"no preset {name!r}, expected one of {', '.join(presets)} or their hub ids")


def dialect_for(tokenizer: Tokenizer) -> Dialect | None:
    """Return the dialect that a model writes by default, by its tokenizer.

    Returns:
        The first of `known_dialects`, or None if that is empty.
    """
    return next(iter(known_dialects(tokenizer)), None)


def known_dialects(tokenizer: Tokenizer) -> list[Dialect]:
    """Return the dialects that a model knows, the default first.

    These are the ones that its tokenizer declares, or else the one whose tags are tokens. Tags of an optional conclusion may
    be missing. If the tags of one dialect are a subset of another's, the model knows the larger one.

    Returns:
        The dialects. None of them if nothing is declared and the tokenizer has the tags of no dialect, or of several.
    """
    names = dialect_names()
    if declared := getattr(tokenizer, "declared_dialects", ()):
        return [dialect(name) for name in declared if name in names]
    complete: dict[str, set[str]] = {}
    for name in names:
        candidate = dialect(name)
        grammar = candidate.grammar
        required = set(grammar.tags([str(candidate.first_number)])) - set(grammar.tags_in_rule("conclusion"))
        if required and all(tokenizer.special_token_id(tag) is not None for tag in required):
            complete[name] = required
    best = max(complete, key=lambda name: len(complete[name]), default=None)
    is_one = best and all(tags <= complete[best] for tags in complete.values())
    return [dialect(best)] if best and is_one else []
