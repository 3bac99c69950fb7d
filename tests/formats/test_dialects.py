"""All dialects, tested from their grammar files: valid and broken documents, masks, completions, trajectories."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import llguidance.numpy as masks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark import Lark, Token
from lark.lexer import Lexer
from llguidance import LLMatcher

import sgl_apr as apr
from sgl_apr.formats import entry_points
from sgl_apr.formats.dialects import BranchNumbering, dialect_names
from sgl_apr.runtime.phase_output import closing_overhead
from tests.support.document_strategies import document, documents, tags, with_tags_swapped, without_a_tag
from tests.support.masked_sampler import Masked, SampledEngine, masked

every_dialect = pytest.mark.parametrize("name", dialect_names())
both_modes = pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "text"])
WIDTH = 3


@cache
def document_matcher(name: str) -> LLMatcher:
    """The mask of a complete document."""
    dialect = apr.dialect(name)
    depth = min(2, dialect.max_depth)
    return masked(name).matcher("trace", dialect=dialect, width=WIDTH, min_width=1, depth=depth)


def is_decodable(name: str, text: str) -> bool:
    matcher, ids = document_matcher(name).deep_copy(), masked(name).encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@every_dialect
@settings(max_examples=25, deadline=None)
@given(data=st.data(), spelled=st.booleans())
def test_documents_are_parsed_without_loss(name: str, data: st.DataObject, spelled: bool):
    dialect = apr.dialect(name)
    text = data.draw(documents(dialect))
    dialect.validate(text)
    assert is_decodable(name, text)
    tokenizer = apr.ByteTokenizer(() if spelled else dialect.tags)
    trajectory = dialect.parse(text, tokenizer)
    assert dialect.render(trajectory) == text
    assert list(trajectory.token_ids) == tokenizer.encode(text)
    assert all(tokenizer.decode(s.token_ids or ()) == s.text for s in trajectory.spans)
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory


@every_dialect
def test_removed_and_swapped_tags_are_rejected(name: str):
    dialect = apr.dialect(name)
    broken = 0
    for seed in range(10):
        text = document(dialect, random.Random(seed))
        dialect.validate(text)
        assert is_decodable(name, text), text
        for mutated in (*without_a_tag(dialect, text), *with_tags_swapped(dialect, text)):
            assert not dialect.is_valid(mutated), mutated
            assert not is_decodable(name, mutated), mutated
            broken += 1
    assert broken > 100


def test_names_in_tags_can_be_swapped():
    """Only the promise holds its topic, so two swapped topics contradict nothing."""
    dialect = apr.dialect("pasta")
    text = '<promise topic="a"/><promise topic="b"/><sync/><async>1</async><async>2</async>'
    (swapped,) = [t for t in with_tags_swapped(dialect, text, named=True) if dialect.is_valid(t)]
    assert swapped == text.replace('"a"', '"c"').replace('"b"', '"a"').replace('"c"', '"b"')
    assert [t[0] for t in tags(dialect, text)][:2] == ['<promise topic="'] * 2


@every_dialect
@pytest.mark.parametrize("width", [2, 5])
def test_width_and_depth_bound_a_document(name: str, width: int):
    """The mask of a document accepts exactly the documents within its width and depth."""
    dialect, seen = apr.dialect(name), set()
    depth = min(2, dialect.max_depth)
    matcher = masked(name).matcher("trace", dialect=dialect, width=width, min_width=1, depth=1)
    for seed in range(60):
        text = document(dialect, random.Random(seed), width=4, depth=depth)
        blocks = dialect.parse(text).blocks
        fits = all(len(b.branches) <= width and len(b.path) == 1 for b in blocks)
        taken = matcher.deep_copy()
        ids = masked(name).encode(text)
        assert (taken.try_consume_tokens(ids) == len(ids) and taken.is_accepting()) == fits, text
        seen.add(fits)
    nests = depth > 1 and dialect.branch_context == "prefix"  # a document holds only the result of a child
    assert seen == ({True, False} if width < 4 or nests else {True})


def test_a_document_that_cannot_be_lowered_is_an_error():
    threadweaver, multiverse = apr.dialect("threadweaver"), apr.dialect("multiverse")
    for dialect, tokenizer, options, message in [
        (threadweaver, masked("threadweaver", True), {}, "'<[A-Za-z]+>' is not one token"),
        (
            threadweaver,
            masked("threadweaver"),
            {"fork": "required"},
            "supports the options width, min_width, first_number, depth",
        ),
        (threadweaver, masked("threadweaver"), {"depth": 2}, "depth 2, expected within 1 to 1"),
        (multiverse, masked("multiverse"), {"width": 6, "depth": 5}, "6 wide and 5 deep needs more than"),
        (
            apr.dialect("parathinker"),
            masked("parathinker"),
            {"min_width": 1, "width": 1},
            "a block cannot have 1 to 1 branches",
        ),
    ]:
        with pytest.raises(apr.GrammarError, match=message):
            dialect.llguidance("trace", tokenizer, **options)
    with pytest.raises(apr.GrammarError, match="needs llguidance, not xgrammar"):
        threadweaver.lower("trace", masked("threadweaver"), "xgrammar")


@dataclass(frozen=True)
class Case:
    """A phase at a place where the runtime decodes it."""

    phase: str
    numbering: BranchNumbering = field(default_factory=BranchNumbering)

    def lowered(self, dialect: apr.Dialect, tokenizer: Masked, **options) -> str | None:
        """Its mask, or None if the options allow nothing. Branches that do not nest cannot fork."""
        if dialect.rule_for_phase(self.phase) == "body":
            options["fork"] = "auto"
        options = {"width": min(WIDTH, dialect.max_width), "min_width": 1} | options
        numbering = self.numbering
        try:
            return dialect.llguidance(
                self.phase,
                tokenizer,
                prefix=numbering.prefix,
                number=numbering.number,
                waiting=numbering.waiting,
                **options,
            )
        except apr.GrammarError as error:
            if "allows nothing" not in str(error):
                raise
            return None


def cases(dialect: apr.Dialect) -> Iterator[Case]:
    """Every phase of a dialect, with and without pending branches."""
    one, two, three = (str(dialect.first_number + k) for k in range(3))
    if dialect.asynchronous:
        yield Case("trunk", BranchNumbering(number=one))
        yield Case("after", BranchNumbering(number=one))
        yield Case("after", BranchNumbering(number=two, waiting=(one,)))
        yield Case("after", BranchNumbering(number=three, waiting=(one, two)))
        yield Case("after", BranchNumbering(number=three, waiting=(two,)))
    else:
        yield from (Case(phase) for phase in ("trunk", "after") if phase in dialect.grammar.rules)
    for number in (two, str(dialect.first_number + dialect.max_width - 1)):
        numbering = BranchNumbering(prefix=f"{number}." if dialect.nested_numbering else "", number=number)
        yield Case("branch", numbering)
        if "rejoin" in dialect.grammar.rules:
            yield Case("rejoin", numbering)


MASK_OPTIONS = [
    {},
    {"fork": "required", "lead_chars": 8},
    {"fork": "forbidden"},
    {"outline_chars": 12},
    {"forbid_angle_brackets": True},
]


@every_dialect
@pytest.mark.parametrize("options", MASK_OPTIONS, ids=lambda s: "-".join(s) or "auto")
def test_masks_allow_the_same_tags_as_a_reference_parser(name: str, options: dict):
    """Along random paths, the mask allows the tags, and the end, that Lark's parser accepts."""
    dialect, tokenizer = apr.dialect(name), masked(name)
    rng, compared = random.Random(0), 0
    for case in cases(dialect):
        lowered = case.lowered(dialect, tokenizer, **options)
        if lowered is None:
            continue
        reference = Reference(lowered)
        for _ in range(4):
            compared += reference.walk(rng, tokenizer)
    assert compared > 10


