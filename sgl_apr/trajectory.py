"""The one noun: an immutable graph of spans, with blocks and branches as a view; it knows no grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from sgl_apr.errors import AprError, TraceError

if TYPE_CHECKING:
    from sgl_apr.metrics import Convention, Metrics

SCHEMA = "sgl_apr.trajectory/5"

Origin = Literal["prompt", "decoded", "injected"]
Finish = Literal["stop", "eos", "length", "aborted", "timeout", "failed", "malformed"]
Outcome = Literal["ok", "eos", "length", "aborted", "timeout", "failed", "malformed"]
Role = Literal[
    "prompt", "text", "fork", "lead", "header", "body", "closer", "wait", "result", "tail", "close"
]
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens with one origin and one meaning.

    `parents` are indices of the spans it directly follows, so ancestors are what it was conditioned on;
    `after` are those that it waited for without seeing them, as a join by message does. `path` says where it stands: `()` is the trunk, `(1, 2)` branch 2 of the first
    block, and so on inside. `label` is what the grammar names in it: the outline (header), the
    conclusion (close), the message that a branch returned (closer, result);
    `outline` is that of the branch whose result it is. `token_ids` is None where a text was read without a tokenizer. A token that
    straddles two spans belongs to the one in which it begins.
    """

    role: Role
    origin: Origin
    text: str
    token_ids: tuple[int, ...] | None
    parents: tuple[int, ...]
    path: Path = ()
    label: str = ""
    finish: Finish | None = None
    call: int | None = None
    after: tuple[int, ...] = ()
    outline: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens; raises `AprError` if they are unknown."""
        if self.token_ids is None:
            raise AprError("this trajectory was read from text: parse it with tokenizer= to count its tokens")
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Call:
    """One engine request as the engine reported it. Times are seconds since the trajectory began.

    `new_tokens` is how much of the prompt no earlier call of this trajectory had computed, so
    `prompt_tokens - new_tokens` is the prefix it shares with them; `cached_tokens` is None where the request
    was cut or failed before the engine said it. `seed` is that of its sampling (see `Trajectory.seeded`),
    `retries` how often it was repeated after an error. `logprobs` are those of all output tokens, an end of
    text included, under the grammar's mask and the temperature, where they were asked for; `weights` is what
    the engine calls the weights that it used.
    """

    phase: str
    path: Path
    prompt_tokens: int
    cached_tokens: int | None
    new_tokens: int
    output_tokens: int
    started: float
    ended: float
    seed: int | None = None
    retries: int = 0
    logprobs: tuple[float, ...] | None = None
    weights: str | None = None

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that earlier calls of the trajectory had already computed or decoded."""
        return self.prompt_tokens - self.new_tokens

    @property
    def reprefilled(self) -> int:
        """Shared tokens that were computed once more because the cache did not hold them, as far as known."""
        return 0 if self.cached_tokens is None else max(0, self.shared_tokens - self.cached_tokens)


