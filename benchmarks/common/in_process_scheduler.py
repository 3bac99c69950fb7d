"""Runs SGLang's scheduler in this process, without a server: requests are given to its own event loop by hand.

Everything between the scheduler's input queue and its output queue is the code that serves: admission, batches, the model, the
cache, the checks of memory. There is no HTTP, no tokenizer process and no other process, so a start takes seconds, and
a test can look at the scheduler's own objects.

One scheduler can be in use at a time, because SGLang keeps one configuration a process. Call `close_scheduler` before
the next `make_scheduler`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.launch.defaults import CPU_FLAGS, SERVER_ENVIRONMENT, as_flags
from sgl_apr.server.launch.server_folder import ServerFolder

os.environ |= SERVER_ENVIRONMENT | dict(os.environ)  # as in the server; torch reads it when it is loaded

IDLE_ROUNDS = 3  # at the end of a run, so that SGLang's checks of an idle scheduler are among them
ABORT_LIMIT_S = 10.0  # for the requests that are aborted when a run takes too long

Requests = dict[str, Any]  # the scheduler's Req objects by request id
_COMMON: dict[str, Any] = {
    "radix_cache_backend": "apr", "schedule_policy": "lpm", "grammar_backend": "none", "max_running_requests": 32,
    "max_total_tokens": 16384, "random_seed": 0, "log_level": "error", "watchdog_timeout": 100000,
}  # fmt: skip
_in_use: tuple[Any, contextlib.ExitStack] | None = None  # a scheduler, and what undoes its start


@dataclass(frozen=True, slots=True)
class SchedulerRun:
    """What happened to some requests.

    Attributes:
        requests: The scheduler's own Req objects, by request id.
        aborted: The finish reason, by request id, of requests that the scheduler ended while they waited. Their Req
            objects have no reason.
        seconds: How long the run took.
        rounds: How many rounds the event loop made.
        round_starts: When each round began, in seconds of `time.perf_counter`.
    """

    requests: Requests
    aborted: dict[str, Mapping[str, Any]]
    seconds: float
    rounds: int
    round_starts: tuple[float, ...]

    @property
    def round_seconds(self) -> list[float]:
        """The seconds of every round but the last one."""
        return [b - a for a, b in zip(self.round_starts, self.round_starts[1:], strict=False)]

    def finish_reason(self, rid: str) -> dict[str, Any]:
        """Why a request ended, as SGLang's JSON."""
        return dict(
            self.aborted[rid] if rid in self.aborted else self.requests[rid].finished_reason.to_json()
        )


def make_scheduler(model: str | Path, *, overlap: bool = True, **flags: Any) -> Any:
    """Start SGLang's scheduler in this process.

    Args:
        model: The directory of a checkpoint.
        overlap: Whether the scheduler prepares a step while the one before is computed.
        flags: Flags of SGLang's server, with underscores. They replace the defaults; None removes a default.

    Returns:
        The `Scheduler`.

    Raises:
        RuntimeError: Another scheduler is still in use, or the plugin was not loaded.
    """
    global _in_use
    if _in_use is not None:
        raise RuntimeError("a scheduler is in use in this process: close it first with close_scheduler")
    with contextlib.ExitStack() as cleanup, _quiet_stderr():
        scheduler = _start(model, overlap, flags, cleanup)
        _in_use = scheduler, cleanup.pop_all()
    return scheduler


