"""The results of the benchmarks of trained models as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

from benchmarks.common.figures import Result, percent
from benchmarks.common.markdown import table


def _accuracy(row: Result) -> str:
    low, high = row["accuracy_ci95"]
    return f"{percent(row['accuracy'])} ({100 * low:.1f} to {100 * high:.1f})"


def honesty(result: Result) -> str:
    columns = [
        "model",
        "method",
        "problems",
        "trained on",
        "solved",
        "claims that are right",
        "false claims",
        "tokens",
    ]
    return table(columns, [_honesty(row) for row in result["rows"]])


def _honesty(row: Result) -> list[object]:
    first = [f"`{row['model']}`", f"`{row['method']}`", f"`{row['problems']}`"]
    if not row["count"]:
        return [*first, f"not applicable: {row['reason']}", *[""] * 4]
    precision, unsolvable = row["claim_precision"], "unsolvable" in row["problems"]
    return [
        *first, "yes" if row["in_distribution"] else "no", "" if unsolvable else _accuracy(row),
        "" if unsolvable or precision is None else percent(precision), percent(row["false_claims"]), f"{row['tokens']:,.0f}",
    ]  # fmt: skip


def stated_width(result: Result) -> str:
    columns = [
        "model",
        "dialect",
        "width",
        "forks are",
        "exact",
        "first fork",
        "solved",
        "tokens",
        "critical path",
    ]
    return table(
        columns,
        [
            [
                f"`{row['model']}`", f"`{row['dialect']}`", row["width"] or "none", row["way"],
                "" if row["exact"] is None else f"{row['exact']:.0%}", f"{row['branches']:.1f}", _accuracy(row),
                f"{row['tokens']:,.0f}", f"{row['critical_path']:,.0f}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def width_under_load(result: Result) -> str:
    columns = ["problems at once", "forks are", "width", "solved", "tokens", "seconds (median)", "answers/s"]
    return table(
        columns,
        [
            [
                row["at_once"], row["way"], f"{row['width']:.1f}", _accuracy(row), f"{row['tokens']:,.0f}",
                f"{row['median_s']:.2f}", f"{row['answers_per_s']:.1f}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def schools(result: Result) -> str:
    columns = [
        "format", "join", "solved", "each seed", "forked", "tokens", "critical path", "longest context", "read again", "seconds",
    ]  # fmt: skip
    return table(
        columns,
        [
            [
                f"`{row['format']}`", (row["join"] or "none") + ("" if row["trained_for_it"] else ", untrained"),
                _accuracy(row), " ".join(percent(seed) for seed in row["seeds"]), f"{row['fork_rate']:.0%}",
                f"{row['tokens']:,.0f}", f"{row['critical_path']:,.0f}", f"{row['longest_context']:,.0f}",
                f"{row['reprefilled_tokens']:,.0f}", f"{row['wall_s']:.1f}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def step_speed(result: Result) -> str:
    columns = ["loop", "computed tokens", "computed tokens/s", "tokens with a loss/s", "speed"]
    return table(
        columns,
        [
            [
                row["loop"], f"{row['tokens']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['losses_per_s']:,.0f}",
                f"{row['speedup']:.2f}x",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def recursion(result: Result) -> str:
    columns = ["model", "numbers", "limit", "solved", "depth", "tokens", "critical path", "longest context"]
    return table(
        columns,
        [
            [
                row["model"], row["numbers"], row["limit"], _accuracy(row), f"{row['depth']:.2f}", f"{row['tokens']:,.0f}",
                f"{row['critical_path']:,.0f}", f"{row['longest_context']:,.0f}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def early_votes(result: Result) -> str:
    columns = ["vote", "solved", "difference in points", "calls", "calls saved", "tokens"]
    return table(
        columns,
        [
            [
                row["way"], _accuracy(row),
                f"{100 * row['difference']:+.1f} ({100 * row['difference_ci95'][0]:+.1f} to {100 * row['difference_ci95'][1]:+.1f})",
                f"{row['calls']:.1f}", f"{row['calls_saved']:.0%}", f"{row['tokens']:,.0f}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def speculative_search(result: Result) -> str:
    columns = ["method", "solved", "tokens", "calls", "expansions cut", "seconds (median)"]
    low, high = result["mean_speedup_ci95"]
    rows = [
        [
            f"`{row['method']}`", f"{row['accuracy']:.0%}", f"{row['tokens']:,.0f}", f"{row['calls']:.0f}", f"{row['cut']:.1f}",
            f"{row['median_s']:.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    text = (
        f"Median over {result['problems']} problems: {result['speedup']:.2f} times faster (mean {result['mean_speedup']:.2f}, 95% "
        f"interval {low:.2f} to {high:.2f}), with the same answer for {result['same_answers']:.0%} of them."
    )
    return f"{table(columns, rows)}\n\n{text}"


def method_curves(result: Result) -> str:
    """Accuracy by method, one column for each level."""
    levels = dict.fromkeys((row["limit"], row["value"]) for row in result["rows"])
    rows: dict[str, dict[tuple[str, float], str]] = {}
    for row in result["rows"]:
        solved = "" if row["accuracy"] is None else percent(row["accuracy"])
        rows.setdefault(row["method"], {})[row["limit"], row["value"]] = solved
    columns = ["method", *(f"{value:,g} {limit}" for limit, value in levels)]
    text = f"{result['problems']} problems for each budget of tokens."
    if any(limit == "seconds" for limit, _ in levels):
        text = f"{text[:-1]}, {result['timed_problems']} for each deadline."
    expressed = {name: cells for name, cells in rows.items() if any(cells.values())}
    return (
        table(
            columns,
            [[f"`{name}`", *(cells.get(level, "") for level in levels)] for name, cells in expressed.items()],
        )
        + f"\n\n{text}"
    )


def long_context(result: Result) -> str:
    columns = ["size", "problems", "method", "solved", "by kind", "tokens", "critical path", "longest context", "seconds a problem"]  # fmt: skip
    return table(columns, [_long_context(row) for row in result["rows"]])


def _long_context(row: Result) -> list[object]:
    first = [row["size"], row["problems"], f"`{row['method']}`"]
    if row["accuracy"] is None:
        return [*first, "the prompt does not fit", *[""] * 5]
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in row["by_kind"].items())
    return [
        *first, _accuracy(row), kinds, f"{row['tokens']:,.0f}", f"{row['critical_path']:,.0f}", f"{row['longest_context']:,}",
        f"{row['seconds']:.1f}",
    ]  # fmt: skip
