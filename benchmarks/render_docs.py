"""Write docs/benchmarks.md from the results that benchmarks/run_all.py has collected.

python -m benchmarks.render_docs runs/benchmarks/benchmarks.json   # merges them into docs/benchmarks.json, writes the page
python -m benchmarks.render_docs --check                           # status 1 if the page differs from docs/benchmarks.json

A benchmark that failed keeps its last result. One that missed a bar replaces it, and the page names the bar.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import figures, model_figures
from benchmarks.common.figures import Result

DOCS = Path(__file__).resolve().parents[1] / "docs"
INTRODUCTION = """\
# Benchmarks

<!-- Written by benchmarks/render_docs.py from docs/benchmarks.json. Do not edit. -->

`make bench` runs every benchmark and collects the results in `runs/benchmarks`. Run a single one by its command below,
from the root of the repository; most take `--help`. Compare ratios rather than absolute times: the machine was shared
with other jobs, and had no GPU."""


@dataclass(frozen=True, slots=True)
class Section:
    """What the page says about a benchmark.

    Attributes:
        title: The heading.
        measures: Plain sentences on what the benchmark measures, and on how to read its figures.
        render: Turns its result into Markdown; None if the figures stand on another page, which `measures` names.
        arguments: The arguments that its command takes, where no result has recorded a command.
    """

    title: str
    measures: str
    render: Callable[[Result], str] | None = None
    arguments: str = ""


SECTIONS: dict[str, Section] = {
    "masks.validity": Section(
        "Validity of replies",
        "How many replies of SmolLM2-135M-Instruct follow the `threadweaver` dialect, with the grammar and without it: 30 "
        "replies each at temperature 1.0, with one fork requested. Without the grammar, every valid reply is one that never "
        "forked.",
        figures.validity,
    ),
    "masks.mask_latency": Section(
        "Mask latency",
        "How long the grammar of each dialect takes to compute a token mask, and how many replies of a random-weight model "
        "that prefers tags are valid: temperature 1.5, with one fork requested. Masks are in microseconds over SmolLM2's "
        "49,152 tokens and all tags; the last two columns are the masks of XGrammar, and those where tags are not tokens. Branches of `apr` have no closers, and branches of `parathinker` stop when the first one "
        "ends.",
        figures.mask_latency,
    ),
    "kernels.attention": Section(
        "CPU attention",
        "How much faster the CPU attention backend is than SGLang's `torch_native` on the same tensors.",
        figures.attention,
    ),
    "quality.honesty": Section(
        "Claims",
        "What a Countdown model claims where there is no solution, and what it solves at sizes that it was trained on or not.",
        model_figures.honesty,
    ),
    "quality.stated_width": Section(
        "Stated widths",
        "How often the first fork of a Countdown model is as wide as its prompt states (exact), against forks of the same model "
        "without a stated width, which the runtime ends there.",
        model_figures.stated_width,
    ),
    "quality.width_under_load": Section(
        "Width under load",
        "Forks as wide as the model likes, cut by the runtime when the server is busy, or narrower because the prompt says so "
        "(told): 96 problems, 8 and 32 at once.",
        model_figures.width_under_load,
    ),
    "quality.schools": Section(
        "Text joins, KV joins and messages",
        "Models of one recipe in each format, also under the join that they were not trained for. They have to be trained first.",
    ),
    "quality.recursion": Section(
        "Forks inside branches",
        "A model whose branches fork again against a flat one of the same recipe, under the same limits. They have to be trained first: "
        "configs/countdown-recursion.toml says how.",
    ),
    "quality.early_votes": Section(
        "Votes that end early",
        "How many calls a vote saves that ends when its leader is likely to win, against the same vote of all 16 chains, on 200 problems. Both have "
        "the same chains.",
        model_figures.early_votes,
    ),
    "quality.long_context": Section(
        "Long texts with and without recursion",
        "Questions about generated ledgers: one prompt with all of the text, or sub-calls that read its parts (`recursive(part_tokens=...)`). "
        "The model is SmolLM2 (135M) with [an adapter for this](methods.md#read-a-long-text-in-parts). One wrong note makes an answer wrong, and "
        "a model of this size writes one too often.",
        model_figures.long_context,
    ),
    "quality.speculative_search": Section(
        "Speculative tree search",
        "`spex` against `tree_of_thoughts` with the same tree: one problem at a time, both with the same seeds. The tree is narrow (2 states of a "
        "level, one proposal and one evaluation of each), since speculation uses what the engine has free.",
        model_figures.speculative_search,
    ),
    "quality.language_model": Section(
        "A language model that forks",
        "How well a trained SmolLM2 decides when to fork, closes its branches and keeps its plain replies. It has to be trained "
        "first.",
    ),
    "kernels.worker_attention": Section(
        "CPU attention of workers",
        "How long the attention of Hogwild! workers takes, whose queries are turned for each block, compared with as many "
        "independent requests, and the ratio of a decode step on SmolLM2's shapes.",
    ),
    "kernels.gpu": Section(
        "GPU attention, training steps, forks and joins",
        "How long training rows of 28,000 tokens take under FlexAttention and under a dense mask, and how long forks and joins "
        "take in the shape of an 8B model. It needs a GPU; its figures from an H100 are on the page about "
        "[training](training.md).",
    ),
    "gpu_acceptance": Section(
        "The first minutes on a GPU",
        "Whether joins and groups of workers compute on a machine what transformers computes, and how fast: "
        "[On a GPU](gpu.md) explains every part.",
        arguments=" --device cpu",
    ),
    "kv_join.latency": Section(
        "Latency of a join",
        "How long SmolLM2 takes from the end of the last branch to the first token after the join, commits included, when it "
        "joins by text and in the KV cache: medians of 3.",
        figures.join_latency,
    ),
    "kv_join.soak": Section(
        "Soak of the joining cache",
        "Whether the KV cache stays correct and free of leaks under random load.",
        figures.soak,
    ),
    "kv_join.groups": Section(
        "Groups of workers",
        "Whether the greedy tokens of Group Think and Hogwild! in the engine are those of transformers with an explicit mask "
        "and explicit positions, and how long a decode step of 4 workers takes relative to one of 4 independent requests "
        "after the same prompt, in the shape of SmolLM2. [Methods](methods.md) explains both.",
        figures.groups,
    ),
    "runtime.overhead": Section(
        "Overhead and throughput of the loop",
        "How much time the fork-join loop adds to the engine's, and how many trajectories one process carries, on a tiny "
        "random-weight Llama. Figures are medians; all trajectories of the second table are valid and forked.",
        figures.overhead,
    ),
    "runtime.eager": Section(
        "Eager branches",
        "What it saves to start each branch as soon as its outline is written, while the fork still lists others "
        "(`eager_branches=True`): `builtin:spawn` on held-out Countdown problems where it forks, greedy, one at a time on "
        "a server with empty caches. Both ways take turns, each is first in every other round. Medians over problems, with "
        "their 95% intervals. The critical path of the eager way counts the fork up to the outline of a branch. Branches that start one by one "
        "are also prefilled one by one.",
        figures.eager,
    ),
    "runtime.peers": Section(
        "Against a thread pool",
        "How long the runtime takes relative to a plain orchestrator (a thread for each question, the OpenAI client, one "
        "blocking request for each phase, nothing streamed): SmolLM2 with the tags as tokens, questions in parallel with one "
        "fork into three branches each, greedy, with the same grammars and limits on one server. The clients take turns, each "
        "is first in every other round, and both start with empty caches.",
        figures.peers,
    ),
    "agents": Section(
        "Agents",
        "How long several [workers over one context](agents.md) take at once and one after another, on a random model of 3 "
        "layers: both ways find the conversation in the cache and nothing else, each worker decodes 32 tokens, and the ways take turns (medians). \"Found "
        "in the cache\" is the lowest share of the common tokens that a worker found. \"Second turn\" is the part of the first "
        "turn of a chat that its second turn finds, with a reply that forked into as many branches.",
        figures.agents,
    ),
    "startup": Section(
        "Start-up",
        "How long `sgl-apr serve --model builtin` takes until the server is ready, and what each thing saves that a start leaves "
        "out: medians of several starts.",
        figures.startup,
    ),
    "budgets": Section(
        "Small budgets",
        "What methods solve under small budgets of tokens, with the built-in model on 200 held-out Countdown problems. In `apr` the "
        "model decides when to fork, from 2,048 tokens on: under smaller budgets it searches in one reply, which is what solves more "
        "there. In `apr:auto` (`mode=\"auto\"`) it may fork at any budget. `pro` chooses a method. Each method runs with the temperature of "
        "its paper, a single reply with 0. The border and the sizes of leases were chosen on training problems.",
        figures.budgets,
    ),
    "training.tree_build": Section(
        "Building a training tree",
        "How long it takes to merge the sequences of a trajectory into one training tree, and the memory it takes.",
        figures.tree_build,
    ),
    "training.step_speed": Section(
        "Training steps",
        "The same demonstrations, model and optimizer in three loops: a plain one over separate sequences, and training trees with a dense "
        "mask or with attention to visible blocks alone.",
        model_figures.step_speed,
    ),
    "quality.countdown": Section(
        "Countdown",
        "What a model that may fork solves, compared with a twin that searches sequentially: 2,000 held-out problems, 500 with "
        "three numbers and 1,500 with four, each with 1 to 6 solutions, decoded greedily. The page about "
        "[Countdown](countdown.md) explains the models and the results.",
        figures.countdown,
    ),
    "quality.method_curves": Section(
        "Methods at equal budgets",
        "What every method solves under budgets of 256 to 8,192 tokens and under deadlines of 2 to 8 seconds, with the built-in model. "
        "An attempt with a deadline runs alone. The curves are on the page about [methods](methods.md).",
        model_figures.method_curves,
    ),
    "quality.methods": Section(
        "Methods",
        "What every [method](methods.md) solves on the same 50 Countdown problems with a budget of 2,048 tokens and the built-in model. "
        "All run at the same "
        "time (wall s). \"One request at a time\" is how much longer two problems take, one after the other, when the engine "
        "gets one request at a time; sampled replies differ between the two runs. All methods share one cache, so that later "
        "rows find the prompts of earlier ones: \"cached\" compares a method only with itself.",
        figures.methods,
    ),
    "quality.ablations": Section(
        "Ablations",
        "Short training runs on open questions of adaptive parallel reasoning. It needs the trained models; its figures are on "
        "the page about [Countdown](countdown.md).",
        arguments=" --model runs/parallel/model --twin runs/sequential/model --rl runs/rl/model -o runs/questions",
    ),
}  # fmt: skip


def page(entries: Mapping[str, Result]) -> str:
    """The whole page; a section without a result has no figures."""
    return "\n\n".join([INTRODUCTION, *(section(name, entries.get(name)) for name in SECTIONS)]) + "\n"


def section(name: str, entry: Result | None) -> str:
    """The section of one benchmark."""
    about = SECTIONS[name]
    recorded = [a for a in entry["command"] if a != "--json"] if entry else []
    arguments = " ".join(recorded) or f"-m benchmarks.{name}{about.arguments}"
    parts = [f"## {about.title}", figures.prose(about.measures), f"`python {arguments}`"]
    if entry and about.render:
        parts += [source(entry), about.render(entry["found"])]
        if missed := entry["found"].get("missed"):
            parts.append(f"Bars missed: {'; '.join(missed)}.")
    elif about.render:
        parts.append("Not measured yet.")
    return "\n\n".join(parts)


def source(entry: Result) -> str:
    """Where and when a result was measured."""
    machine, gpu = entry["hardware"], entry["hardware"].get("gpu")
    return (
        f"Measured on {machine['cores']} cores of {machine['cpu']}{f' and {gpu}' if gpu else ''}, "
        f"{entry['date'][:10]}, commit {entry['commit']}."
    )


def main(argv: Sequence[str] | None = None, docs: Path = DOCS) -> int:
    """Merge new results into docs/benchmarks.json and write docs/benchmarks.md; with --check, only compare the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="?", type=Path, help="the JSON file that benchmarks.run_all has written"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if the page would change"
    )
    options = parser.parse_args(argv)
    data, path = docs / "benchmarks.json", docs / "benchmarks.md"
    entries: dict[str, Result] = json.loads(data.read_text()) if data.exists() else {}
    if options.results:
        new = json.loads(options.results.read_text())
        succeeded = {name: e for name, e in new.items() if e["ok"] or e.get("found", {}).get("missed")}
        elsewhere = {name for name, about in SECTIONS.items() if about.render is None}
        entries |= {name: e for name, e in succeeded.items() if name not in elsewhere}
    if unknown := sorted(set(entries) - set(SECTIONS)):
        raise SystemExit(f"no section for {', '.join(unknown)}; expected names from {', '.join(SECTIONS)}")
    text = page(entries)
    changed = not path.exists() or path.read_text() != text
    if not options.check:
        path.write_text(text)
        data.write_text(json.dumps(entries, indent=1) + "\n")
    if changed:
        print(path.name)
    return int(options.check and changed)


if __name__ == "__main__":
    sys.exit(main())
