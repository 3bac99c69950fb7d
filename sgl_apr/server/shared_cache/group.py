"""A group of workers that decode together: who is there, and which slots each of them sees.

Everything here is arithmetic on the host. Nothing reads or writes a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.server.shared_cache.parameters import GroupParams
from sgl_apr.server.shared_cache.views import BlockView, WorkerView


@dataclass(slots=True)
class Worker:
    """One request of a group.

    Own tokens are those after the common prompt: first the header, then what was decoded. An own place is the number
    of own tokens before a token.

    Attributes:
        req: SGLang's request.
        params: What the request says about its group.
        group: Its group.
        tokens_read: Own tokens whose keys are in the cache, that of the step which is being launched included.
        block_start: The own place where its current step begins (Hogwild!).
        next_block_starts: The own places where its next steps begin, of steps whose last token is known and which have not
            been moved to the history. Two at most: without overlap, a step may end before the one before it is moved.
        pending_finish: (reason, number of output tokens) of a worker that ends as soon as its last token has been read.
        has_ended: Whether it has ended.
    """

    req: Any
    params: GroupParams
    group: WorkerGroup
    tokens_read: int = 0
    block_start: int = 0
    next_block_starts: list[int] = field(default_factory=list)
    pending_finish: tuple[Any, int] | None = None
    has_ended: bool = False

    @property
    def number(self) -> int:
        return self.params.worker

    @property
    def row(self) -> int:
        """Its row of SGLang's `req_to_token`."""
        return int(self.req.kv.req_pool_idx)


@dataclass(frozen=True, slots=True)
class HistoryMove:
    """A step that has ended and is appended to the history of its group.

    Attributes:
        row: The row of the worker.
        first: The first slot of the step in that row.
        last: The end of the step in that row.
        target: Where its slots go in the view row.
        turn: The positions by which its keys have to be turned.
    """

    row: int
    first: int
    last: int
    target: int
    turn: int


@dataclass(slots=True, eq=False)
class WorkerGroup:
    """The workers of one group.

    Attributes:
        params: Those of any of its workers.
        created_at: When its first worker arrived, on the monotonic clock.
        workers: The workers that have arrived, by number.
        missing: Workers that were aborted before they were prefilled.
        started: Whether its workers have been prefilled.
        skipped_rounds: In how many rounds of the scheduler it did not fit.
        view_row: A row of `req_to_token` that the group owns: the prompt, then (Group Think) the tokens of all workers in
            the order in which they were written, or (Hogwild!) the history.
        free_view_row: Gives that row back.
        view_length: How many slots of that row are in use.
        held: Requests that have ended, with the function that gives back what they hold. Others still read it.
        failure: Why the group failed, if it did.
    """

    params: GroupParams
    created_at: float
    workers: dict[int, Worker] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    started: bool = False
    skipped_rounds: int = 0
    view_row: int | None = None
    free_view_row: Callable[[], object] | None = None
    view_length: int = 0
    held: list[tuple[Any, Callable[[], object]]] = field(default_factory=list)
    failure: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every worker has arrived, or never will."""
        return len(self.workers.keys() | self.missing) == self.params.workers

    @property
    def is_abandoned(self) -> bool:
        """Whether no worker is there, although some may still arrive."""
        return not self.started and all(number in self.missing for number in self.workers)

    @property
    def is_over(self) -> bool:
        """Whether all workers have ended."""
        return all(
            number in self.missing or (number in self.workers and self.workers[number].has_ended)
            for number in range(self.params.workers)
        )

    @property
    def live_workers(self) -> list[Worker]:
        return [
            w for _, w in sorted(self.workers.items()) if not w.has_ended and w.number not in self.missing
        ]

    def add(self, req: Any, params: GroupParams) -> Worker:
        """Add a worker that has arrived."""
        worker = Worker(req, params, self)
        self.workers[params.worker] = worker
        return worker

    def read_tokens(self, lengths: Mapping[int, int]) -> list[HistoryMove]:
        """Note which tokens the step that is being launched reads, and move steps that have ended to the history.

        Args:
            lengths: By worker, the length of its request with the token that is being read.

        Returns:
            The steps that move, in the order in which they do. Their slots and keys have to be moved before this step.
        """
        moves: list[HistoryMove] = []
        for number, length in sorted(lengths.items()):
            worker = self.workers[number]
            worker.tokens_read = length - self.params.prompt_tokens
            if not worker.next_block_starts or worker.tokens_read <= worker.next_block_starts[0]:
                continue
            prompt, start, end = (
                self.params.prompt_tokens,
                worker.block_start,
                worker.next_block_starts.pop(0),
            )
            # Keys are cached at prompt + own place. In the view, the step begins at `view_length`.
            moves.append(
                HistoryMove(
                    worker.row,
                    prompt + start,
                    prompt + end,
                    self.view_length,
                    self.view_length - prompt - start,
                )
            )
            self.view_length += end - start
            worker.block_start = end
        return moves

    def hogwild_views(self, batch_rows: Mapping[int, int]) -> list[WorkerView]:
        """Return what workers of Hogwild! see: the prompt and the history, the blocks of the others, their own.

        Args:
            batch_rows: By worker, its row of the batch.
        """
        assert self.view_row is not None, "made at the first step"
        prompt = self.params.prompt_tokens
        blocks = {n: w for n, w in sorted(self.workers.items()) if w.tokens_read > w.block_start}
        total = self.view_length + sum(w.tokens_read - w.block_start for w in blocks.values())
        views = []
        for number, batch_row in sorted(batch_rows.items()):
            own = self.workers[number]
            # The query stands at the end of the view. The model has turned it for its place in its own request.
            lacking = total - (prompt + own.tokens_read)
            view = [BlockView(self.view_row, 0, self.view_length, lacking)]
            start = self.view_length
            for other, worker in blocks.items():
                if other == number:
                    continue
                # The block stands at `start`. Its keys are cached from prompt + block_start on.
                turn = lacking + prompt + worker.block_start - start
                view.append(_block(worker, prompt, turn))
                start += worker.tokens_read - worker.block_start
            view.append(_block(own, prompt, 0))
            views.append(WorkerView(batch_row, tuple(view)))
        return views


def _block(worker: Worker, prompt: int, turn: int) -> BlockView:
    return BlockView(worker.row, prompt + worker.block_start, prompt + worker.tokens_read, turn)