def _start(model: str | Path, overlap: bool, flags: Mapping[str, Any], cleanup: contextlib.ExitStack) -> Any:
    """Start a scheduler as SGLang's scheduler process does. What has to be undone is added to `cleanup`."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish, restore_context, snapshot_context
    from sglang.srt.server_args import PortArgs, prepare_server_args

    from sgl_apr.server import plugin

    if not plugin.activated:
        raise RuntimeError(
            "SGLang did not load the plugin of sgl-apr: is it installed, and in SGLANG_PLUGINS?"
        )
    for name in (None, "sglang"):  # SGLang sets the level of the root logger to its `log_level`
        cleanup.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    cpu = (
        {} if has_accelerator() else {name[2:].replace("-", "_"): value for name, value in CPU_FLAGS.items()}
    )
    cpu.pop("sleep_on_idle", None)
    options = {"model_path": model, **_COMMON, **cpu, "disable_overlap_schedule": not overlap, **flags}
    cleanup.callback(restore_context, snapshot_context())
    cleanup.callback(_leave_process_groups)
    with _server_folder():  # of the sockets, which exist until `_disconnect` only
        args = prepare_server_args(as_flags(options))
        args.resolve_once()
        ports = PortArgs.init_new(args)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
        scheduler = Scheduler(args, ports)
        _disconnect(scheduler)
    return scheduler


def close_scheduler(scheduler: Any) -> None:
    """Shut a scheduler down, so that another one can start in this process. Does nothing the second time."""
    global _in_use
    if _in_use is None or _in_use[0] is not scheduler:
        return
    cleanup, _in_use = _in_use[1], None
    scheduler.release_host_resources()
    cleanup.close()
    vars(scheduler).clear()  # SGLang's own references to it would keep the model and its cache in memory
    gc.collect()


def make_request(
    rid: str,
    ids: Sequence[int],
    new_tokens: int,
    custom_params: Mapping[str, Any] | None = None,
    logprobs: bool = True,
    **sampling: Any,
) -> Any:
    """Make a request as the scheduler receives it.

    Args:
        rid: The request id.
        ids: The token ids of the prompt.
        new_tokens: How many tokens to decode at most.
        custom_params: `custom_params` of the sampling parameters, such as a layout or a group.
        logprobs: Whether log-probabilities of the decoded tokens are computed.
        sampling: Other sampling parameters. Decoding is greedy and ignores end-of-sequence tokens unless they differ.

    Returns:
        A `TokenizedGenerateReqInput`.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
    params = SamplingParams(**options | {"custom_params": custom_params and dict(custom_params)} | sampling)
    params.normalize(None)
    params.verify(1 << 30)
    return TokenizedGenerateReqInput(
        rid=rid, input_text=None, input_ids=array("q", ids), input_embeds=None, mm_inputs=None, token_type_ids=None,
        sampling_params=params, return_logprob=logprobs, logprob_start_len=-1, top_logprobs_num=0,
        token_ids_logprob=None, stream=False,
    )  # fmt: skip


