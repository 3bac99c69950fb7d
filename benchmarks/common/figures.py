"""The results of each benchmark as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Any

from benchmarks.common.markdown import table

Result = Mapping[str, Any]


def speedup_range(values: Sequence[float]) -> str:
    """The smallest and the largest of some factors."""
    low, high = (f"{x:.1f}" for x in (min(values), max(values)))
    return f"{low}x" if low == high else f"{low}-{high}x"


def prose(text: str) -> str:
    """Text in lines of at most 118 characters."""
    return fill(text, 118, break_on_hyphens=False)


def percent(share: float) -> str:
    """A share in percent with one decimal, halves rounded up."""
    return f"{100 * share + 1e-9:.1f}%"


def tree_build(result: Result) -> str:
    return prose(
        f"The training tree of {result['sequences']} sequences, {result['flat_tokens']:,} tokens in one row, takes "
        f"{1000 * result['seconds']:.0f} ms and at most {result['peak_mb']:.1f} MB."
    )


def validity(result: Result) -> str:
    columns = ["tags", "grammar", "valid", "valid and forked", "closers written", "closers injected"]
    rows = [
        [
            {"tokens": "tokens", "text": "spelled out"}[r["tags"]], "on" if r["grammar"] else "off",
            f"{r['valid']} of {r['replies']}", r["valid_and_forked"], r["closers_decoded"], r["closers_injected"],
        ]
        for r in result["rows"]
    ]  # fmt: skip
    return table(columns, rows)


def mask_latency(result: Result) -> str:
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
        for name, r in result["dialects"].items()
    ]  # fmt: skip
    nested = [
        f"{r['nested']} of the replies in `{name}` forked again inside a branch."
        for name, r in result["dialects"].items()
        if r["nested"]
    ]
    return "\n\n".join([table(columns, rows), *nested])


# The rows of the table of kernels.attention, and the cases that each row summarizes.
ATTENTION_ROWS: tuple[tuple[str, Callable[[Result], bool]], ...] = (
    ("decode, 1-4 requests", lambda c: c["name"] == "decode" and c["requests"] <= 4),
    ("decode, 8-16 requests", lambda c: c["name"] == "decode" and 8 <= c["requests"] <= 16),
    ("decode, 32-64 requests", lambda c: c["name"] == "decode" and c["requests"] >= 32),
    ("decode, 8-64 branches of a fork", lambda c: c["name"].startswith("decode, fork")),
    ("extend, 2 new over 2,304 cached", lambda c: c["name"].startswith("extend") and c["new"] == 2),
    ("extend, 8 branches of 10 new over 500 cached", lambda c: c["name"] == "extend, fork of 8"),
    ("prefill, 1,000", lambda c: c["name"] == "prefill"),
)


def attention(result: Result) -> str:
    timings, fork = result["timings"], result["fork"]
    shapes = {"smollm2": "SmolLM2-135M's shape"} | {
        t["case"]["shape"]: "the tests' tiny Llama" for t in timings if t["case"]["shape"] != "smollm2"
    }

    def speedups(shape: str, member: Callable[[Result], bool]) -> list[float]:
        return [t["speedup"] for t in timings if t["case"]["shape"] == shape and member(t["case"])]

    rows = [
        [name, *(speedup_range(speedups(shape, member)) for shape in shapes)]
        for name, member in ATTENTION_ROWS
    ]
    difference = max(t["max_difference"] for t in timings)
    return (
        table(["", *shapes.values()], rows)
        + "\n\n"
        + prose(
            f"Largest difference in the outputs: {difference:.0e} (fp32). When {fork['branches']} branches decode over a prefix "
            f"of {fork['prefix']:,} tokens, reading the prefix once makes it {fork['speedup']:.1f}x as fast."
        )
    )


def join_latency(result: Result) -> str:
    columns = [
        "branches x tokens", "prefilled tokens, text join", "KV join", "text join, s", "KV join, s", "speed-up of the KV join",
    ]  # fmt: skip
    rows = [
        [
            f"{r['branches']} x {r['tokens']}", f"{r['text_reprefilled']:,}", r["kv_reprefilled"], f"{r['text_s']:.2f}",
            f"{r['kv_s']:.2f}", f"{r['speedup']:.1f}x",
        ]
        for r in result["rows"]
    ]  # fmt: skip
    low, high = result["interval"]
    return (
        table(columns, rows)
        + "\n\n"
        + prose(
            f"On requests without a join, the server with the cache and the hook takes {result['patched_over_stock']:.3f} of the "
            f"time of a server without them (95% CI {low:.3f} to {high:.3f}, {result['pairs']} interleaved pairs of requests to "
            "one process each; other processes differ by some percent)."
        )
    )


def groups(result: Result) -> str:
    names = {"group_think": "Group Think", "hogwild": "Hogwild!"}
    columns = [
        "group",
        "tokens equal to transformers",
        "controls",
        "step, prompt of 256",
        "step, prompt of 2,048",
    ]
    rows = []
    for kind, (equal, tokens) in result["equal"].items():
        controls = ", ".join(
            f"{name.replace('_', ' ')} {percent(same / total)}"
            for name, (same, total) in result["controls"][kind].items()
        )
        steps = [
            f"{r['ratio']:.2f}x ({r['interval'][0]:.2f} to {r['interval'][1]:.2f})"
            for r in result["steps"]
            if r["kind"] == kind
        ]
        rows.append([names[kind], f"{equal:,} of {tokens:,}", controls, *steps])
    independent = {r["prompt_tokens"]: r["independent_ms"] for r in result["steps"]}
    times = " and ".join(f"{ms:.0f} ms after {tokens:,} tokens" for tokens, ms in independent.items())
    return (
        table(columns, rows)
        + "\n\n"
        + prose(
            f"Log-probabilities differ by at most {result['logprob_error']:.0e} nats. Steps are relative to those of independent "
            f"requests, which take {times}; intervals are 95%. A control is the share of tokens that are also the most likely "
            "ones of a reference that must differ."
        )
    )


def soak(result: Result) -> str:
    compared = result["compared"]
    groups = result.get("compared_groups")  # older results have none
    same_groups = (
        f", {groups['groups'] - groups['differ']} of {groups['groups']} groups of workers" if groups else ""
    )
    return prose(
        f"{result['operations']:,} random forks, joins, groups, aborts and evictions in a pool of {result['pool_tokens']:,} tokens, "
        f"with checks at every step: {len(result['violations'])} violations, {result['held_when_idle']} tokens held when idle, "
        f"{compared['answers'] - compared['differ']} of {compared['answers']} sampled answers equal to those of transformers{same_groups}, "
        f"the last fifth of the operations {result['last_to_first']:.2f} times as fast as the first."
    )


# By the name in the results, as in benchmarks/common/processes.py.
CPU_ROLES = {
    "client": "the client",
    "http": "HTTP and tokenizer manager",
    "scheduler": "scheduler and model",
    "detokenizer": "detokenizer",
}


def _cpu_ms(level: Result, role: str) -> float:
    milliseconds: float = 1000 * level["cpu_s"][role] / level["trajectories"]
    return milliseconds


def overhead(result: Result) -> str:
    low, high = result["wall_ratio_vs_bare_ci95"]
    if "loop_cpu_us" in result:
        loop = ["CPU time of the loop per engine call, without the engine", "loop_cpu_us", "150 us"]
    else:  # results of earlier versions
        loop = ["loop time per engine call, without the engine", "loop_overhead_us", "200 us"]
    figures = [
        [loop[0], f"{result[loop[1]]:.0f} us", loop[2]],
        [
            "wall time relative to a bare client that knows the tree and sends the same requests",
            f"{result['wall_ratio_vs_bare']:.3f} (95% CI {low:.3f} to {high:.3f})",
            "1.05",
        ],
        [
            "wall time relative to the same tokens with one branch at a time",
            f"{result['wall_ratio_vs_serial']:.3f}",
            "",
        ],
    ]
    levels = result["levels"]
    walls = [" / ".join(f"{s:.1f}" for s in x["wall_s"]) for x in levels.values()]
    throughput = [
        ["output tokens/s", *(f"{x['tokens_per_s']:,.0f}" for x in levels.values())],
        ["wall seconds of a trajectory, shortest / median / longest", *walls],
        ["peak memory of the client, MB", *(f"{x['peak_rss_mb']:.0f}" for x in levels.values())],
    ]
    if all("cpu_s" in x for x in levels.values()):  # not in results of earlier versions
        throughput += [
            ["trajectories at once, on average", *(f"{x['mean_parallel']:.0f}" for x in levels.values())],
            ["prompt tokens from the cache", *(percent(x["cached_share"]) for x in levels.values())],
            *(
                [f"CPU ms of a trajectory: {label}", *(f"{_cpu_ms(x, role):.0f}" for x in levels.values())]
                for role, label in CPU_ROLES.items()
            ),
        ]
    counts = [f"{int(n):,}" for n in levels]
    return (
        table(["", "figure", "bar"], figures)
        + "\n\n"
        + table(["concurrent trajectories", *counts], throughput)
    )


def startup(result: Result) -> str:
    """One row for each variant, and the time of the demo."""
    phases = list(result["rows"][0]["phases"])
    rows = [
        [r["variant"], f"{r['seconds']:.1f} ({r['min_s']:.1f}-{r['max_s']:.1f})", f"{r['cpu_s']:.1f}"]
        + [f"{r['phases'][phase]:.1f}" for phase in phases]
        for r in result["rows"]
    ]
    text = table(["variant", "seconds", "CPU seconds", *phases], rows)
    if demo := result.get("demo"):
        text += f"\n\n`make demo` takes {demo['seconds']:.1f} s in an environment that is ready (bar 35)."
    return text


def budgets(result: Result) -> str:
    """One row for each budget, one column for each method."""
    rows, methods = result["rows"], list(dict.fromkeys(r["method"] for r in result["rows"]))
    found = {(r["tokens"], r["method"]): r for r in rows}

    def cell(row: Result | None) -> str:
        if row is None or row["accuracy"] is None:
            return "-"
        low, high = row["ci95"]
        return f"{percent(row['accuracy'])} ({100 * low:.0f}-{100 * high:.0f}), {row['mean_tokens']:.0f}"

    body = [
        [f"{tokens:,}", *(cell(found.get((tokens, method))) for method in methods)]
        for tokens in dict.fromkeys(r["tokens"] for r in rows)
    ]
    return table(["tokens", *(f"`{m}`" for m in methods)], body) + (
        "\n\nSolved, with the 95% interval in points, and the tokens of a reply."
    )


def agents(result: Result) -> str:
    rows = [
        [
            str(row["workers"]),
            f"{row['context']:,}",
            percent(row["min_cached_share"]),
            f"{row['wall_s']:.2f}",
            f"{row['serial_wall_s']:.2f}",
            f"{row['serial_wall_s'] / row['wall_s']:.2f}",
            percent(row["second_turn_cached"]),
        ]
        for row in result["rows"]
    ]
    heads = [
        "workers", "shared tokens", "found in the cache", "s at once", "s in sequence", "gain", "second turn",
    ]  # fmt: skip
    return table(heads, rows)


def eager(result: Result) -> str:
    def cells(row: Result, form: Callable[[float], str]) -> list[str]:
        intervals = (row[key] for key in ("latency_s", "critical_path", "tokens", "calls"))
        return [f"{form(middle)} ({form(low)} to {form(high)})" for middle, low, high in intervals]

    rows = [[row["way"], *cells(row, lambda x: f"{x:.4g}")] for row in result["rows"]]
    rows.append(["ratio on the same problem", *cells(result["ratio"], lambda x: f"{x:.3f}")])
    return (
        table(["branches start after", "latency, s", "critical path, tokens", "tokens", "requests"], rows)
        + "\n\n"
        + prose(
            f"{result['problems']} problems with {result['branches']:g} branches (median), {result['rounds']} rounds. In "
            f"{result['same_text']} of them all attempts of both ways have the same text."
        )
    )


def peers(result: Result) -> str:
    rounds = result["rounds"]

    def row(label: str, key: Callable[[Result], float], form: str = ".0f") -> list[str]:
        medians = (median(key(r[client]) for r in rounds) for client in ("runtime", "thread_pool"))
        return [label, *(f"{value:{form}}" for value in medians)]

    def cpu_row(label: str, kind: str) -> list[str]:
        return row(f"CPU seconds, {label}", lambda r: r["cpu_s"][kind], ".1f")

    figures = [
        row("wall seconds until the last reply", lambda r: r["wall_s"], ".1f"),
        cpu_row("client", "client"),
        cpu_row("HTTP process", "http"),
        cpu_row("scheduler", "scheduler"),
        cpu_row("detokenizer", "detokenizer"),
        row("valid replies", lambda r: r["valid"]),
        row("requests", lambda r: r["requests"]),
        row("prefilled tokens", lambda r: r["prefilled_tokens"], ",.0f"),
        row("decoded tokens", lambda r: r["decoded_tokens"], ",.0f"),
    ]
    ratios = sorted(r["reply_ratio"] for r in rounds if r["reply_ratio"] is not None)
    return (
        table([f"{result['questions']} questions", "runtime", "thread pool"], figures)
        + "\n\n"
        + prose(
            f"Over the replies that both clients finish with as many tokens ({result['compared']:.0f} of "
            f"{result['questions']}), the runtime takes {result['reply_ratio']:.3f} of the time of the thread pool (median of "
            f"{len(rounds)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}; bar 1.0), and {result['wall_ratio']:.3f} until the last "
            f"reply. {result['same_text']:.0f} replies have the same text."
        )
    )


def countdown(result: Result) -> str:
    models = result["rows"]

    def row(label: str, cells: Callable[[Result], Iterable[str]]) -> list[str]:
        return [label, *(", ".join(cells(model)) for model in models)]

    def shares(label: str, name: str, limits: Sequence[str]) -> list[str]:
        return row(label, lambda model: (percent(model[name][limit]) for limit in limits))

    return table(
        ["", "sequential", "may fork", "may fork, after GRPO"],
        [
            row(
                "solved (95% interval)",
                lambda m: [f"{percent(m['accuracy'])} ({' to '.join(percent(x)[:-1] for x in m['ci95'])})"],
            ),
            row("solved with three numbers, four", lambda m: [percent(m["by_size"][n]["accuracy"]) for n in "34"]),
            shares("solved with no context over 128 tokens, 256, 512", "within_context", ("128", "256", "512")),
            shares(
                "solved within a critical path of 128 tokens, 256, 512, 1,024", "within_critical_path",
                ("128", "256", "512", "1024"),
            ),
            shares(
                "solved within 256 total tokens, 512, 1,024, 2,048", "within_tokens", ("256", "512", "1024", "2048")
            ),
            row(
                "mean total tokens, critical path",
                lambda m: [f"{m[name]:.0f}" for name in ("total_tokens", "critical_path")],
            ),
            row("replies that fork", lambda m: [f"{m['fork_rate']:.0%}"]),
        ],
    )  # fmt: skip


def methods(result: Result) -> str:
    columns = [
        "method", "solved", "total tokens", "critical path", "calls", "cached", "wall s", "one request at a time", "label",
    ]  # fmt: skip
    return table(columns, [_method(row) for row in result["rows"]])


def _method(row: Result) -> list[object]:
    if row["accuracy"] is None:
        return [f"`{row['method']}`", f"not applicable: {row['reason']}", *[""] * 7]
    return [
        f"`{row['method']}`", f"{row['accuracy']:.0%}", f"{row['total_tokens']:,.0f}", f"{row['critical_path']:,.0f}",
        f"{row['engine_calls']:.1f}", f"{row['cached_share']:.0%}", f"{row['wall_s']:.1f}",
        f"{row['one_by_one_s'] / row['alone_s']:.1f}x", row["label"],
    ]  # fmt: skip