class NoLexer(Lexer):
    """A lexer without text: the test feeds terminals to the parser."""

    def __init__(self, conf):
        pass

    def lex(self, lexer_state, parser_state):
        return iter(())


class Reference:
    """llguidance's grammar in Lark's LALR parser, with a terminal for each tag, string and regular expression."""

    def __init__(self, lowered: str) -> None:
        self.lowered = lowered
        self.tags: dict[str, int] = {}
        self.strings: dict[str, str] = {}
        self.patterns: dict[str, str] = {}
        rules = []
        for line in lowered.splitlines():
            head, _, body = line.partition(": ")
            if head.isupper() or head.partition("_")[0].isupper():
                self.patterns[head] = re.sub(r"/ & /.*", "/", body)[1:-1]
            elif head:
                rules.append(f"{head}: {re.sub(self.PIECE, self._terminal, body)}")
        declared = " ".join((*self.tags, *self.strings, *self.patterns))
        self.parser = Lark("\n".join([*rules, f"%declare {declared}"]), parser="lalr", lexer=NoLexer)

    PIECE = r'<\[\d+\]>|"(?:[^"\\]|\\.)*"'

    def _terminal(self, match: re.Match[str]) -> str:
        if match[0].startswith("<["):
            self.tags[f"TAG_{match[0][2:-2]}"] = int(match[0][2:-2])
            return f"TAG_{match[0][2:-2]}"
        text = json.loads(match[0])
        if not text:
            return ""
        known = {t: n for n, t in self.strings.items()}
        name = known.get(text, f"STRING_{len(known)}")
        self.strings[name] = text
        return name

    def walk(self, rng: random.Random, tokenizer: Masked) -> int:
        """Follow one random path, and return the number of states that were compared."""
        matcher = LLMatcher(tokenizer.guide, self.lowered)
        state = self.parser.parse_interactive("")
        for step in itertools.count(1):
            accepted = state.accepts()
            expected = {self.tags[a] for a in accepted if a in self.tags}
            expected |= tokenizer.eos_ids if "$END" in accepted else set()
            assert allowed(matcher, tokenizer) == expected, (self.lowered[:500], step)
            terminals = sorted(accepted - {"$END"})
            if not terminals or step > 40:
                return step
            name = rng.choice(terminals)
            state.feed_token(Token(name, ""))
            for k, token in enumerate(ids := self._ids(name, rng, tokenizer), 1):
                assert matcher.consume_token(token)
                inside = name in self.strings and k < len(ids)
                assert not inside or not allowed(matcher, tokenizer), "a tag within a fixed text"
        raise AssertionError("unreachable")

    def _ids(self, name: str, rng: random.Random, tokenizer: Masked) -> list[int]:
        if name in self.tags:
            return [self.tags[name]]
        texts = [self.strings[name]] if name in self.strings else ["x", "x < y", "größer\n", "0,1", "12"]
        fitting = [t for t in texts if name in self.strings or re.fullmatch(self.patterns[name], t)]
        return tokenizer.encode(rng.choice(fitting))


