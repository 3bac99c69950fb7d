"""Foreign text to tokens that its grammar takes: what is missing is put in, what is too much is text; it names nothing."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from typing import Any

from lark import Token
from lark.lexer import PatternStr

from sgl_apr.formats.grammar import NUMBER, TEXT, Grammar

END = "$END"
TAGS, TOKENS, TRIED = 3, 14, 400  # how far one repair may go: tags and tokens put in, states looked at
END_LIMITS = 99, 60, 4000  # the same for closing what is open at the end
LOOK_AHEAD = 5  # tags behind a repair that it is judged by
Stack = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repair:
    """At offset `at`: the names of the terminals put in there, or the end of what was taken for text."""

    at: int
    inserted: tuple[str, ...] = ()
    end: int = 0
    in_branch: bool = False


@dataclass
class ErrorRecoveringParser:
    """Reads one text by one grammar. `tokens` is what the grammar takes, `repairs` what was done to it.

    Every decision is remembered by the parser's stack and what comes next, so that a defect that repeats
    costs a lookup: time is linear in the text. `depth` bounds the nesting, and with it the stack.
    """

    grammar: Grammar
    text: str
    depth: int
    tokens: list[Token] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)

    def __post_init__(self) -> None:
        parser = self.grammar.parser("trace")
        table: Any = parser.parse_interactive("").parser_state.parse_conf.parse_table
        self.states: dict[int, dict[str, tuple[Any, Any]]] = table.states
        self.start, self.final = table.start_states["trace"], table.end_states["trace"]
        self.fixed: dict[str, str] = {}
        self.patterns: dict[str, re.Pattern[str]] = {}
        for terminal in parser.terminals:
            if isinstance(terminal.pattern, PatternStr):
                self.fixed[terminal.name] = terminal.pattern.value
            elif terminal.name != TEXT:
                self.patterns[terminal.name] = re.compile(terminal.pattern.to_regexp())
        marks = set(self.grammar.tag_literals)
        self.fixed |= {
            mark: mark for mark in marks - set(self.fixed.values())
        }  # of branches apart from the text
        self.tags = {name: value for name, value in self.fixed.items() if value in marks}
        self.by_text = {value: name for name, value in self.tags.items()}
        self.candidates: dict[int, list[str]] = {}
        longest = "|".join(re.escape(m) for m in sorted(marks, key=len, reverse=True))
        found = [(m.start(), self.by_text[m[0]]) for m in re.finditer(longest, self.text)] if marks else []
        self.at = [start for start, _ in found]
        self.tag_kinds = [kind for _, kind in found]
        closing = self.grammar.closing_literal("body") or self.grammar.closing_literal("body", "1")
        self.closer = next((n for t, n in self.by_text.items() if closing.startswith(t)), "")
        self.forks = self.by_text.get(self.grammar.opening_literal("fork"), "")
        ends = [self.grammar.closing_literal(rule) for rule in ("close", "tail")]
        self.ends = next((self.by_text[e] for e in ends if e in self.by_text), "")
        self.partner: dict[int, int] = {}  # by the tag that opens a block, the one that closes it
        opened: list[int] = []
        for i, kind in enumerate(self.tag_kinds):
            if kind == self.forks:
                opened.append(i)
            elif kind == self.ends and opened:
                self.partner[opened.pop()] = i
        self.most_states = 24 * (self.depth + 1)
        self.known_moves: dict[tuple[Stack, str], Stack | None] = {}
        self.known_inserts: dict[tuple[Stack, frozenset[str]], list[tuple[str, ...]]] = {}
        self.known_repairs: dict[Any, tuple[str, ...] | None] = {}

    def run(self) -> None:
        """Fill `tokens` and `repairs`."""
        stack: Stack = (self.start,)
        at, size = 0, len(self.text)
        while at < size:
            token = self.token(stack, at)
            if token is not None:
                stack = self.shift(stack, token.type)
                self.tokens.append(token)
                at = token.end_pos or size
                continue
            stack, at = self.repaired(stack, at)
        while self.try_shift(stack, END) is None:  # close what is open, from the inside
            inserted = self.closing(stack)
            if inserted is None:  # nothing completes it
                return
            stack = self.insert(stack, inserted, size)

    def token(self, stack: Stack, at: int) -> Token | None:
        """What the grammar takes at an offset, if anything."""
        for name in self.offered(stack[-1]):
            end = self.end_of(name, at)
            if name == self.forks and len(stack) > self.most_states:
                continue
            if end > at and self.try_shift(stack, name) is not None:
                return _token(name, self.text, at, end)
        return None

    def offered(self, state: int) -> list[str]:
        """The terminals of a state: fixed texts first, longest first, free text last."""
        if state not in self.candidates:
            names = [n for n in self.states[state] if n in self.fixed or n in self.patterns or n == TEXT]
            names.sort(key=lambda n: (n == TEXT, n not in self.fixed, -len(self.fixed.get(n, ""))))
            self.candidates[state] = names
        return self.candidates[state]

    def end_of(self, name: str, at: int) -> int:
        """Where a terminal that begins at an offset ends; `at` itself if it does not begin there."""
        if name == TEXT:
            i = bisect_left(self.at, at)
            return self.at[i] if i < len(self.at) else len(self.text)
        if name in self.fixed:
            return at + len(self.fixed[name]) if self.text.startswith(self.fixed[name], at) else at
        match = self.patterns[name].match(self.text, at)
        return match.end() if match else at

    def try_shift(self, stack: Stack, name: str) -> Stack | None:
        """The stack behind a terminal, None if the grammar does not take it there (LALR, states only)."""
        key = (stack, name)
        if key not in self.known_moves:
            self.known_moves[key] = self._moved(stack, name)
        return self.known_moves[key]

    def _moved(self, stack: Stack, name: str) -> Stack | None:
        states = list(stack)
        while True:
            action = self.states[states[-1]].get(name)
            if action is None:
                return None
            _, argument = action
            if type(argument) is int:
                states.append(argument)
                return tuple(states)
            if argument.expansion:
                del states[-len(argument.expansion) :]
            states.append(self.states[states[-1]][argument.origin.name][1])
            if name == END and states[-1] == self.final:
                return tuple(states)

    def shift(self, stack: Stack, name: str) -> Stack:
        moved = self.try_shift(stack, name)
        assert moved is not None
        return moved

    def repaired(self, stack: Stack, at: int) -> tuple[Stack, int]:
        """Put something in before `at`, or take what stands there for text."""
        i = bisect_left(self.at, at)
        is_tag = i < len(self.at) and self.at[i] == at
        if not is_tag and self.tokens and self.tokens[-1].type == TEXT and self.in_text(stack):
            return self.treat_as_text(stack, at, self.end_of(TEXT, at))
        if is_tag and (end := self.nested_end(stack, i)) is not None:
            return self.treat_as_text(stack, at, end)
        found = frozenset({self.tag_kinds[i]}) if is_tag else self.matching(at)
        key = (stack, found, tuple(self.tag_kinds[i : i + LOOK_AHEAD + 1]))
        if key not in self.known_repairs:
            self.known_repairs[key] = self.decide(stack, at, found)
        inserted = self.known_repairs[key]
        if inserted is not None and self.follows(stack, inserted, at):
            return self.insert(stack, inserted, at), at
        end = at + len(self.fixed[self.tag_kinds[i]]) if is_tag else self.end_of(TEXT, at)
        return self.treat_as_text(stack, at, end)

    def matching(self, at: int) -> frozenset[str]:
        """Every terminal that could begin at an offset where no tag does."""
        names = [n for n in (*self.fixed, *self.patterns) if self.end_of(n, at) > at]
        return frozenset([*names, TEXT])

    def decide(self, stack: Stack, at: int, found: frozenset[str]) -> tuple[str, ...] | None:
        """What to put in, or None to take what is there for text: whichever lets more of the tags behind be read."""
        i = bisect_left(self.at, at)
        is_tag = i < len(self.at) and self.at[i] == at
        skipped = at + len(self.fixed[self.tag_kinds[i]]) if is_tag else self.end_of(TEXT, at)
        best: tuple[str, ...] | None = None
        best_score = self.read_ahead(stack, skipped) - 1.5
        if is_tag and self.is_pair(i):
            behind_pair = self.at[i + 1] + len(self.fixed[self.tag_kinds[i + 1]])
            best_score = max(best_score, self.read_ahead(stack, behind_pair) - 2.0)
        if len(stack) > self.most_states:
            return None
        for inserted in self.insertion_candidates(stack, found):
            behind = self.after(stack, inserted)
            score = self.read_ahead(behind, at) - sum(0.6 for n in inserted if n in self.tags)
            if score > best_score:
                best, best_score = inserted, score
        return best

    def is_pair(self, i: int) -> bool:
        """Whether the tag behind tag `i` closes it."""
        closing = self.fixed[self.tag_kinds[i]].replace("<", "</", 1)
        return i + 1 < len(self.tag_kinds) and self.fixed[self.tag_kinds[i + 1]] == closing

    def nested_end(self, stack: Stack, i: int) -> int | None:
        """Where a block ends that begins with tag `i` inside a branch, if the branch goes on behind it."""
        j = self.partner.get(i)
        if j is None or not self.closes_here(stack):
            return None
        goes_on = j + 1 < len(self.tag_kinds) and self.tag_kinds[j + 1] == self.closer
        return self.at[j] + len(self.fixed[self.ends]) if goes_on else None

    def read_ahead(self, stack: Stack, at: int) -> int:
        """How many tags behind an offset are read before the next defect."""
        read = 0
        while read < LOOK_AHEAD:
            if at >= len(self.text):
                return LOOK_AHEAD if self.try_shift(stack, END) else read
            token = self.token(stack, at)
            if token is None:
                if self.in_text(stack) and self.end_of(TEXT, at) > at:  # text behind text
                    at = self.end_of(TEXT, at)
                    continue
                return read
            stack, at = self.shift(stack, token.type), token.end_pos or len(self.text)
            read += token.type in self.tags
        return read

    def in_text(self, stack: Stack) -> bool:
        """Whether the last token was free text."""
        return any(
            argument == stack[-1] for _, argument in [self.states[s].get(TEXT, (0, -1)) for s in stack[-2:-1]]
        )

    def insertion_candidates(self, stack: Stack, found: frozenset[str]) -> list[tuple[str, ...]]:
        """Sequences of terminals that, put in, let one of `found` follow; fewest tags first."""
        key = (stack, found)
        if key not in self.known_inserts:
            reached = (
                i
                for i, here in self.reachable(stack, TAGS, TOKENS, TRIED)
                if any(self.try_shift(here, n) for n in found)
            )
            self.known_inserts[key] = list(islice(reached, 3))
        return self.known_inserts[key]

    def closing(self, stack: Stack) -> tuple[str, ...] | None:
        """What closes the innermost of what is open."""
        reached = self.reachable(stack, *END_LIMITS)
        return next((i for i, here in reached if self.try_shift(here, END) or len(here) < len(stack)), None)

    def reachable(
        self, stack: Stack, tags: int, tokens: int, tried: int
    ) -> Iterator[tuple[tuple[str, ...], Stack]]:
        """What can be put in, and the stack behind it; fewest tags first, up to so many."""
        queue: list[tuple[int, int, int, tuple[str, ...], Stack]] = [(0, 0, 0, (), stack)]
        seen = {stack}
        order = 0
        while queue and tried:
            tried -= 1
            cost, length, _, inserted, here = heappop(queue)
            if inserted:
                yield inserted, here
            if cost >= tags or length >= tokens or len(here) > self.most_states + tokens:
                continue
            for name in self.offered(here[-1]):
                behind = self.try_shift(here, name)
                if behind is not None and behind not in seen:
                    seen.add(behind)
                    order += 1
                    step = cost + (name in self.tags)
                    heappush(queue, (step, length + 1, order, (*inserted, name), behind))

    def after(self, stack: Stack, inserted: tuple[str, ...]) -> Stack:
        for name in inserted:
            stack = self.shift(stack, name)
        return stack

    def follows(self, stack: Stack, inserted: tuple[str, ...], at: int) -> bool:
        """Whether the text goes on behind what is put in; a remembered decision may have met other text."""
        return self.token(self.after(stack, inserted), at) is not None

    def insert(self, stack: Stack, inserted: tuple[str, ...], at: int) -> Stack:
        self.repairs.append(Repair(at, inserted, at, self.closes_here(stack)))
        for name in inserted:
            self.tokens.append(_token(name, "", at, at))
        return self.after(stack, inserted)

    def treat_as_text(self, stack: Stack, at: int, end: int) -> tuple[Stack, int]:
        """What has no place there is text of what stands before it, if that can be."""
        last = self.tokens[-1] if self.tokens else None
        behind = last is not None and last.type == TEXT and (last.end_pos or 0) > (last.start_pos or 0)
        if not (behind and self.is_plain(at, end)):  # text goes on behind a tag that was taken for text
            self.repairs.append(Repair(at, (), end, self.closes_here(stack)))
        if last is not None and behind:
            last.end_pos = end
            return stack, end
        moved = self.try_shift(stack, TEXT)
        if moved is not None:
            self.tokens.append(_token(TEXT, self.text, at, end))
            return moved, end
        return stack, end

    def is_plain(self, start: int, end: int) -> bool:
        """Whether no tag begins in a piece of the text."""
        i = bisect_left(self.at, start)
        return i >= len(self.at) or self.at[i] >= end

    def closes_here(self, stack: Stack) -> bool:
        """Whether a branch could end here: its text is being read."""
        return bool(self.closer) and self.try_shift(stack, self.closer) is not None


def _token(name: str, text: str, start: int, end: int) -> Token:
    return Token(name, text[start:end] if name in (TEXT, NUMBER) or end > start else "", start, end_pos=end)
