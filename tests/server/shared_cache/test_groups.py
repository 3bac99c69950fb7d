"""Groups of workers in SGLang's own scheduler: their tokens against transformers, and what happens when something goes wrong.

The scheduler runs in this process with SGLang's strict checks of its memory, which raise. Every test also compares what
is free or can be evicted before and after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import pytest
import torch

from benchmarks.common.in_process_scheduler import (
    SchedulerRun,
    make_abort,
    make_request,
    make_scheduler,
    run_requests,
)
from benchmarks.common.worker_groups import CONTROLS, WorkerGroupCase, block_ends, compare_group
from benchmarks.kv_join import groups
from sgl_apr.server.shared_cache import admission
from tests.support.schedulers import Schedulers

KINDS = ("group_think", "hogwild")
STEP_END = "e"  # a letter: the random model writes it in one of ten tokens
# Headers and new tokens of the workers of each group.
SIZES = [
    ([4, 4], [96, 96]),
    ([3, 7, 2], [64, 64, 64]),
    ([3, 3, 5, 2], [64, 32, 16, 64]),
    ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 30, 64, 40, 50, 64, 30]),
]
MAX_LOGPROB_ERROR = 1e-4  # nats: between two implementations in float32
Draw = Callable[[int], list[int]]


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Draw:
    """Draws token ids at random: the same in each run, and others in each test."""
    rng = random.Random(request.node.name)
    return lambda count: [rng.randrange(3, 400) for _ in range(count)]


@pytest.fixture(autouse=True)
def nothing_leaks(schedulers: Schedulers) -> Iterator[None]:
    """Check that a test leaves as many slots and rows free or evictable as there were."""
    before, starts = schedulers.memory(), schedulers.starts
    yield
    if before is not None and starts == schedulers.starts:
        assert schedulers.memory() == before
    else:
        slots, rows = schedulers.memory() or (0, 0)
        scheduler = schedulers._scheduler
        assert (slots, rows) == (scheduler.max_total_num_tokens, scheduler.req_to_token_pool.size)


def commit(scheduler: Any, prompt: list[int]) -> None:
    run_requests(scheduler, [(0, make_request(f"commit{len(prompt)}", prompt, 1))])


def equal_tokens(cases: list[tuple[WorkerGroupCase, SchedulerRun]], reference: Any, tokenizer: Any) -> int:
    """Check that all tokens of groups are the reference's, and that the controls are not. Returns their number."""
    total = 0
    for number, (case, run) in enumerate(cases):
        result = compare_group(case, run, reference, tokenizer)
        assert result.equal == result.tokens, (case.name, result)
        assert result.logprob_error < MAX_LOGPROB_ERROR, (case.name, result)
        total += result.tokens
        for control in CONTROLS[case.kind] if number == len(cases) - 3 else ():  # they take time, too
            other = compare_group(case, run, reference, tokenizer, control)
            assert other.equal < other.tokens / 2, (case.name, control, other)
    return total


def run_cases(
    scheduler: Any,
    kind: Any,
    draw: Draw,
    *,
    step_end: str | None = None,
    cached: bool = True,
    scale: float = 1.0,
    sizes: Sequence[tuple[list[int], list[int]]] = SIZES,
) -> list[tuple[WorkerGroupCase, SchedulerRun]]:
    """Run groups of 2 to 8 workers alone, then two groups at once whose workers arrive one by one beside other requests."""
    prompt = draw(60)
    if cached:
        commit(scheduler, prompt)
    label = f"{kind}-{step_end}"
    cases = []
    for number, (headers, news) in enumerate(sizes):
        news = [max(1, int(new * scale)) for new in news]
        text = prompt if cached else draw(60)
        case = WorkerGroupCase(
            f"{label}{number}", kind, text, [draw(n) for n in headers], news, step_end=step_end
        )
        cases.append((case, run_requests(scheduler, case.due())))
    news = [int(80 * scale)] * 3
    one = WorkerGroupCase(f"{label}-one", kind, prompt, [draw(3) for _ in news], news, step_end=step_end)
    two = WorkerGroupCase(f"{label}-two", kind, prompt, [draw(4) for _ in news], news, step_end=step_end)
    others = [(3 * k, make_request(f"other{k:02}", prompt[: 20 + k] + draw(50), 20)) for k in range(12)]
    run = run_requests(scheduler, [*one.due(1, 5), *two.due(1, 3), *others])
    return [*cases, (one, run), (two, run)]