def allowed(matcher: LLMatcher, tokenizer: Masked) -> set[int]:
    """The tags that the mask allows, and the end of text if it does."""
    size = tokenizer.backend.get_vocab_size()
    bits = masks.allocate_token_bitmask(1, size)
    masks.fill_next_token_bitmask(matcher, bits)
    one_each = np.unpackbits(bits.view(np.uint8), bitorder="little")[:size]
    special = {tokenizer.special_token_id(tag) for tag in tokenizer.tags} | tokenizer.eos_ids
    return special & set(np.flatnonzero(one_each).tolist())


@every_dialect
@both_modes
def test_every_prefix_of_a_phase_can_be_completed(name: str, spelled: bool):
    """Wherever a token limit cuts, everything open is closed, and the decoded text is kept."""
    dialect, tokenizer = apr.dialect(name), masked(name, spelled)
    engine, rng = SampledEngine(tokenizer, seed=2), random.Random(2)
    wide = {"width": min(12, dialect.max_width), "min_width": min(11, dialect.max_width), "outline_chars": 1}
    all_options = ({"outline_chars": 12}, wide, MASK_OPTIONS[1], MASK_OPTIONS[2])
    for case, options in itertools.product(cases(dialect), all_options):
        lowered = case.lowered(dialect, tokenizer, **options)
        if lowered is None:
            continue
        for _ in range(2):
            text, finished = asyncio.run(decoded(engine, dialect, case, lowered))
            if finished:
                assert dialect.parse_phase(case.phase, text, case.numbering)[-1].end == len(text)
            for end in {0, len(text), *(rng.randint(0, len(text)) for _ in range(20))}:
                cut = text[:end]
                added = dialect.complete_phase(case.phase, cut, case.numbering)
                assert added is not None, (case, cut)
                segments = dialect.parse_phase(case.phase, cut + added, case.numbering)
                assert (segments[-1].end if segments else 0) == len(cut + added)