def make_abort(rid: str | None) -> Any:
    """Make the message by which a client aborts the request with this id; with None, all requests."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(rid=rid, abort_all=rid is None)


def run_requests(
    scheduler: Any,
    due: Iterable[tuple[int, Any]],
    limit_s: float = 60.0,
    at: Mapping[int, Callable[[Requests], None]] | None = None,
) -> SchedulerRun:
    """Run the scheduler's event loop until all requests have ended.

    Args:
        scheduler: From `make_scheduler`.
        due: The round of the event loop in which the scheduler receives a message, and the message: a request from
            `make_request`, or one from `make_abort`.
        limit_s: After that many seconds everything is aborted.
        at: What to call at the beginning of a round, by round, with the Req objects so far.

    Returns:
        What happened.

    Raises:
        TimeoutError: Some requests have not ended within `limit_s`. The scheduler can still be used, unless their
            abort took too long, too.
    """
    loop = _EventLoop(scheduler, sorted(due, key=lambda message: message[0]), limit_s, at or {})
    return loop.run()


def memory_state(scheduler: Any) -> tuple[int, int]:
    """The number of KV slots that are free or can be evicted, and of free rows of the request table."""
    slots = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return int(slots), len(scheduler.req_to_token_pool.free_slots)


@dataclass
class _EventLoop:
    """One run of the event loop: what is sent to the scheduler, and what it answers."""

    scheduler: Any
    due: list[tuple[int, Any]]
    limit_s: float
    at: Mapping[int, Callable[[Requests], None]]
    requests: Requests = field(default_factory=dict)
    aborted: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    idle_rounds: int = 0
    late: list[str] = field(default_factory=list)  # requests that had not ended within the limit
    ends: float = 0.0

    def __post_init__(self) -> None:
        self.expected = {message.rid for _, message in self.due if hasattr(message, "sampling_params")}

    def run(self) -> SchedulerRun:
        scheduler = self.scheduler
        add_to_queue, send_abort = scheduler._add_request_to_queue, scheduler.send_abort_output

        def add_to_queue_and_record(req: Any, *arguments: Any, **options: Any) -> Any:
            self.requests[req.rid] = req
            return add_to_queue(req, *arguments, **options)

        def record_abort(message: Any, req: Any) -> None:
            self.requests.setdefault(req.rid, req)
            self.aborted[req.rid] = message.finished_reason or {
                "type": "abort",
                "message": message.abort_message,
            }
            send_abort(message, req)

        scheduler.gracefully_exit = False
        scheduler._add_request_to_queue, scheduler.send_abort_output = add_to_queue_and_record, record_abort
        receiver = scheduler.request_receiver
        receive, scheduler.request_receiver = receiver, _Receiver(self.next_messages)
        started = time.monotonic()
        self.ends = started + self.limit_s
        try:
            scheduler.run_event_loop()
        finally:
            scheduler.request_receiver = receive
            del scheduler._add_request_to_queue, scheduler.send_abort_output
        if self.late:
            raise TimeoutError(f"not ended after {self.limit_s} s: {', '.join(self.late)}")
        seconds, starts = time.monotonic() - started, tuple(self.starts)
        return SchedulerRun(self.requests, self.aborted, seconds, len(starts), starts)

    def next_messages(self) -> list[Any]:
        """The messages of a round, at whose beginning the scheduler calls this."""
        self.starts.append(time.perf_counter())
        number, messages = len(self.starts), []
        while self.due and self.due[0][0] <= number:
            messages.append(self.due.pop(0)[1])
        if action := self.at.get(number):
            action(self.requests)
        running = [rid for rid in self.expected if not self.has_ended(rid)]
        if time.monotonic() > self.ends and not self.late:
            self.late, self.due = sorted(running), []
            messages.append(make_abort(None))
        stopped = self.late and time.monotonic() > self.ends + ABORT_LIMIT_S
        if (not running or self.late) and not self.due and not messages and self.scheduler.is_fully_idle():
            self.idle_rounds += 1
        self.scheduler.gracefully_exit = bool(stopped or self.idle_rounds >= IDLE_ROUNDS)
        return messages

    def has_ended(self, rid: str) -> bool:
        return rid in self.aborted or (rid in self.requests and self.requests[rid].finished())


@dataclass(frozen=True, slots=True)
class _Receiver:
    """Takes the place of SGLang's receiver of requests, which reads a socket."""

    next_messages: Callable[[], list[Any]]

    def recv_requests(self, local_reqs: Sequence[Any] = ()) -> list[Any]:
        return [*local_reqs, *self.next_messages()]


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Show what is written to stderr only if the block fails: SGLang draws progress bars and warns about other hardware."""
    with contextlib.redirect_stderr(io.StringIO()) as output:
        try:
            yield
        except BaseException:
            if sys.__stderr__:
                sys.__stderr__.write(output.getvalue())
            raise


@contextlib.contextmanager
def _server_folder() -> Iterator[None]:
    """Let SGLang make the files of a server in a folder that is removed after the block."""
    folder = ServerFolder()
    try:
        with folder.used_by_this_process():
            yield
    finally:
        folder.remove()


def _leave_process_groups() -> None:
    """Undo what a start has done to the process, so that another one is possible."""
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()


def _disconnect(scheduler: Any) -> None:
    """Close the scheduler's sockets: nobody would read what it sends, so it would stay in memory."""
    channels = scheduler.ipc_channels
    sockets = [channels.recv_from_tokenizer, channels.recv_from_rpc, channels.send_metrics_from_scheduler]
    for sender in (channels.send_to_tokenizer, channels.send_to_detokenizer):
        sockets.append(sender.socket)
        sender.socket = None
    context = channels.recv_from_tokenizer.context
    for socket in filter(None, sockets):
        socket.close(linger=0)
    context.destroy(linger=0)
    writer, scheduler.load_snapshot_writer = scheduler.load_snapshot_writer, None
    if close := getattr(writer, "close", None):
        close()