@dataclass(frozen=True, slots=True)
class Limit:
    """A field of the budget, or "policy", that acted: it cut the strand at `path`, or took forks from it."""

    limit: str
    path: Path


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of the branches of block `path` were run at once, and what was known when it was decided.

    Counts are the engine's when it was asked; `step_s` are the seconds of one decoding step measured at
    so many requests, None where none was measured yet.
    """

    path: Path
    branches: int
    at_once: int
    running: int
    waiting: int
    free_tokens: int
    step_s: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Join:
    """How a block was joined, where more than one way was asked for: by "kv" (its branches side by side in
    the cache) or by "text" (all read in a line), and why not otherwise.

    With the path of a strand in place of a block's: the cache lost what that strand had joined, and it read
    all of it in a line from there on.
    """

    path: Path
    by: Literal["kv", "text"]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """A view: one branch of a block.

    `text` is what it wrote, without header and closer; `result` is the message that came back from it,
    empty where branches join otherwise.
    """

    path: Path
    outline: str
    text: str
    result: str
    finish: Finish | None
    spans: tuple[int, ...]

    @property
    def number(self) -> int:
        """1-based, as written in its header."""
        return self.path[-1]

    @property
    def outcome(self) -> Outcome | None:
        """`finish`, with "ok" for a branch that ended itself; None where a text was read."""
        return outcome(self.finish)


def outcome(finish: Finish | None) -> Outcome | None:
    """How a branch has ended, from the finish of its last span."""
    return "ok" if finish == "stop" else finish


@dataclass(frozen=True, slots=True)
class Block:
    """A view: one fork with its branches and what the join concluded (empty if nothing)."""

    path: Path
    branches: tuple[Branch, ...]
    conclusion: str


@dataclass(frozen=True)
class Trajectory:
    """Everything that happened in one answer, spans in the order in which they stand in the text.

    `limits` and `decisions` say where the budget acted and how forks were paced, `joins` what became of the
    KV joins asked for, in the order in which it happened. The seeds of the calls are derived from `seed`;
    `seeded` says whether the engine honours them.

    >>> import sgl_apr as apr
    >>> t = apr.dialect("threadweaver").parse("six times seven is 42")
    >>> t.answer, t.blocks
    ('six times seven is 42', ())
    """

    spans: tuple[Span, ...]
    dialect: str
    calls: tuple[Call, ...] = ()
    wall_s: float = 0.0
    limits: tuple[Limit, ...] = ()
    decisions: tuple[Decision, ...] = ()
    joins: tuple[Join, ...] = ()
    seed: int | None = None
    seeded: bool = False

    @property
    def prompt(self) -> str:
        """The text of the prompt spans."""
        return "".join(s.text for s in self.spans if s.origin == "prompt")

    @property
    def text(self) -> str:
        """The whole reply, tags and injected text included, prompt excluded.

        Of a branch that saw nothing but a message it holds the result alone, as the trunk does.
        """
        return "".join(s.text for s in self.document)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of `text`, in order, just as the engine was sent and returned them."""
        return tuple(i for s in self.document if s.tokens for i in s.token_ids or ())

    @property
    def document(self) -> tuple[Span, ...]:
        """The spans of `text`: the reply without branches that had a context of their own."""
        apart: list[bool] = []
        for span in self.spans:
            apart.append(all(apart[p] for p in span.parents) if span.parents else bool(span.after))
        return tuple(s for s, own in zip(self.spans, apart, strict=True) if not own and s.origin != "prompt")

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The ids that whatever comes next is conditioned on, prompt included: `text` without dropped calls."""
        document = set(map(id, self.document))
        last = max((i for i, s in enumerate(self.spans) if id(s) in document), default=len(self.spans) - 1)
        return tuple(t for i in self.ancestors(last) for t in self.spans[i].token_ids or ())

    def ancestors(self, index: int) -> list[int]:
        """What span `index` was conditioned on, and itself, in the order of the text."""
        seen, stack = {index}, [index]
        while stack:
            fresh = [p for p in self.spans[stack.pop()].parents if p not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        return sorted(seen)

    @property
    def reply(self) -> tuple[Span, ...]:
        """Every span but the prompt."""
        return tuple(s for s in self.spans if s.origin != "prompt")

    def behind(self, prompt: str, token_ids: tuple[int, ...] | None = None) -> Trajectory:
        """The same reply behind a prompt; for a trajectory that has none."""

        def moved(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i + 1 for i in indices)

        first = Span("prompt", "prompt", prompt, token_ids, ())
        spans = (
            replace(s, parents=moved(s.parents) or (() if s.after else (0,)), after=moved(s.after))
            for s in self.spans
        )
        return replace(self, spans=(first, *spans))

    @property
    def finish(self) -> Finish | None:
        """How the trunk ended; `malformed` if its text left the dialect (possible with the grammar off)."""
        return next((s.finish for s in reversed(self.spans) if s.path == () and s.finish), None)

    @property
    def answer(self) -> str:
        """Trunk text after the last join (all of it if there was none), leading white space removed."""
        tail: list[str] = []
        for span in reversed(self.reply):
            if span.role != "text" or span.path != ():
                break
            tail.append(span.text)
        return "".join(reversed(tail)).lstrip()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, outer before inner, in the order of the text."""
        return tuple(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        forks: dict[Path, dict[Path, list[int]]] = {}
        for i, span in enumerate(self.spans):
            for depth in range(2, len(span.path) + 1, 2):
                branch = span.path[:depth]
                forks.setdefault(branch[:-1], {}).setdefault(branch, []).append(i)
        for path, branches in forks.items():
            yield Block(
                path=path,
                branches=tuple(self._branch(p, tuple(branches[p])) for p in sorted(branches)),
                conclusion=self._conclusion(path),
            )

    def _branch(self, path: Path, ids: tuple[int, ...]) -> Branch:
        own = [self.spans[i] for i in ids]
        return Branch(
            path=path,
            outline=next(
                (s.outline or s.label for s in own if s.role in ("header", "result") and s.path == path), ""
            ),
            text="".join(
                s.text for s in own if s.path != path or s.role not in ("header", "closer", "result")
            ),
            result="".join(s.label for s in own if s.path == path and s.role == "result"),
            finish=next((s.finish for s in reversed(own) if s.path == path and s.finish), None),
            spans=ids,
        )

    def _conclusion(self, block: Path) -> str:
        """The label of what closes the block: the n-th tail of its strand ends block n."""
        ended = 0
        for span in self.spans:
            if span.path == block[:-1]:
                ended += span.role == "tail"
                if span.role == "close" and ended == block[-1]:
                    return span.label
        return ""

    def metrics(self, convention: Convention = "causal") -> Metrics:
        """Tokens, critical path, parallelism and what the engine did: see `sgl_apr.metrics`."""
        from sgl_apr.metrics import measure

        return measure(self, convention)

    def to_json(self) -> str:
        """One JSON object with its schema version, read back by `from_json` without loss."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Trajectory:
        """The trajectory that `to_json` wrote; raises `TraceError` for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise TraceError(error.lineno, error.colno, text[error.pos : error.pos + 20], ["JSON"]) from None
        found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        if found != SCHEMA:
            raise TraceError(1, 1, f"schema {found!r}", [f"schema {SCHEMA!r}"])
        try:
            trajectory = cls(
                spans=tuple(_span(s, i) for i, s in enumerate(data["spans"])),
                dialect=str(data["dialect"]),
                calls=tuple(_call(c) for c in data["calls"]),
                wall_s=float(data["wall_s"]),
                limits=tuple(Limit(**_placed(x)) for x in data["limits"]),
                decisions=tuple(Decision(**_placed(d)) for d in data["decisions"]),
                joins=tuple(Join(**_placed(j)) for j in data["joins"]),
                seed=data["seed"],
                seeded=bool(data["seeded"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(1, 1, str(error), [f"the fields of {SCHEMA}"]) from None
        return trajectory


def _placed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, "path": tuple(data["path"])}


def _call(data: Mapping[str, Any]) -> Call:
    logprobs = data["logprobs"]
    return Call(**{**_placed(data), "logprobs": None if logprobs is None else tuple(map(float, logprobs))})


def _span(data: Mapping[str, Any], index: int) -> Span:
    """One span from its JSON; parents have to come first, which also keeps the graph acyclic."""
    names = {f.name for f in fields(Span)}
    if set(data) != names:
        raise ValueError(f"span fields {sorted(set(data) ^ names)}")
    if data["role"] not in get_args(Role) or data["origin"] not in get_args(Origin):
        raise ValueError(f"span role {data['role']!r}, origin {data['origin']!r}")
    if data["finish"] not in (None, *get_args(Finish)):
        raise ValueError(f"span finish {data['finish']!r}")
    before = [*data["parents"], *data["after"]]
    if not all(isinstance(p, int) and 0 <= p < index for p in before):
        raise ValueError(f"span {index} follows {before}, expected spans before it")
    ids = data["token_ids"]
    return Span(
        **{
            **data,
            "token_ids": None if ids is None else tuple(int(i) for i in ids),
            "parents": tuple(int(p) for p in data["parents"]),
            "path": tuple(int(p) for p in data["path"]),
            "after": tuple(int(p) for p in data["after"]),
        }
    )