@pytest.mark.parametrize(
    ("name", "phase", "number", "cut", "added"),
    [
        ("multiverse", "branch", "2", "<Parallel>\n<Goal>\n<Outline>\n", "2.1:...</Outline>\n</Goal>"),
        ("multiverse", "branch", "2", "<Parallel>\n<Goal>\n<Outline>\n2", ".1:...</Outline>\n</Goal>"),
        ("multiverse", "branch", "2", "<Parallel>\n<Goal>\n<Outline>\n2.", "1:...</Outline>\n</Goal>"),
        # What could be half a fork stays text, because a fork can be forbidden here.
        ("multiverse", "branch", "2", "x<P", "</Path>"),
        ("multiverse", "branch", "2", "x</P", "ath>"),
        ("parathinker", "branch", "2", "x</think ", "2>"),
        ("asyncthink", "trunk", "2", "<FORK-2>x</FORK-", "2>"),
        (
            "apr",
            "trunk",
            "",
            "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> Moving to Node #7,",
            "0\n<End Calling Sub Searches>",
        ),
    ],
)
def test_completion_within_a_tag_a_number_or_a_name(name: str, phase: str, number: str, cut: str, added: str):
    numbering = BranchNumbering(prefix=f"{number}." if phase == "branch" else "", number=number)
    assert apr.dialect(name).complete_phase(phase, cut, numbering) == added


async def decoded(engine: SampledEngine, dialect: apr.Dialect, case: Case, lowered: str) -> tuple[str, bool]:
    """What an engine that samples from the mask decodes of a phase, and whether the phase ended."""
    stops = dialect.stop_strings(case.phase, case.numbering)
    ids = [engine.tokenizer.special_token_id(tag) for tag in stops]
    result = await engine.decode(
        apr.Request("r", (), 200, grammar=lowered, stop_ids=tuple(i for i in ids if i is not None))
    )
    kept = [i for i in result.token_ids if i not in engine.tokenizer.eos_ids]
    return engine.tokenizer.decode(kept), result.finish == "stop"


DEPTHS = [
    (name, depth)
    for name in dialect_names()
    for depth in ((1,) if apr.dialect(name).max_depth == 1 else (2, 3))
]
MODES = {
    "auto": (False, {}),
    "parallel": (False, {"mode": "parallel"}),
    "text": (True, {"mode": "parallel"}),
}