def check_others(run: SchedulerRun, reference: Any) -> None:
    """Check that ordinary requests are what transformers decodes from their tokens as one sequence."""
    others = [req for rid, req in run.requests.items() if rid.startswith("other")]
    assert others
    for req in others:
        ids = [*req.origin_input_ids, *req.output_ids_through_stop]
        with torch.no_grad():
            rows = (
                reference(torch.tensor([ids])).logits[0, len(req.origin_input_ids) - 1 : -1].log_softmax(-1)
            )
        chosen = rows.gather(-1, torch.tensor(ids[len(req.origin_input_ids) :])[:, None])[:, 0]
        assert float((rows.max(-1).values - chosen).max()) < MAX_LOGPROB_ERROR, req.rid


@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_a_thousand_greedy_tokens_are_those_of_transformers(
    kind: Any, schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    cases = run_cases(schedulers.get(), kind, draw)
    assert equal_tokens(cases, reference, tokenizer) >= 1000
    check_others(cases[-1][1], reference)
    assert [r.finished_reason.to_json()["type"] for r in cases[0][1].requests.values()] == ["length"] * 2


def test_steps_of_hogwild_move_to_the_history(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    cases = run_cases(schedulers.get(), "hogwild", draw, step_end=STEP_END, scale=0.4, sizes=SIZES[1:])
    assert equal_tokens(cases, reference, tokenizer) > 300
    ends = [block_ends(tokenizer, output, STEP_END) for case, run in cases for output in case.outputs(run)]
    assert sum(map(len, ends)) > 50
    successive = [b - a for worker in ends for a, b in pairwise(worker)]
    assert 1 in successive, "a step of a single token"
    case, run = cases[0]
    without_end = WorkerGroupCase(case.name, "hogwild", case.prompt, case.headers, case.new_tokens)
    result = compare_group(without_end, run, reference, tokenizer)
    assert result.equal < result.tokens, "the history changes what workers read"


def test_groups_of_both_kinds_decode_in_the_same_steps(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler = schedulers.get()
    cases = [
        WorkerGroupCase("think", "group_think", draw(30), [draw(2), draw(5)], [30, 20]),
        WorkerGroupCase("wild", "hogwild", draw(50), [draw(3), draw(1), draw(2)], [25, 30, 15]),
        WorkerGroupCase("steps", "hogwild", draw(40), [draw(4), draw(2)], [30, 30], step_end=STEP_END),
        WorkerGroupCase("single", "hogwild", draw(20), [draw(3)], [30], step_end=STEP_END),
    ]
    others = [(4 * k, make_request(f"other{k}", draw(40), 12)) for k in range(4)]
    run = run_requests(scheduler, [*chain(*(case.due(1) for case in cases)), *others])
    for case in cases:
        result = compare_group(case, run, reference, tokenizer)
        assert (result.equal, result.logprob_error < MAX_LOGPROB_ERROR) == (result.tokens, True), (
            case,
            result,
        )
    check_others(run, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ended_by", ["length", "stop token", "abort"])
def test_the_last_token_of_a_worker_is_seen_by_the_others(
    kind: Any, ended_by: str, schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler, prompt, headers = schedulers.get(), draw(60), [draw(3), draw(4), draw(5)]
    commit(scheduler, prompt)
    check_last_token(scheduler, kind, ended_by, prompt, headers, reference, tokenizer)


def check_last_token(
    scheduler: Any, kind: Any, ended_by: str, prompt: Any, headers: Any, reference: Any, tokenizer: Any
) -> None:
    """End worker 1 of 3 before the others, and check that they have seen its last token."""
    case = WorkerGroupCase("ended", kind, prompt, headers, [40, 12 if ended_by == "length" else 40, 40])
    due = case.due()
    if ended_by == "abort":
        due.append((14, make_abort(case.rid(1))))
    if ended_by == "stop token":
        output = case.outputs(run_requests(scheduler, due))[1]
        stop = next(
            token for place, token in enumerate(output) if place >= 9 and output.index(token) == place
        )
        options = {1: {"stop_token_ids": [stop], "ignore_eos": False}}
        case = WorkerGroupCase("ended", kind, prompt, headers, case.new_tokens, sampling=options)
        due = case.due()
    run = run_requests(scheduler, due)
    lengths = [len(output) for output in case.outputs(run)]
    assert lengths[0] == lengths[2] == 40
    assert 5 < lengths[1] < 30
    expected = {"length": "length", "stop token": "stop", "abort": "abort"}[ended_by]
    assert run.finish_reason(case.rid(1))["type"] == expected
    result = compare_group(case, run, reference, tokenizer)
    assert (result.equal, result.logprob_error < MAX_LOGPROB_ERROR) == (result.tokens, True), result
    # The same with a reference in which that token is not read.
    req = run.requests[case.rid(1)]
    req.finished_len = lengths[1] - 1
    assert compare_group(case, run, reference, tokenizer).logprob_error > 100 * MAX_LOGPROB_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_aborted_while_it_waits_is_left_out(
    kind: Any, schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler, prompt = schedulers.get(), draw(60)
    commit(scheduler, prompt)
    case = WorkerGroupCase("waits", kind, prompt, [draw(3), draw(4), draw(5)], [20] * 3)
    # The last worker is late, so the others wait in the queue.
    due = [(1, request) for request in case.requests()[:2]] + [(9, case.requests()[2])]
    run = run_requests(scheduler, [*due, (5, make_abort(case.rid(1)))])
    assert run.finish_reason(case.rid(1))["type"] == "abort"
    assert [len(output) for output in case.outputs(run)] == [20, 0, 20]
    result = compare_group(case, run, reference, tokenizer)
    assert (result.equal, result.tokens) == (40, 40), result


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_whose_workers_all_end_is_forgotten(kind: Any, schedulers: Schedulers, draw: Draw) -> None:
    scheduler, prompt = schedulers.get(), draw(60)
    case = WorkerGroupCase("gone", kind, prompt, [draw(3), draw(4), draw(5)], [40] * 3)
    aborts = [make_abort(case.rid(worker)) for worker in range(3)]
    run = run_requests(scheduler, [*case.due(), *((9, abort) for abort in aborts)])  # while they decode
    assert [run.finish_reason(case.rid(worker))["type"] for worker in range(3)] == ["abort"] * 3
    assert all(0 < len(output) < 20 for output in case.outputs(run))
    early = [(1, request) for request in case.requests()[:2]]  # while two of them wait for the third
    run = run_requests(scheduler, [*early, (5, aborts[0]), (5, aborts[1])])
    assert [run.finish_reason(case.rid(worker))["type"] for worker in range(2)] == ["abort"] * 2
    assert [run.requests[case.rid(worker)].cached_tokens for worker in range(2)] == [0, 0], "never prefilled"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_group_but_its_prompt_is_found_by_others(
    kind: Any, schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler, prompt = schedulers.get(), draw(60)
    commit(scheduler, prompt)
    case = WorkerGroupCase("text", kind, prompt, [draw(3), draw(4)], [20] * 2)
    first = run_requests(scheduler, case.due())
    text = [*prompt, *case.headers[1], *case.outputs(first)[1]]
    run = run_requests(scheduler, [(0, make_request("other", text[:-8], 6))])
    assert run.requests["other"].cached_tokens == len(prompt)
    check_others(run, reference)
    # Nor does a group find what an ordinary request has left of the same text.
    again = run_requests(scheduler, case.due())
    assert {req.cached_tokens for req in again.requests.values()} == {len(prompt)}
    assert case.outputs(again) == case.outputs(first)
    assert compare_group(case, again, reference, tokenizer).equal == 40


def serves_on(scheduler: Any, kind: Any, draw: Draw, reference: Any, tokenizer: Any) -> None:
    """Check that a scheduler still runs ordinary requests and a group."""
    case = WorkerGroupCase("after", kind, draw(30), [draw(2), draw(2)], [8, 8])
    run = run_requests(scheduler, [(0, make_request("other", draw(30), 8)), *case.due()])
    assert len(run.requests["other"].output_ids) == 8
    result = compare_group(case, run, reference, tokenizer)
    assert (result.equal, result.tokens) == (16, 16)


def check_group_failed(run: SchedulerRun, case: WorkerGroupCase, message: str) -> None:
    reasons = [run.finish_reason(case.rid(worker)) for worker in range(len(case.headers))]
    assert {(r["type"], int(r["status_code"])) for r in reasons} == {("abort", 503)}, reasons
    assert all(r["message"].startswith("worker group: ") and message in r["message"] for r in reasons), (
        reasons
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_retracted_worker_ends_its_group(
    kind: Any,
    schedulers: Schedulers,
    reference: Any,
    tokenizer: Any,
    draw: Draw,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers import scheduler as module

    scheduler, prompt = schedulers.get(), draw(60)
    commit(scheduler, prompt)
    case = WorkerGroupCase("retracted", kind, prompt, [draw(3), draw(4), draw(5)], [60] * 3)
    others = [(2, make_request(f"other{k}", draw(50), 60)) for k in range(3)]
    monkeypatch.setattr(module, "TEST_RETRACT", True)  # as SGLANG_TEST_RETRACT=1 does when SGLang is imported
    monkeypatch.setattr(module, "TEST_RETRACT_INTERVAL", 10)
    run = run_requests(scheduler, [*case.due(), *others])
    monkeypatch.undo()
    check_group_failed(run, case, "make room")
    check_others(run, reference)
    assert all(len(run.requests[f"other{k}"].output_ids) == 60 for k in range(3))
    serves_on(scheduler, kind, draw, reference, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_in_chunks_that_tears_a_group_ends_it(
    kind: Any,
    schedulers: Schedulers,
    reference: Any,
    tokenizer: Any,
    draw: Draw,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = schedulers.get()
    monkeypatch.setattr(scheduler, "chunked_prefill_size", 16)
    for name, headers in (("all", [10, 10, 10]), ("first", [40, 2])):
        case = WorkerGroupCase(name, kind, draw(30), [draw(n) for n in headers], [20] * len(headers))
        run = run_requests(scheduler, [*case.due(), (3, make_request("other", draw(50), 8))])
        check_group_failed(run, case, "")
        assert len(run.requests["other"].output_ids) == 8
        check_others(run, reference)
    monkeypatch.undo()
    serves_on(scheduler, kind, draw, reference, tokenizer)


def test_a_group_that_never_fits_or_never_arrives_ends(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, prompt = schedulers.get(), draw(20)
    workers = scheduler.req_to_token_pool.size  # one row is needed for the view
    case = WorkerGroupCase("rows", "group_think", prompt, [draw(1) for _ in range(workers)], [4] * workers)
    check_group_failed(run_requests(scheduler, case.due()), case, "rows")
    monkeypatch.setattr(admission, "ARRIVAL_TIMEOUT_S", 0.3)
    case = WorkerGroupCase("late", "hogwild", prompt, [draw(2), draw(2), draw(2)], [4] * 3)
    run = run_requests(scheduler, case.due()[:2])
    reasons = [run.finish_reason(case.rid(worker)) for worker in range(2)]
    assert [r["message"] for r in reasons] == ["worker group: 2 of 3 workers arrived within 0.3 s"] * 2
    serves_on(scheduler, "hogwild", draw, reference, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_wait_for_rows_do_not_take_that_of_a_group(
    kind: Any, schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler, prompt = schedulers.get(), draw(20)
    rows = scheduler.req_to_token_pool.size
    running = [(0, make_request(f"other{k:02}", draw(10), 40, logprobs=False)) for k in range(rows - 4)]
    # Three workers and the view of the group take the last rows.
    case = WorkerGroupCase("row", kind, prompt, [draw(2), draw(2), draw(2)], [8] * 3)
    waiting = [(5, make_request(f"other-waiting{k}", draw(10), 8)) for k in range(5)]
    run = run_requests(scheduler, [*running, *case.due(5), *waiting])
    result = compare_group(case, run, reference, tokenizer)
    assert (result.equal, result.tokens) == (24, 24), [run.finish_reason(case.rid(n)) for n in range(3)]
    check_others(run, reference)


def test_groups_that_need_more_rows_than_there_are_run_one_after_another(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler = schedulers.get()
    cases = [
        WorkerGroupCase(f"many{n}", KINDS[n % 2], draw(20), [draw(2) for _ in range(8)], [5, 12, 3, 9] * 2)
        for n in range(6)
    ]
    others = [(2 + k, make_request(f"other{k}", draw(20), 6)) for k in range(20)]
    run = run_requests(scheduler, [*chain(*(case.due() for case in cases)), *others])
    for case in cases:
        result = compare_group(case, run, reference, tokenizer)
        assert (result.equal, result.tokens) == (58, 58), (case.name, run.finish_reason(case.rid(0)))
    check_others(run, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_one_group_that_disagree_are_rejected(
    kind: Any, schedulers: Schedulers, draw: Draw
) -> None:
    """The HTTP process checks this. A fault there must not end the scheduler."""
    scheduler, prompt = schedulers.get(), draw(20)
    case = WorkerGroupCase("odd", kind, prompt, [draw(2), draw(2)], [4, 4])
    first, second = case.requests()
    second.sampling_params.custom_params["apr_group"]["prompt_tokens"] = 19
    other = case.requests()[1]
    other.rid = "odd-2"
    run = run_requests(scheduler, [(0, first), (0, second), (1, other)])
    assert run.finish_reason("odd-01")["status_code"] == 400
    assert [len(run.requests[rid].output_ids) for rid in ("odd-00", "odd-2")] == [4, 4]


def test_a_run_that_takes_too_long_is_aborted(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler = schedulers.get()
    case = WorkerGroupCase("long", "group_think", draw(20), [draw(2), draw(2)], [400, 400])
    with pytest.raises(TimeoutError, match=r"not ended after 0\.2 s: long-00, long-01"):
        run_requests(scheduler, case.due(), limit_s=0.2)
    with pytest.raises(RuntimeError, match="a scheduler is in use in this process"):
        make_scheduler(schedulers.model)
    serves_on(scheduler, "group_think", draw, reference, tokenizer)


def test_the_benchmark_names_what_is_missed() -> None:
    row = {"kind": "hogwild", "prompt_tokens": 256, "ratio": 1.3}
    good = {
        "equal": {"group_think": [1000, 1000], "hogwild": [1000, 1000]},
        "controls": {"hogwild": {"blind": [400, 1000]}}, "logprob_error": 1e-5, "leaks": 0, "steps": [row],
    }  # fmt: skip
    assert groups.missed(good) == []
    bad = {
        "equal": {"group_think": [999, 1000], "hogwild": [900, 900]},
        "controls": {"hogwild": {"blind": [600, 1000]}}, "logprob_error": 1e-3, "leaks": 1,
        "steps": [row | {"ratio": 1.36}, row | {"kind": "group_think", "ratio": 1.11}],
    }  # fmt: skip
    assert groups.missed(bad) == [
        "group_think: 999 of 1000 tokens are those of transformers, expected all of 1000 or more",
        "hogwild: 900 of 900 tokens are those of transformers, expected all of 1000 or more",
        "hogwild: 600 of 1000 tokens are those of the control blind, expected others",
        "a log-probability differs by 1.0e-03, expected 0.0001",
        "slots or rows were neither free nor evictable afterwards",
        "hogwild, prompt of 256: 1.36 of independent requests, expected at most 1.35",
        "group_think, prompt of 256: 1.11 of independent requests, expected at most 1.1",
    ]


# From here on with other schedulers.


@pytest.mark.slow
def test_without_overlap_and_with_the_tree_in_python(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler = schedulers.get(overlap=False, core="python")
    assert not scheduler.enable_overlap
    assert type(scheduler.tree_cache.tree_core).__name__ == "UnifiedTreeCore"
    for kind, step_end in (("group_think", None), ("hogwild", None), ("hogwild", STEP_END)):
        cases = run_cases(scheduler, kind, draw, step_end=step_end, cached=False, scale=0.25, sizes=SIZES[3:])
        assert equal_tokens(cases, reference, tokenizer) > 150
        check_others(cases[-1][1], reference)
    for kind, ended_by in (("group_think", "stop token"), ("hogwild", "abort"), ("hogwild", "length")):
        prompt, headers = draw(60), [draw(3), draw(4), draw(5)]
        check_last_token(scheduler, kind, ended_by, prompt, headers, reference, tokenizer)


def test_a_pool_that_is_too_small_ends_the_group(
    schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler = schedulers.get(max_total_tokens=400)
    for kind in KINDS:
        # It never fits, or it fits until the workers have written too much.
        for name, prompt, header, new in (("never", 300, 60, 4), ("later", 60, 4, 200)):
            case = WorkerGroupCase(name, kind, draw(prompt), [draw(header) for _ in range(3)], [new] * 3)
            check_group_failed(run_requests(scheduler, case.due()), case, "")
        serves_on(scheduler, kind, draw, reference, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("cached", [True, False])
def test_all_configurations_at_length(
    overlap: bool, core: str, cached: bool, schedulers: Schedulers, reference: Any, tokenizer: Any, draw: Draw
) -> None:
    scheduler = schedulers.get(overlap=overlap, core=core)
    for kind, step_end in (("group_think", None), ("hogwild", None), ("hogwild", STEP_END)):
        cases = run_cases(scheduler, kind, draw, step_end=step_end, cached=cached, scale=1.2)
        assert equal_tokens(cases, reference, tokenizer) >= 1500
        check_others(cases[-1][1], reference)
    for kind in KINDS:
        for ended_by in ("length", "stop token", "abort"):
            headers = [draw(3), draw(4), draw(5)]
            check_last_token(scheduler, kind, ended_by, draw(60), headers, reference, tokenizer)
