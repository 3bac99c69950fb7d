"""Groups in requests: what is accepted, and what is refused with which words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sgl_apr.server.shared_cache.parameters import GroupError, check_group, has_group, parse_group
from sgl_apr.server.shared_cache.validation import name_group, validate_worker

THINK = {"kind": "group_think", "worker": 1, "workers": 2, "prompt_tokens": 3, "position_range": 50}
HOGWILD = {"kind": "hogwild", "worker": 0, "workers": 1, "prompt_tokens": 3, "step_end": "\n\n"}


def batch(**changes: Any) -> Any:
    """A batch of two workers, as SGLang has normalized it."""
    sampling = [{"custom_params": {"apr_group": {**THINK, "worker": number}}} for number in range(2)]
    fields = {
        "is_single": False,
        "parallel_sample_num": 1,
        "text": None,
        "input_ids": [[1, 2, 3, 4], [1, 2, 3, 5, 6]],
        "sampling_params": sampling,
        "extra_key": None,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_a_group_is_parsed() -> None:
    group = parse_group({"apr_group": THINK})
    assert (group.kind, group.worker, group.first_position) == ("group_think", 1, 53)
    assert parse_group({"apr_group": HOGWILD}).step_end == "\n\n"
    assert not has_group({})
    assert not has_group(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "hogwash"}, "kind is 'hogwash', expected one of group_think, hogwild"),
        ({"kind": None}, "kind is 'None'"),
        ({"workers": 65}, "workers is '65', expected an integer from 1 to 64"),
        ({"workers": True}, "workers is 'True', expected an integer"),
        ({"worker": 2}, "worker is '2', expected an integer from 0 to 1"),
        ({"worker": -1}, "worker is '-1'"),
        ({"prompt_tokens": 0}, "prompt_tokens is '0', expected an integer of at least 1"),
        ({"position_range": 1.5}, "position_range is '1.5'"),
        ({"step_end": "x"}, "'step_end' is no field of a group of kind group_think"),
        ({"name": 5}, "name is int, expected text"),
    ],
)
def test_a_wrong_group_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupError, match=f"^{message}"):
        parse_group({"apr_group": {**THINK, **changes}})


@pytest.mark.parametrize("step_end", ["", "x" * 65, 5])
def test_a_wrong_end_of_a_step_is_refused(step_end: object) -> None:
    with pytest.raises(GroupError, match="step_end: expected null or a text of 1 to 64 characters"):
        parse_group({"apr_group": {**HOGWILD, "step_end": step_end}})


def test_a_group_that_is_no_object_is_refused() -> None:
    with pytest.raises(GroupError, match="apr_group is str, expected an object"):
        parse_group({"apr_group": "{}"})


def test_workers_have_to_fit_each_other() -> None:
    workers = [parse_group({"apr_group": {**THINK, "worker": number}}) for number in range(2)]
    check_group(workers)
    with pytest.raises(GroupError, match="the request at place 0 is worker 1, expected worker 0"):
        check_group(workers[::-1])
    with pytest.raises(GroupError, match="the batch has 1 requests, expected one for each of 2 workers"):
        check_group(workers[:1])
    other = parse_group({"apr_group": {**THINK, "worker": 1, "position_range": 60}})
    with pytest.raises(GroupError, match="worker 1 has another group than worker 0"):
        check_group([workers[0], other])


def test_the_server_names_a_group() -> None:
    names = set()
    for _ in range(2):
        request = batch()
        given = [item["custom_params"] for item in request.sampling_params]
        name_group(None, request)
        groups = [item["custom_params"]["apr_group"] for item in request.sampling_params]
        assert groups[0]["name"] == groups[1]["name"]
        assert len(groups[0]["name"]) == 32
        assert all("name" not in params["apr_group"] for params in given), (
            "the client's own object is unchanged"
        )
        names.add(groups[0]["name"])
    assert len(names) == 2


def test_a_request_without_a_group_is_left_alone() -> None:
    for sampling in ({}, [{}, {}], [{"custom_params": None}], None):
        request = batch(sampling_params=sampling)
        name_group(None, request)
        assert request.sampling_params == sampling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_single": True}, "expected a batch with one prompt for each worker"),
        ({"parallel_sample_num": 2}, "n is 2, expected 1"),
        ({"text": ["a", "b"], "input_ids": None}, "expected input_ids instead of text"),
        ({"sampling_params": [{"custom_params": {"apr_group": THINK}}, {}]}, "only some requests"),
        ({"input_ids": [[1, 2, 3], [1, 2, 3, 5]]}, "worker 0 has 3 tokens, expected a header after the 3"),
        ({"input_ids": [[1, 2, 3, 4], [1, 2, 4, 5]]}, "worker 1 begins with another prompt"),
        ({"extra_key": ["a", "b"]}, "extra_key differs between workers"),
        ({"lora_path": [None, "b"]}, "lora_path differs between workers"),
    ],
)
def test_a_batch_that_is_no_group_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^worker group: .*{message}"):
        name_group(None, batch(**changes))


def test_a_client_cannot_name_a_group() -> None:
    request = batch()
    for item in request.sampling_params:
        item["custom_params"]["apr_group"]["name"] = "of another client"
    with pytest.raises(ValueError, match="a group has a name already: the server makes it"):
        name_group(None, request)


def worker_request(group: dict[str, Any], **changes: Any) -> Any:
    sampling = SimpleNamespace(
        custom_params={"apr_group": {**group, "name": "g"}}, beam_width=None, max_new_tokens=20
    )
    fields = {
        "sampling_params": sampling,
        "input_ids": [1, 2, 3, 4],
        "return_logprob": False,
        "logprob_start_len": -1,
    }
    return SimpleNamespace(**{**fields, **changes})


def manager(monkeypatch: pytest.MonkeyPatch, context: int = 200, chunk: int = 100, ranks: int = 1) -> Any:
    monkeypatch.setattr("sgl_apr.server.shared_cache.validation._incompatibility", lambda manager, kind: None)
    return SimpleNamespace(
        tokenizer=object(),
        elastic_worker_count=ranks,
        model_config=SimpleNamespace(context_len=context),
        server_args=SimpleNamespace(chunked_prefill_size=chunk),
    )


def test_a_worker_that_fits_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    validate_worker(worker_request(THINK), manager(monkeypatch))
    validate_worker(worker_request(HOGWILD), manager(monkeypatch))
    validate_worker(worker_request(THINK, routed_dp_rank=1), manager(monkeypatch, ranks=2))


@pytest.mark.parametrize(
    ("group", "changes", "limits", "message"),
    [
        ({**THINK, "position_range": 21}, {}, {}, "worker 1 may have 22 tokens, expected at most its position_range"),
        (THINK, {}, {"context": 102}, "may be 103 tokens, expected at most the context of 102"),
        ({**HOGWILD, "workers": 9}, {}, {}, "the tokens of 9 workers may be 201 tokens"),
        ({**THINK, "workers": 3, "position_range": 60}, {"input_ids": [1] * 37}, {}, "headers of 34 tokens for 3 workers"),
        (THINK, {"routed_dp_rank": None}, {"ranks": 2}, "has 2 data-parallel ranks: expected routed_dp_rank"),
        (THINK, {"session_params": {}}, {}, "a worker cannot have a session"),
        (THINK, {"return_logprob": True, "logprob_start_len": 0}, {}, "no log-probabilities of its input"),
    ],
)  # fmt: skip
def test_a_worker_that_does_not_fit_is_refused(
    group: dict[str, Any],
    changes: dict[str, Any],
    limits: dict[str, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(GroupError, match=message):
        validate_worker(worker_request(group, **changes), manager(monkeypatch, **limits))


def test_a_worker_needs_tokens_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    request = worker_request(THINK)
    request.sampling_params.max_new_tokens = 0
    with pytest.raises(GroupError, match="max_new_tokens is 0, expected at least 1"):
        validate_worker(request, manager(monkeypatch))


def test_a_single_request_cannot_be_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    request = worker_request(THINK)
    del request.sampling_params.custom_params["apr_group"]["name"]
    with pytest.raises(GroupError, match="found a single request"):
        validate_worker(request, manager(monkeypatch))