@pytest.mark.parametrize(("name", "depth"), DEPTHS)
@pytest.mark.parametrize("mode", MODES)
def test_trajectories_are_valid_whatever_is_sampled(name: str, depth: int, mode: str):
    assert trajectories(name, depth, mode, 5)["forked"] >= (5 if mode != "auto" else 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@every_dialect
def test_ten_thousand_trajectories_are_valid(name: str):
    counts = trajectories(name, min(2, apr.dialect(name).max_depth), "auto", 10_000)
    print(f"\n{name}: {counts}")
    assert counts["valid"] == 10_000


def trajectories(name: str, depth: int, mode: str, count: int) -> dict[str, int]:
    """Run and check trajectories, and count how many were valid, forked, and closed in which way."""
    dialect = apr.dialect(name)
    spelled, options = MODES[mode]
    # The first engine closes its branches soon. The second one rarely does, so the runtime has to.
    engines = [SampledEngine(masked(name, spelled), seed=depth, tag_weight=w) for w in (30.0, 2.0)]
    closing = closing_overhead(dialect, engines[0].tokenizer).of(WIDTH)
    budget = apr.Budget(
        tokens=2 * closing * (2 * depth - 1) + 120,
        width=WIDTH,
        depth=depth,
        outline_chars=12 if spelled else None,
    )
    counts = dict.fromkeys(("valid", "forked", "nested", "branches", "decoded", "injected", "tokens"), 0)

    async def run() -> None:
        for engine in itertools.islice(itertools.cycle(engines), count):
            trajectory = await apr.areason(engine, "Q: ", dialect, budget=budget, **options)
            engine.requests.clear()
            metrics = check(trajectory, dialect, engine.tokenizer, budget)
            counts["valid"] += 1
            counts["forked"] += bool(trajectory.blocks)
            counts["nested"] += any(len(b.path) > 1 for b in trajectory.blocks)
            counts["branches"] += metrics.branches
            counts["decoded"] += metrics.closers_decoded
            counts["injected"] += metrics.closers_injected
            counts["tokens"] += metrics.total

    asyncio.run(run())
    assert counts["nested"] > 0 or depth == 1 or spelled
    assert counts["decoded"] + counts["injected"] > 0 or not dialect.grammar.closing_literal("body", "1")
    return counts


def check(
    trajectory: apr.Trajectory, dialect: apr.Dialect, tokenizer: Masked, budget: apr.Budget
) -> apr.Metrics:
    """Check a trajectory, and return its metrics."""
    text, metrics = trajectory.text, trajectory.metrics()
    assert dialect.render(dialect.parse(text)) == text
    assert tokenizer.decode(trajectory.token_ids) == text
    assert metrics.total <= budget.tokens
    for index, span in enumerate(trajectory.spans):
        assert all(parent < index for parent in (*span.parents, *span.waits_for))
    for block in trajectory.blocks:
        assert [b.number for b in block.branches] == list(range(1, len(block.branches) + 1))
        assert len(block.branches) <= (budget.width or dialect.max_width)
        assert len(block.path) <= 2 * budget.depth - 1
    return metrics


@pytest.mark.parametrize("name", apr.dialect_names())
def test_a_dialect_that_was_used_can_be_pickled(name: str):
    dialect = apr.dialect(name)
    text = dialect.parse("no fork").text if "trunk" in dialect.grammar.rules else ""
    again = pickle.loads(pickle.dumps(dialect))
    assert again == dialect
    assert not text or again.parse(text).text == text


def test_an_error_with_a_place_can_be_pickled():
    error = pickle.loads(pickle.dumps(apr.TraceError(2, 5, "</Thread>", ["<Thread>"])))
    assert (error.line, error.column, error.found, error.expected) == (2, 5, "</Thread>", ("<Thread>",))
    assert str(error) == "line 2, column 5: found '</Thread>', expected <Thread>"


def test_installed_packages_are_read_once_for_each_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads: list[str] = []
    monkeypatch.setattr(entry_points, "entry_points", lambda group: reads.append(group) or ())
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(3):
        assert "threadweaver" in apr.dialect_names()
    assert reads == ["sgl_apr.dialects"]
    monkeypatch.syspath_prepend(str(tmp_path / "another"))
    apr.dialect_names()
    assert len(reads) == 2
