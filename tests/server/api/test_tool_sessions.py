"""Trajectories that wait on the server while their clients run tools: with trajectories that only call tools."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.runtime.events import Delta, RequestFinished
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.tools.request import ToolRequest
from sgl_apr.server.api.admission import AdmissionQueue, ServerBusy
from sgl_apr.server.api.counters import ServerCounters
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import CheckedRequest
from sgl_apr.server.api.tools.client_calls import ClientCalls, session_of
from sgl_apr.server.api.tools.messages import match_results, parse_messages, waiting_session
from sgl_apr.server.api.tools.session import CallsWaiting, ToolSession
from sgl_apr.server.api.tools.sessions import ToolSessions

USER = {"role": "user", "content": "Q"}
FINISHED = apr.Trajectory((), "threadweaver")
CHECKED = CheckedRequest((1, 2, 3), ReasonOptions(apr.dialect("threadweaver")))
Script = Callable[["Run"], Awaitable[None]]


@dataclass
class Run:
    """A trajectory that does what a test says."""

    calls: ClientCalls
    emit: Callable[[Any], None]
    results: list[str]

    async def call(self, path: tuple[int, ...] = (), name: str = "search") -> str:
        with self.calls.activity.waiting_for_client():
            result = await self.calls.run_tool(ToolRequest("1", path, name, "{}"))
        self.results.append(result)
        return result

    async def work(self, seconds: float = 0.0) -> None:
        with self.calls.activity.working():
            await asyncio.sleep(seconds)


class Server:
    """The sessions of a server, and clients that send requests to it."""

    def __init__(self, **limits: Any) -> None:
        self.limits = replace(RequestLimits(), **limits)
        self.counters = ServerCounters("m")
        self.admission = AdmissionQueue(self.limits, self.counters.set_load)
        self.sessions = ToolSessions(self.limits, self.counters)
        self.tasks = set[asyncio.Task[Any]]()
        self.results: list[str] = []

    def begin(self, script: Script, messages: Sequence[Any] = (USER,), owner: str = "a", tokens: int = 0):
        """The first turn of a new trajectory."""
        calls = ClientCalls()

        async def run(request: CheckedRequest, on_event: Any) -> apr.Trajectory:
            self.tasks.add(asyncio.current_task())  # type: ignore[arg-type]
            await script(Run(calls, on_event, self.results))
            return FINISHED

        checked = replace(CHECKED, prompt=(1,) * (tokens or 3))
        parsed = parse_messages(messages)
        reply: Any = SimpleNamespace()
        session = ToolSession(calls, checked, parsed, reply, run, self.admission, owner)
        return self.sessions.turn(session)

    def resume(self, messages: Sequence[Any], owner: str = "a"):
        """The turn that continues a trajectory, or None."""
        parsed = parse_messages(messages)
        found = self.sessions.find(parsed, owner)
        return None if found is None else self.sessions.turn(found[0], parsed, found[1])

    @property
    def waits(self) -> dict[str, int]:
        return {name: n for name, n in self.counters.to_json()["tool_waits"].items() if n}

    def check_nothing_left(self) -> None:
        assert all(task.done() for task in self.tasks)
        assert not self.sessions._sessions
        assert not self.sessions._waiting
        assert self.admission.running == self.admission.queued == 0
        assert {name: self.counters.to_json()[name] for name in ("running", "queued", "waiting")} == {
            "running": 0, "queued": 0, "waiting": 0,
        }  # fmt: skip


async def last(turn: Any) -> Any:
    """What a turn ends with."""
    events = [event async for event in turn]
    return events[-1]


def answered(messages: Sequence[Any], waiting: CallsWaiting, results: Sequence[str]) -> list[Any]:
    """The messages of the next request."""
    calls = [{"id": call.id, "function": {"name": call.request.name}} for call in waiting.calls]
    tools = [
        {"role": "tool", "tool_call_id": call.id, "content": result}
        for call, result in zip(waiting.calls, results, strict=True)
    ]
    return [*messages, {"role": "assistant", "content": None, "tool_calls": calls}, *tools]


async def branches(run: Run) -> None:
    """Three branches, each of which calls a tool after some work, and once more after its result."""

    async def branch(number: int) -> None:
        await run.work(0.02 * number)
        await run.call((1, number))
        await run.work()
        await run.call((1, number), "again")

    await asyncio.gather(*(branch(n) for n in range(1, 4)))
    await run.work()


def test_a_response_has_the_calls_of_all_branches_and_the_next_request_continues_them():
    async def main() -> None:
        server = Server()
        first = await last(server.begin(branches))
        assert [call.request.path for call in first.calls] == [(1, 1), (1, 2), (1, 3)]
        assert len({call.id for call in first.calls}) == 3
        assert server.admission.running == 0
        assert server.counters.to_json()["waiting"] == 1
        messages = answered([USER], first, ["a", "b", "c"])
        second = await last(server.resume(messages))
        assert [call.request.name for call in second.calls] == ["again"] * 3
        assert sorted(server.results) == ["a", "b", "c"]
        assert await last(server.resume(answered(messages, second, ["d", "e", "f"]))) is FINISHED
        assert sorted(server.results) == list("abcdef")
        assert server.waits == {"continued": 2}
        server.check_nothing_left()

    asyncio.run(main())


def test_a_call_that_begins_to_wait_after_the_response_comes_with_the_next_one():
    async def main() -> None:
        server, may_call = Server(), asyncio.Event()

        async def script(run: Run) -> None:
            async def late() -> None:
                await may_call.wait()  # as between two attempts of a request
                await run.call((1, 2))

            await asyncio.gather(run.call((1, 1)), late())

        first = await last(server.begin(script))
        assert [call.request.path for call in first.calls] == [(1, 1)]
        may_call.set()
        await asyncio.sleep(0.03)
        messages = answered([USER], first, ["a"])
        second = await last(server.resume(messages))
        assert [call.request.path for call in second.calls] == [(1, 2)]
        assert await last(server.resume(answered(messages, second, ["b"]))) is FINISHED
        server.check_nothing_left()

    asyncio.run(main())


def test_a_call_that_is_known_only_after_the_trajectory_was_idle_is_reported():
    """As in a busy event loop whose timers come before its tasks."""

    async def main() -> None:
        server = Server()

        async def script(run: Run) -> None:
            with run.calls.activity.waiting_for_client():
                await asyncio.sleep(0.03)
                await run.calls.run_tool(ToolRequest("1", (), "search", "{}"))

        async with asyncio.timeout(5):
            waiting = await last(server.begin(script))
            assert await last(server.resume(answered([USER], waiting, ["a"]))) is FINISHED
        server.check_nothing_left()

    asyncio.run(main())


def test_a_result_for_a_branch_that_was_cut_is_taken_and_lost():
    async def main() -> None:
        server = Server()

        async def script(run: Run) -> None:
            cut = asyncio.create_task(run.call((1, 1)))
            await run.call((1, 2))
            cut.cancel()
            await asyncio.wait({cut})
            await run.call()

        first = await last(server.begin(script))
        messages = answered([USER], first, ["a", "b"])
        second = await last(server.resume(messages))
        assert [call.request.path for call in second.calls] == [()]
        assert await last(server.resume(answered(messages, second, ["c"]))) is FINISHED
        server.check_nothing_left()

    asyncio.run(main())


def test_a_trajectory_that_ended_while_it_waited_answers_the_next_request():
    async def main() -> None:
        server = Server()

        async def script(run: Run) -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run.call(), 0.03)

        waiting = await last(server.begin(script))
        await asyncio.sleep(0.04)
        assert await last(server.resume(answered([USER], waiting, ["late"]))) is FINISHED
        server.check_nothing_left()

        async def fails(run: Run) -> None:
            await run.call()
            raise apr.EngineError("gone")

        waiting = await last(server.begin(fails))
        with pytest.raises(apr.EngineError, match="gone"):
            await last(server.resume(answered([USER], waiting, ["a"])))
        server.check_nothing_left()

    asyncio.run(main())


def test_a_client_that_leaves_during_a_turn_ends_the_trajectory_at_once():
    async def main() -> None:
        server = Server()

        async def script(run: Run) -> None:
            await run.call()
            run.emit(Delta((), "x"))
            await run.work(100)

        waiting = await last(server.begin(script))
        turn = server.resume(answered([USER], waiting, ["a"]))
        assert isinstance(await anext(turn), Delta)
        await turn.aclose()
        server.check_nothing_left()
        assert server.resume(answered([USER], waiting, ["a"])) is None  # starts from the messages
        assert server.waits == {"continued": 1, "unknown": 1}

    asyncio.run(main())


def test_trajectories_that_wait_are_bounded_in_time_number_and_tokens():
    async def call(run: Run) -> None:
        await run.call()

    async def main() -> None:
        server = Server(tool_wait=0.05)
        waiting = await last(server.begin(call))
        await asyncio.sleep(0.08)
        server.check_nothing_left()
        assert server.resume(answered([USER], waiting, ["late"])) is None
        assert server.waits == {"expired": 1, "unknown": 1}

        server = Server(max_waiting=3)
        many = [await last(server.begin(call, owner="greedy")) for _ in range(3)]
        other = await last(server.begin(call, owner="modest"))
        assert server.waits == {"evicted": 1}
        assert server.resume(answered([USER], many[0], ["a"]), "greedy") is None  # its oldest
        assert await last(server.resume(answered([USER], other, ["a"]), "modest")) is FINISHED
        assert await last(server.resume(answered([USER], many[1], ["a"]), "greedy")) is FINISHED
        await server.sessions.close()
        server.check_nothing_left()

        server = Server(max_waiting_tokens=100)
        small = await last(server.begin(call, tokens=60))
        large = await last(server.begin(call, tokens=200))  # alone it may be larger than the limit
        assert server.resume(answered([USER], small, ["a"])) is None
        assert await last(server.resume(answered([USER], large, ["a"]))) is FINISHED
        server.check_nothing_left()

    asyncio.run(main())


def test_no_client_continues_the_trajectory_of_another():
    async def main() -> None:
        server = Server()
        waiting = await last(server.begin(lambda run: run.call(), owner="a"))
        assert server.resume(answered([USER], waiting, ["x"]), "b") is None
        assert await last(server.resume(answered([USER], waiting, ["x"]), "a")) is FINISHED

    asyncio.run(main())


def test_a_trajectory_that_waits_has_no_place_and_queues_for_one_when_it_goes_on():
    async def main() -> None:
        server = Server(concurrent=1, queue_timeout=0.05)
        waiting = await last(server.begin(lambda run: run.call()))
        busy = server.begin(lambda run: run.work(0.15))
        other = asyncio.create_task(last(busy))
        await asyncio.sleep(0)
        messages = answered([USER], waiting, ["a"])
        with pytest.raises(ServerBusy):
            await last(server.resume(messages))
        assert server.results == []
        assert await other is FINISHED
        assert await last(server.resume(messages)) is FINISHED  # sent once more
        assert server.results == ["a"]
        server.check_nothing_left()

    asyncio.run(main())


def test_clients_that_leave_while_tools_wait_leave_nothing():
    async def main() -> None:
        server = Server(tool_wait=0.3)
        turns = await asyncio.gather(*(last(server.begin(branches)) for _ in range(100)))
        assert sum(len(turn.calls) for turn in turns) == 300
        assert server.counters.to_json()["waiting"] == 100
        await asyncio.sleep(0.35)
        server.check_nothing_left()
        assert server.waits == {"expired": 100}
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_server_that_stops_ends_all_of_them():
    async def main() -> None:
        server = Server()
        await last(server.begin(branches))
        running = server.begin(lambda run: run.work(100))
        task = asyncio.create_task(anext(running))
        await asyncio.sleep(0.01)
        await server.sessions.close()
        with pytest.raises((asyncio.CancelledError, StopAsyncIteration)):
            await task
        server.check_nothing_left()

    asyncio.run(main())


def test_only_a_server_without_sessions_refuses_them():
    Server().sessions.check_allowed()
    with pytest.raises(apr.AprError, match="--apr-max-waiting 0"):
        Server(max_waiting=0).sessions.check_allowed()


ID = "call_0123456789abcdef01234567_"
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"id": ID + "0"}, {"id": ID + "1"}]}


def result(number: int, text: str = "r") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"{ID}{number}", "content": text}


def match(*messages: Any) -> dict[str, str]:
    parsed = parse_messages(messages)
    assert waiting_session(parsed) == session_of(ID + "0")
    assert parsed[0] == parse_messages([USER])[0]
    return match_results(parsed[1:], [ID + "0", ID + "1"])


def test_results_are_found_in_any_order_and_in_several_messages():
    expected = {ID + "0": "a", ID + "1": "b"}
    assert match(USER, CALLS, result(1, "b"), result(0, "a")) == expected
    one, two = ({"role": "assistant", "tool_calls": [call]} for call in CALLS["tool_calls"])
    assert match(USER, one, result(0, "a"), two, result(1, "b")) == expected
    parts = [{"type": "text", "text": "Q"}]
    assert (
        match({"role": "user", "content": parts, "name": "x"}, CALLS, result(0, "a"), result(1, "b"))
        == expected
    )


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, CALLS, result(0)], f"no result of {ID}1"),
        ([USER, CALLS, result(0), result(0), result(1)], f"two results of .*{ID}0"),
        ([USER, CALLS, result(0), result(1), result(2)], "comes before a message"),
        ([USER, result(0), CALLS, result(1)], "comes before a message"),
        (
            [USER, {"role": "user", "content": "and"}, CALLS, result(0), result(1)],
            "role 'user' follows tool calls",
        ),
    ],
)
def test_results_that_do_not_fit_are_refused(messages: list[Any], expected: str):
    with pytest.raises(apr.AprError, match=expected):
        match(*messages)


def test_a_result_that_is_an_image_is_refused():
    with pytest.raises(apr.AprError, match="has 'image_url', expected text"):
        match(
            USER,
            CALLS,
            result(0),
            result(1) | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        )


def test_a_changed_history_starts_again_from_its_messages():
    async def main() -> None:
        edits: list[Any] = [
            lambda messages: [{"role": "user", "content": "other"}, *messages[1:]],
            lambda messages: messages[1:],
            lambda messages: [{"role": "system", "content": "be brief"}, *messages],
        ]
        for edit in edits:
            server = Server()
            waiting = await last(server.begin(lambda run: run.call()))
            assert server.resume(edit(answered([USER], waiting, ["a"]))) is None
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            server.check_nothing_left()
            assert server.waits == {"restarted": 1}

    asyncio.run(main())


def test_a_request_that_is_repeated_starts_again():
    async def main() -> None:
        server = Server()
        first = await last(server.begin(branches))
        messages = answered([USER], first, ["a", "b", "c"])
        assert isinstance(await last(server.resume(messages)), CallsWaiting)  # and the response was lost
        assert server.resume(messages) is None
        await asyncio.sleep(0.01)
        server.check_nothing_left()

    asyncio.run(main())


def test_of_two_requests_with_the_same_results_at_the_same_time_one_is_answered():
    async def main() -> None:
        server = Server(tool_wait=0.05)
        waiting = await last(server.begin(lambda run: run.call()))
        messages = answered([USER], waiting, ["a"])
        turns = [server.resume(messages) for _ in range(2)]  # both were found before one of them starts
        ended = await asyncio.wait_for(asyncio.gather(*map(last, turns), return_exceptions=True), 5)
        assert ended[0] is FINISHED
        assert isinstance(ended[1], apr.AprError)
        assert "sent already" in str(ended[1])
        server.check_nothing_left()

        waiting = await last(server.begin(lambda run: run.call()))
        turn = server.resume(answered([USER], waiting, ["a"]))
        await asyncio.sleep(0.1)  # its time is up before the turn starts
        with pytest.raises(apr.AprError, match="has just ended"):
            await asyncio.wait_for(last(turn), 5)
        server.check_nothing_left()

    asyncio.run(main())


def test_messages_of_other_servers_are_left_alone():
    foreign = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "x"}]},
        {"role": "tool", "tool_call_id": "x"},
    ]
    assert waiting_session(parse_messages(foreign)) is None
    assert waiting_session(parse_messages([USER])) is None
    assert waiting_session(parse_messages([USER, CALLS, result(0), result(1), USER])) is None
    with pytest.raises(apr.AprError, match="different replies"):
        waiting_session(parse_messages([*foreign, result(0)]))


def test_the_calls_of_the_events_do_not_matter_to_what_is_counted():
    async def main() -> None:
        server = Server()

        async def script(run: Run) -> None:
            run.emit(RequestFinished(0, SimpleNamespace(cached_tokens=2)))  # type: ignore[arg-type]
            run.emit(RequestFinished(1, SimpleNamespace(cached_tokens=9)))  # type: ignore[arg-type]
            await run.call()

        turn = server.begin(script)
        await last(turn)
        (session,) = server.sessions._sessions.values()
        assert session.turn_cached_tokens == 2
        await server.sessions.close()

    asyncio.run(main())
