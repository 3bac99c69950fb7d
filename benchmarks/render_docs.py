"""Figures of README and docs, written from what benchmarks/run_all.py has kept; nothing is measured here.

python benchmarks/render_docs.py runs/benchmarks/benchmarks.json     # keeps it as docs/benchmarks.json, and writes the pages anew
python benchmarks/render_docs.py --check                             # status 1 if a page says something else

What stands in a page between `<!-- figures: NAME -->` and `<!-- end of figures -->` is the section NAME below; NAME_short is of
the same benchmark. A section of a benchmark that was not run, or failed, stays as it is; one that missed a bar says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.common.markdown import table

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "benchmarks.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
Found = Mapping[str, Any]


def spread(values: Sequence[float]) -> str:
    """From the least to the most, as factors."""
    least, most = (f"{x:.1f}" for x in (min(values), max(values)))
    return f"{least}x" if least == most else f"{least}-{most}x"


def prose(text: str) -> str:
    """In lines as long as the pages have them."""
    return fill(text, 118, break_on_hyphens=False)


def percent(share: float) -> str:
    """With one decimal, a half rounded up."""
    return f"{100 * share + 1e-9:.1f}%"


def trie(found: Found) -> str:
    return prose(
        f"The training structure of {found['sequences']} sequences, {found['flat_tokens']:,} tokens in a line, takes "
        f"{1000 * found['seconds']:.0f} ms and {found['peak_mb']:.1f} MB at the most."
    )


def validity(found: Found) -> str:
    columns = ["tags", "grammar", "valid", "valid and forked", "closers written", "closers injected"]
    rows = [
        [
            {"tokens": "tokens", "text": "spelled out"}[r["tags"]], "on" if r["grammar"] else "off",
            f"{r['valid']} of {r['replies']}", r["valid_and_forked"], r["closers_decoded"], r["closers_injected"],
        ]
        for r in found["rows"]
    ]  # fmt: skip
    return table(columns, rows)


def grammar(found: Found) -> str:
    columns = [
        "dialect", "valid", "forked", "valid and forked, grammar off", "closers written / injected", "mask p50 / p99",
        "xgrammar", "tags spelled out",
    ]  # fmt: skip
    rows = [
        [
            f"`{name}`", f"{r['valid']} of {r['runs']}", r["forked"], r["valid_grammar_off"],
            f"{r['closers_decoded']} / {r['closers_injected']}",
            *(f"{r[f'{how}mask_us_p50']} / {r[f'{how}mask_us_p99']}" for how in ("", "xgrammar_", "text_mode_")),
        ]
        for name, r in found["dialects"].items()
    ]  # fmt: skip
    nested = [
        f"Of `{name}`'s replies {r['nested']} forked again inside a branch."
        for name, r in found["dialects"].items()
        if r["nested"]
    ]
    return "\n\n".join([table(columns, rows), *nested])


# Of benchmarks/kernels/attention.py: a line, and the cases in it.
CASES: tuple[tuple[str, Callable[[Found], bool]], ...] = (
    ("decode, 1-4 requests", lambda c: c["name"] == "decode" and c["requests"] <= 4),
    ("decode, 8-16 requests", lambda c: c["name"] == "decode" and 8 <= c["requests"] <= 16),
    ("decode, 32-64 requests", lambda c: c["name"] == "decode" and c["requests"] >= 32),
    ("decode, 8-64 branches of a fork", lambda c: c["name"].startswith("decode, fork")),
    ("extend, 2 new over 2,304 cached", lambda c: c["name"].startswith("extend") and c["new"] == 2),
    ("extend, 8 branches of 10 new over 500 cached", lambda c: c["name"] == "extend, fork of 8"),
    ("prefill, 1,000", lambda c: c["name"] == "prefill"),
)


def attention(found: Found) -> str:
    shapes = {"smollm2": "SmolLM2-135M's shape"} | {
        t["case"]["shape"]: "the tests' tiny Llama"
        for t in found["timings"]
        if t["case"]["shape"] != "smollm2"
    }
    rows = [
        [
            line,
            *(
                spread(
                    [
                        t["speedup"]
                        for t in found["timings"]
                        if t["case"]["shape"] == shape and member(t["case"])
                    ]
                )
                for shape in shapes
            ),
        ]
        for line, member in CASES
    ]
    differ = max(t["max_difference"] for t in found["timings"])
    fork = found["fork"]
    return (
        table(["", *shapes.values()], rows)
        + "\n\n"
        + prose(
            f"Largest difference in the outputs: {differ:.0e} (fp32). Of the decoding of {fork['branches']} branches over a "
            f"prefix of {fork['prefix']:,} tokens, {fork['speedup']:.1f}x comes from reading the prefix once."
        )
    )


def join(found: Found) -> str:
    columns = [
        "branches x tokens", "computed again, text join", "KV join", "text join, s", "KV join, s", "KV join is",
    ]  # fmt: skip
    rows = [
        [
            f"{r['branches']} x {r['tokens']}", f"{r['text_reprefilled']:,}", r["kv_reprefilled"], f"{r['text_s']:.2f}",
            f"{r['kv_s']:.2f}", f"{r['speedup']:.1f}x",
        ]
        for r in found["rows"]
    ]  # fmt: skip
    low, high = found["interval"]
    return (
        table(columns, rows)
        + "\n\n"
        + prose(
            "A server that could join, and is not asked to, takes "
            + f"{found['patched_over_stock']:.3f} of the time that one without the cache and the hook takes (95% CI {low:.3f} to "
            f"{high:.3f}, {found['pairs']} interleaved pairs of requests to one process each; others differ by some percent)."
        )
    )


def soak(found: Found) -> str:
    compared = found["compared"]
    return prose(
        f"{found['operations']:,} random forks, joins, aborts and evictions in a pool of {found['pool_tokens']:,} tokens, checks "
        f"on at every step: {len(found['violations'])} violations, {found['held_when_idle']} tokens held when idle, "
        f"{compared['answers'] - compared['differ']} of {compared['answers']} sampled answers as transformers writes them, the last "
        f"fifth {found['last_to_first']:.2f} as fast as the first."
    )


def runtime(found: Found) -> str:
    low, high = found["wall_ratio_vs_bare_ci95"]
    figures = [
        [
            "the loop, per engine call, without the engine",
            f"{found['loop_overhead_us']:.0f} us",
            "200 us",
        ],
        [
            "wall time over a bare client that sends the same requests and knows the tree beforehand",
            f"{found['wall_ratio_vs_bare']:.3f} (95% CI {low:.3f} to {high:.3f})",
            "1.05",
        ],
        [
            "wall time over the same tokens, one branch after another",
            f"{found['wall_ratio_vs_serial']:.3f}",
            "",
        ],
    ]
    levels = found["levels"]
    walls = [" / ".join(f"{s:.1f}" for s in x["wall_s"]) for x in levels.values()]
    many = [
        ["output tokens/s", *(f"{x['tokens_per_s']:,.0f}" for x in levels.values())],
        ["wall seconds of one, shortest / median / longest", *walls],
        ["peak memory of the client, MB", *(f"{x['peak_rss_mb']:.0f}" for x in levels.values())],
    ]
    at_once = [f"{int(n):,}" for n in levels]
    return table(["", "figure", "bar"], figures) + "\n\n" + table(["trajectories at once", *at_once], many)


def countdown(found: Found) -> str:
    """The models beside each other: in a line, may fork, reinforced."""
    models = found["rows"]

    def line(said: str, of: Callable[[Found], Iterable[str]]) -> list[str]:
        return [said, *(", ".join(of(row)) for row in models)]

    def shares(said: str, name: str, limits: Sequence[str]) -> list[str]:
        return line(said, lambda row: (percent(row[name][limit]) for limit in limits))

    return table(
        ["", "in a line", "may fork", "may fork, reinforced"],
        [
            line(
                "solved (95% interval)",
                lambda r: [f"{percent(r['accuracy'])} ({' to '.join(percent(x)[:-1] for x in r['ci95'])})"],
            ),
            line("three numbers, four", lambda r: [percent(r["by_size"][n]["accuracy"]) for n in "34"]),
            shares("with no context over 128 tokens, 256, 512", "within_context", ("128", "256", "512")),
            shares(
                "within a critical path of 128, 256, 512, 1,024", "within_critical_path", ("128", "256", "512", "1024")
            ),
            shares("within 256 tokens in all, 512, 1,024, 2,048", "within_tokens", ("256", "512", "1024", "2048")),
            line(
                "mean tokens in all, on the critical path",
                lambda r: [f"{r[name]:.0f}" for name in ("total_tokens", "critical_path")],
            ),
            line("replies that fork", lambda r: [f"{r['fork_rate']:.0%}"]),
        ],
    )  # fmt: skip


def countdown_short(found: Found) -> str:
    sequential, _, reinforced = found["rows"]
    return prose(
        f"On {reinforced['problems']:,} held-out problems it solves {percent(reinforced['accuracy'])}, and its twin, which "
        f"searches in a line and has learned from as many tokens of demonstrations, {percent(sequential['accuracy'])}."
    )


def methods(found: Found) -> str:
    columns = [
        "method", "solved", "total tokens", "critical path", "calls", "cached", "wall s", "one request at a time", "label",
    ]  # fmt: skip
    return table(columns, [_method(row) for row in found["rows"]])


def _method(row: Found) -> list[object]:
    if row["accuracy"] is None:
        return [f"`{row['method']}`", f"none: {row['reason']}", *[""] * 7]
    return [
        f"`{row['method']}`", f"{row['accuracy']:.0%}", f"{row['total_tokens']:,.0f}", f"{row['critical_path']:,.0f}",
        f"{row['engine_calls']:.1f}", f"{row['cached_share']:.0%}", f"{row['wall_s']:.1f}",
        f"{row['one_by_one_s'] / row['alone_s']:.1f}x", row["label"],
    ]  # fmt: skip


def methods_short(found: Found) -> str:
    """Those that could be asked, and that the model knows, with what matters most."""
    asked = [r for r in found["rows"] if r["accuracy"] is not None and "by grammar alone" not in r["label"]]
    columns = ["method", "solved", "total tokens", "critical path", "wall s", "one request at a time"]
    return table(columns, [[_method(row)[k] for k in (0, 1, 2, 3, 6, 7)] for row in asked])


SECTIONS: dict[str, Callable[[Found], str]] = {
    f.__name__: f
    for f in (
        trie, validity, grammar, attention, join, soak, runtime, countdown, countdown_short, methods, methods_short,
    )
}  # fmt: skip


def written(page: str, kept: Mapping[str, Found]) -> str:
    """A page with the sections of what was kept; raises ValueError for a section that nobody knows."""

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"no section {name!r}, expected one of {', '.join(SECTIONS)}")
        entry = kept.get(name.removesuffix("_short"))
        if entry is None:
            return match[0]
        machine = entry["hardware"]
        source = (
            f"<!-- {entry['date'][:10]}, commit {entry['commit']}, {machine['cores']} x {machine['cpu']} -->"
        )
        bars = "; ".join(entry["found"].get("missed", ()))
        said = SECTIONS[name](entry["found"]) + (f"\n\nNot met: {bars}." if bars else "")
        return f"{begin}{source}\n{said}\n{end}"

    return SECTION.sub(section, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Keep what was measured, and write the pages; with --check, only say which differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", nargs="?", type=Path, help="what benchmarks/run_all.py has written")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    kept: dict[str, Found] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if options.measured:
        new = json.loads(options.measured.read_text())
        kept |= {name: e for name, e in new.items() if e["ok"] or e.get("found", {}).get("missed")}
    different = [page for page in PAGES if written(text := page.read_text(), kept) != text]
    if not options.check:
        for page in different:
            page.write_text(written(page.read_text(), kept))
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    for page in different:
        print(page.relative_to(ROOT))
    return int(options.check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
