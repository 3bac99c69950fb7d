"""Round trips of trajectories through Arrow and Parquet, and what is an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, List, Value
from hypothesis import given, settings

import sgl_apr as apr
from sgl_apr.trajectory import dataset
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision, TokenLogprob
from sgl_apr.trajectory.dataset import from_dataset, to_dataset
from sgl_apr.trajectory.spans import Span
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.trajectory.worker_groups import GroupRecord
from tests.support.threadweaver_traces import TAGS, TRACE, traces

DIALECT = apr.dialect("threadweaver")
TOKENIZER = apr.ByteTokenizer(TAGS)
HIGHEST = 2**63 - 1

# No field has its default value, and every optional field is once None and once not.
FULL = Trajectory(
    spans=(
        Span("prompt", "prompt", "Q: \0ü\U0001f600", (0, HIGHEST), ()),
        Span("text", "decoded", " a", (), (0,), call=0),
        Span("header", "injected", "1:", (7,), (1,), (1, 2), "label", None, None, (0, 1), "outline"),
        Span("text", "decoded", "b", None, (1, 2), finish="eos", call=1),
    ),
    dialect="threadweaver",
    calls=(
        Call(
            "trunk",
            (),
            1,
            2,
            3,
            4,
            0.1,
            1e-300,
            HIGHEST,
            2,
            1,
            (-0.5, -1e-300),
            "step 3",
            ((TokenLogprob(7, -0.5), TokenLogprob(HIGHEST, -1e-300)), ()),
        ),
        Call("branch", (1, 2), 1, None, 3, 4, 0.1 + 0.2, 5.0, -1, 3),
    ),
    wall_s=1 / 3,
    limits=(LimitHit("tokens", (1, 2)), LimitHit("policy", ())),
    decisions=(
        PacingDecision((1,), 4, 2, 1, 0, 99, 0.01, "full"),
        PacingDecision((2,), 4, 2, 1, 0, 99, None, ""),
    ),
    joins=(JoinRecord((1,), "kv"), JoinRecord((1, 2), "text", "lost")),
    seed=5,
    seeds_honoured=True,
    tokens_shared=True,
    tool_calls=(
        ToolCall(
            "call_1", (), "search", '{"query": "\U0001f30d"}', "3 results", "ok", 0.1, 0.25, truncated=True
        ),
        ToolCall("call_2", (1, 2), "search", "{}", "", "timeout", 0.0, 60.0),
    ),
    prompt_layout="[1, [[0], [1]]]",
    groups=(GroupRecord((1,), "hogwild", 7, "\n\n"),),
)
BARE = Trajectory((), "")
SAMPLES = [
    FULL,
    BARE,
    DIALECT.parse(TRACE, TOKENIZER).with_prompt("Q: "),
    DIALECT.parse(TRACE),
    replace(FULL, seed=None),
]


def values(value: Any) -> Iterator[Any]:
    """A dataclass and the dataclasses in it."""
    if is_dataclass(value):
        yield value
        value = tuple(getattr(value, f.name) for f in fields(value))
    if isinstance(value, tuple):
        for item in value:
            yield from values(item)


def test_the_sample_leaves_no_default():
    """Otherwise a field that is lost could go unnoticed."""
    found = list(values(FULL))
    assert {type(v) for v in found} == {
        Trajectory,
        Span,
        Call,
        LimitHit,
        PacingDecision,
        JoinRecord,
        ToolCall,
        TokenLogprob,
        GroupRecord,
    }
    for kind in map(type, found):
        for field in fields(kind):
            assert field.default is MISSING or any(
                getattr(v, field.name) != field.default for v in found if type(v) is kind
            ), f"{kind.__name__}.{field.name}"


def test_every_field_has_a_column():
    features = to_dataset([]).features
    assert {f.name for f in fields(Trajectory)} < set(features)
    for name, kind in {"spans": Span, "calls": Call, "limits": LimitHit, "decisions": PacingDecision}.items():
        assert list(features[name].feature) == [f.name for f in fields(kind)]
    assert features["spans"].feature["token_ids"] == List(Value("int64"))
    assert features["decisions"].feature["step_s"] == Value("float64")
    assert features["seeds_honoured"] == Value("bool")


@pytest.mark.parametrize("samples", [SAMPLES, [BARE]], ids=["all", "bare"])
def test_a_round_trip(samples: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "BATCH_ROWS", 2)
    made = to_dataset(iter(samples))
    assert from_dataset(made) == samples
    made.to_parquet(tmp_path / "t.parquet")
    read = Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read.features == made.features
    assert from_dataset(read) == samples


def test_no_trajectories():
    assert from_dataset(to_dataset([])) == []


@settings(max_examples=50, deadline=None)
@given(text=traces())
def test_any_trace(text: str):
    samples = [DIALECT.parse(text), DIALECT.parse(text, TOKENIZER)]
    assert from_dataset(to_dataset(samples)) == samples


def test_columns_to_filter_by():
    full, bare, counted, uncounted, _ = to_dataset(SAMPLES).remove_columns([f.name for f in fields(BARE)])
    metrics = DIALECT.parse(TRACE, TOKENIZER).metrics()
    assert counted == {
        "prompt": "Q: ",
        "text": TRACE,
        "answer": "The answer is 4.",
        "finish": None,
        "total_tokens": metrics.total,
        "critical_path": metrics.critical_path,
        "branches": 2,
    }
    assert uncounted == {**counted, "prompt": "", "total_tokens": None, "critical_path": None}
    assert (full["finish"], full["answer"]) == ("eos", "b")
    assert (bare["total_tokens"], bare["critical_path"], bare["branches"]) == (0, 0, 0)


def test_a_filtered_and_extended_dataset_is_read():
    made = to_dataset(SAMPLES).filter(lambda row: row["branches"] > 1).select([1, 0])
    made = made.add_column("score", [1.0, 2.0]).with_format("numpy")
    assert from_dataset(made) == [SAMPLES[3], SAMPLES[2]]


def columns(**changed: Any) -> Dataset:
    """One complete row with some columns changed, of the same types."""
    made = to_dataset([FULL])
    return Dataset.from_list([{**made[0], **changed}], features=made.features)


def span(**changed: Any) -> list[dict[str, Any]]:
    return [{**to_dataset([FULL])[0]["spans"][0], **changed}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: to_dataset([FULL]).remove_columns(["calls", "seed"]), "no column calls, seed, expected spans"),
        (lambda: Dataset.from_list([{"text": "a"}]), "no column spans, dialect"),
        (lambda: DatasetDict(train=to_dataset([FULL])), "a datasets.Dataset .one split., found a DatasetDict"),
        (
            lambda: to_dataset([FULL]).cast_column("seed", Value("string")),
            r"column seed .* found Value\('string'\), expected Value\('int64'\)",
        ),
        (lambda: to_dataset([FULL]).remove_columns("spans").add_column("spans", ["a"]), "column spans .* found"),
        (lambda: columns(dialect=None), "row 0: dialect: expected text, found null"),
        (lambda: columns(limits=None), "row 0: limits: expected a list, found null"),
        (lambda: columns(spans=[None]), r"row 0: spans\[0\]: expected an object, found null"),
        (
            lambda: columns(spans=span(token_ids=[1, None])),
            r"row 0: spans\[0\].token_ids\[1\]: expected a whole number, found null",
        ),
        (lambda: columns(spans=span(role="user")), r"row 0: spans\[0\].role: expected prompt or text .* found 'user'"),
        (lambda: columns(spans=span(finish="ok")), r"row 0: spans\[0\].finish: expected stop or eos .* found 'ok'"),
        (lambda: columns(spans=span(parents=[0])), r"row 0: spans\[0\].parents\[0\]: expected a span before span 0"),
    ],
)  # fmt: skip
def test_another_dataset_is_an_error(wrong: Any, message: str):
    with pytest.raises(apr.AprError, match=message):
        from_dataset(wrong())


@pytest.mark.parametrize("change", [{"seed": 2**63}, {"dialect": "\ud800"}])
def test_what_arrow_cannot_hold(change: dict[str, Any]):
    with pytest.raises(apr.AprError, match="Arrow cannot hold"):
        to_dataset([replace(FULL, **change)])


def test_an_error_of_the_iterator_is_not_changed():
    def broken() -> Iterator[Trajectory]:
        yield FULL
        raise OverflowError("mine")

    with pytest.raises(OverflowError, match="mine"):
        to_dataset(broken())


def test_importing_it_is_light():
    code = (
        "import sys, sgl_apr.trajectory.dataset\n"
        "print([m for m in ('datasets', 'pyarrow', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
