"""An abort reaches the request with exactly the given id, in every queue of SGLang's scheduler."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from sgl_apr.server.security.abort import (
    MAX_REQUEST_ID_LENGTH,
    check_request_id,
    hidden_from_prefix,
    normalize_request,
)


@dataclass(eq=False)
class Request:
    rid: str
    aborted: bool = field(default=False)


@dataclass(eq=False)
class Part:
    rid: str
    is_single: bool = True


class Batch(list[Part]):
    """A request with several prompts."""

    is_single = False
    rid = ("a", "b")


@pytest.mark.parametrize("rid", ["a", "ab", "abc", "", "x"])
def test_only_the_equal_id_begins_with_an_id(rid: str):
    requests = [Request(name) for name in ("a", "ab", "abc", "b", "abd")]
    with hidden_from_prefix(rid, requests):
        assert [r.rid for r in requests if r.rid.startswith(rid) and rid] == [
            r for r in ("a", "ab", "abc") if r == rid
        ]
    assert [r.rid for r in requests] == ["a", "ab", "abc", "b", "abd"]


def test_ids_are_restored_after_an_error():
    request = Request("abc")
    with pytest.raises(ZeroDivisionError), hidden_from_prefix("a", [request]):
        raise ZeroDivisionError
    assert request.rid == "abc"


def test_all_queues_of_sglangs_scheduler_are_covered():
    """The hooks see each `Req`, and nothing but requests and `WaitingMMRequestBase` is compared by prefix."""
    import inspect
    import re

    from sglang.srt.disaggregation.encoder.receiver import MMReceiverBase
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for function in (Scheduler.abort_request, MMReceiverBase.abort_waiting_requests, Req.__init__):
        assert hasattr(function, "__wrapped__"), f"{function.__qualname__} has no hook"
    source = inspect.getsource(inspect.unwrap(Scheduler.abort_request))
    compared = set(re.findall(r"(\w+(?:\.req)?)\.rid\.startswith", source))
    assert compared == {"chunked_req", "req", "decode_req", "decode_req.req"}


def test_the_scheduler_ends_one_request_of_three(monkeypatch: pytest.MonkeyPatch):
    from sgl_apr.server.security import abort

    requests = [Request("apr-1"), Request("apr-10"), Request("apr-")]
    monkeypatch.setattr(abort, "_requests", requests)

    def sglang(scheduler: object, recv: SimpleNamespace) -> None:
        for request in requests:
            request.aborted |= recv.abort_all or request.rid.startswith(recv.rid)

    abort.abort_exact_request(sglang, None, SimpleNamespace(rid="apr-", abort_all=False))
    assert [r.aborted for r in requests] == [False, False, True]
    abort.abort_exact_request(sglang, None, SimpleNamespace(rid="apr-1", abort_all=False))
    assert [r.aborted for r in requests] == [True, False, True]
    abort.abort_exact_request(sglang, None, SimpleNamespace(rid="", abort_all=True))
    assert all(r.aborted for r in requests)


@pytest.mark.parametrize("is_single", [True, False])
def test_what_is_left_of_a_request_is_aborted_but_not_another_with_its_id(
    is_single: bool, monkeypatch: pytest.MonkeyPatch
):
    from sgl_apr.server.security import abort

    monkeypatch.setattr(abort, "ABORT_DELAY_S", 0.0)
    aborted: list[str] = []
    parts = [Part(rid="a"), Part(rid="b")]
    request = parts[0] if is_single else Batch(parts)
    states = {"a": SimpleNamespace(obj=parts[0]), "b": SimpleNamespace(obj=Part(rid="b"))}
    manager = SimpleNamespace(rid_to_state=states, abort_request=aborted.append)
    asyncio.run(abort.abort_own_requests(manager, request))
    assert aborted == ["a"]


@pytest.mark.parametrize("rid", ["", "a\nb", "a\x00", "x" * (MAX_REQUEST_ID_LENGTH + 1), 5, None, "\x1b[2J"])
def test_ids_that_are_refused(rid: object):
    with pytest.raises(ValueError, match="expected a string of 1 to 256 printable characters"):
        check_request_id(rid)


def test_ids_that_are_taken():
    for rid in ("a", "apr-" + "0" * 32, "x" * MAX_REQUEST_ID_LENGTH, "HEALTH_CHECK_1", "a b/ü"):
        check_request_id(rid)


@pytest.mark.parametrize(
    "error", [IndexError("list index out of range"), TypeError("no len()"), AttributeError("x")]
)
def test_fields_that_do_not_fit_one_another_are_refused(error: Exception):
    def normalize(request: Request) -> None:
        raise error

    with pytest.raises(ValueError, match="fields of the request do not fit one another") as refused:
        normalize_request(normalize, Request("a"))
    assert str(error) in str(refused.value)


def test_a_normalized_request_has_its_ids_checked():
    request = Request("a")
    assert normalize_request(lambda request: "result", request) == "result"
    request.rid = "\x1b"
    with pytest.raises(ValueError, match="printable"):
        normalize_request(lambda request: None, request)
