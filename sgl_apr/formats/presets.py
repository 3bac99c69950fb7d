"""The published checkpoints and how each wants to be asked; and the dialect that a tokenizer was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sgl_apr.errors import GrammarError
from sgl_apr.formats.dialects import Dialect, dialect, dialect_names
from sgl_apr.formats.options import Join
from sgl_apr.tokenizer import Tokenizer

NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Preset:
    """A published model: it shows no parallel structure unless it is asked as it was trained.

    `models` are hub ids (none where only a recipe was published). `instruction` goes behind the question in
    the user's turn; it is ours unless `verbatim`, and `prompt_source` says where the published one stands.
    `sampling` is what its authors sampled with, empty where they do not say. `join` is the one that it was
    trained for; `dialect.joins` are those that work here. `sources` say where all that is from.
    """

    name: str
    dialect: Dialect
    models: tuple[str, ...]
    instruction: str
    prompt_source: str
    sources: tuple[str, ...]
    sampling: Mapping[str, float] = field(default_factory=lambda: NONE)
    verbatim: bool = False

    @property
    def join(self) -> Join:
        """How branches joined when it was trained."""
        return self.dialect.published_join

    def ask(self, question: str) -> str:
        """The text of the user's turn."""
        return f"{question}\n{self.instruction}" if self.instruction else question


def _presets() -> dict[str, Preset]:
    found = [
        Preset(
            name="threadweaver",
            dialect=dialect("threadweaver"),
            models=(),
            instruction="",
            prompt_source="none: fine-tuned to fork without being told (arXiv 2512.07843, section 3)",
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
            prompt_source="the model card of bigai-NPR/NPR-4B-non-thinking: rules and an example, behind the question",
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
    return {preset.name: preset for preset in found}


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
    """The preset of that name, or of that hub id; raises `GrammarError` that lists them."""
    known = _presets()
    for found in known.values():
        if name == found.name or name in found.models:
            return found
    raise GrammarError(f"no preset {name!r}, expected one of {', '.join(known)} or their hub ids")


def dialect_for(tokenizer: Tokenizer) -> Dialect | None:
    """The dialect whose tags a tokenizer has as tokens; None if it has none whole, or those of several.

    What a dialect may do without (an optional conclusion) may be missing. Of two of which one's tags are
    among the other's it is the other.
    """
    whole: dict[str, set[str]] = {}
    for name in dialect_names():
        known = dialect(name)
        grammar = known.grammar
        needed = set(grammar.tags([str(known.first_number)])) - set(grammar.tags_in_rule("conclusion"))
        if needed and all(tokenizer.special(tag) is not None for tag in needed):
            whole[name] = needed
    best = max(whole, key=lambda name: len(whole[name]), default=None)
    return dialect(best) if best and all(tags <= whole[best] for tags in whole.values()) else None
