"""Error recovery: turns any text into tokens that a grammar accepts, by inserting missing tokens and by reading
misplaced tags as text."""

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
from sgl_apr.formats.reading_progress import report_position

END = "$END"
# Limits of the search for one repair: inserted tags, inserted tokens, and parser states.
MAX_TAGS, MAX_TOKENS, MAX_STATES = 3, 14, 400
END_LIMITS = 99, 60, 4000  # the same limits for closing what is open at the end
LOOK_AHEAD = 5  # a repair is judged by how many of this many following tags can be read
MAX_INSERTIONS = 3  # candidates that are compared for one repair
Stack = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repair:
    """One change that makes the text acceptable.

    Attributes:
        offset: Where it applies, in characters.
        inserted: The names of the terminals that were inserted there; empty if a piece was read as text.
        end: Where the piece that was read as text ends.
        in_branch: Whether it lies in the text of a branch.
    """

    offset: int
    inserted: tuple[str, ...] = ()
    end: int = 0
    in_branch: bool = False


@dataclass
class ErrorRecoveringParser:
    """Reads one text by one grammar, whatever is wrong with it.

    Decisions are cached by the parser's stack and the tags that follow, so a defect that repeats costs one
    lookup and the time is linear in the length of the text.

    Attributes:
        grammar: The grammar.
        text: The text.
        depth: How deep blocks can nest, which bounds the stack.
        tokens: After `run`: tokens that the grammar accepts.
        repairs: After `run`: what was changed.
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
        self.fixed: dict[str, str] = {}  # terminals by name
        self.patterns: dict[str, re.Pattern[str]] = {}
        for terminal in parser.terminals:
            if isinstance(terminal.pattern, PatternStr):
                self.fixed[terminal.name] = terminal.pattern.value
            elif terminal.name != TEXT:
                self.patterns[terminal.name] = re.compile(terminal.pattern.to_regexp())
        tags = set(self.grammar.tag_literals)
        # Tags that only the text of separate branches uses have no terminal in this parser.
        self.fixed |= {tag: tag for tag in tags - set(self.fixed.values())}
        self.tags = {name: value for name, value in self.fixed.items() if value in tags}
        name_by_tag = {value: name for name, value in self.tags.items()}
        any_tag = "|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True))
        matches = [(m.start(), name_by_tag[m[0]]) for m in re.finditer(any_tag, self.text)] if tags else []
        self.tag_offsets = [offset for offset, _ in matches]
        self.tag_kinds = [kind for _, kind in matches]
        closing = self.grammar.closing_literal("body") or self.grammar.closing_literal("body", "1")
        self.closer = next((name for tag, name in name_by_tag.items() if closing.startswith(tag)), "")
        self.fork_tag = name_by_tag.get(self.grammar.opening_literal("fork"), "")
        block_ends = [self.grammar.closing_literal(rule) for rule in ("close", "tail")]
        self.block_end = next((name_by_tag[tag] for tag in block_ends if tag in name_by_tag), "")
        self.partner: dict[
            int, int
        ] = {}  # the index of the tag that closes a block, by that of its first tag
        opened: list[int] = []
        for i, kind in enumerate(self.tag_kinds):
            if kind == self.fork_tag:
                opened.append(i)
            elif kind == self.block_end and opened:
                self.partner[opened.pop()] = i
        self.max_stack = 24 * (self.depth + 1)
        self._candidates: dict[int, list[str]] = {}
        self._shifts: dict[tuple[Stack, str], Stack | None] = {}
        self._insertions: dict[tuple[Stack, frozenset[str]], list[tuple[str, ...]]] = {}
        self._decisions: dict[Any, tuple[str, ...] | None] = {}

    def run(self) -> None:
        """Fill `tokens` and `repairs`."""
        stack: Stack = (self.start,)
        at, size = 0, len(self.text)
        report_position(lambda: at)
        while at < size:
            token = self.token(stack, at)
            if token is not None:
                stack = self.shift(stack, token.type)
                self.tokens.append(token)
                at = token.end_pos or size
                continue
            stack, at = self.repair(stack, at)
        while self.try_shift(stack, END) is None:  # close what is open, the innermost first
            inserted = self.closing(stack)
            if inserted is None:  # nothing completes it
                return
            stack = self.insert(stack, inserted, size)

    def token(self, stack: Stack, at: int) -> Token | None:
        """The token that the grammar accepts at an offset, if there is one."""
        for name in self.candidates(stack[-1]):
            end = self.terminal_end(name, at)
            if name == self.fork_tag and len(stack) > self.max_stack:
                continue
            if end > at and self.try_shift(stack, name) is not None:
                return _token(name, self.text, at, end)
        return None

    def candidates(self, state: int) -> list[str]:
        """The terminals of a parser state: fixed texts first, the longest of them first, and free text last."""
        if state not in self._candidates:
            names = [n for n in self.states[state] if n in self.fixed or n in self.patterns or n == TEXT]
            names.sort(key=lambda n: (n == TEXT, n not in self.fixed, -len(self.fixed.get(n, ""))))
            self._candidates[state] = names
        return self._candidates[state]

    def terminal_end(self, name: str, at: int) -> int:
        """Where a terminal that begins at an offset ends; the offset itself if it does not begin there."""
        if name == TEXT:
            i = bisect_left(self.tag_offsets, at)
            return self.tag_offsets[i] if i < len(self.tag_offsets) else len(self.text)
        if name in self.fixed:
            return at + len(self.fixed[name]) if self.text.startswith(self.fixed[name], at) else at
        match = self.patterns[name].match(self.text, at)
        return match.end() if match else at

    def try_shift(self, stack: Stack, name: str) -> Stack | None:
        """The stack after a terminal, or None if the grammar does not accept it (LALR, states only)."""
        key = (stack, name)
        if key not in self._shifts:
            self._shifts[key] = self._compute_shift(stack, name)
        return self._shifts[key]

    def _compute_shift(self, stack: Stack, name: str) -> Stack | None:
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

    def shift(self, stack: Stack, *names: str) -> Stack:
        """The stack after terminals that the grammar accepts."""
        for name in names:
            shifted = self.try_shift(stack, name)
            assert shifted is not None
            stack = shifted
        return stack

    def repair(self, stack: Stack, at: int) -> tuple[Stack, int]:
        """Insert something at an offset, or read what stands there as text. Returns the stack and the next offset."""
        i = bisect_left(self.tag_offsets, at)
        is_tag = i < len(self.tag_offsets) and self.tag_offsets[i] == at
        if not is_tag and self.tokens and self.tokens[-1].type == TEXT and self.in_text(stack):
            return self.treat_as_text(stack, at, self.terminal_end(TEXT, at))
        if is_tag and (end := self.nested_end(stack, i)) is not None:
            return self.treat_as_text(stack, at, end)
        following = frozenset({self.tag_kinds[i]}) if is_tag else self.matching(at)
        key = (stack, following, tuple(self.tag_kinds[i : i + LOOK_AHEAD + 1]))
        if key not in self._decisions:
            self._decisions[key] = self.decide(stack, at, following)
        inserted = self._decisions[key]
        # A cached decision can come from a place with other text.
        if inserted is not None and self.token(self.shift(stack, *inserted), at) is not None:
            return self.insert(stack, inserted, at), at
        end = self.tag_end(i) if is_tag else self.terminal_end(TEXT, at)
        return self.treat_as_text(stack, at, end)

    def tag_end(self, i: int) -> int:
        """Where the i-th tag of the text ends."""
        return self.tag_offsets[i] + len(self.fixed[self.tag_kinds[i]])

    def matching(self, at: int) -> frozenset[str]:
        """Every terminal that can begin at an offset at which no tag begins."""
        names = [n for n in (*self.fixed, *self.patterns) if self.terminal_end(n, at) > at]
        return frozenset([*names, TEXT])

    def decide(self, stack: Stack, at: int, following: frozenset[str]) -> tuple[str, ...] | None:
        """What to insert, or None to read the next piece as text: whichever lets more of the next tags be read."""
        i = bisect_left(self.tag_offsets, at)
        is_tag = i < len(self.tag_offsets) and self.tag_offsets[i] == at
        skipped = self.tag_end(i) if is_tag else self.terminal_end(TEXT, at)
        best: tuple[str, ...] | None = None
        best_score = self.read_ahead(stack, skipped) - 1.5
        if is_tag and self.is_pair(i):
            best_score = max(best_score, self.read_ahead(stack, self.tag_end(i + 1)) - 2.0)
        if len(stack) > self.max_stack:
            return None
        for inserted in self.insertion_candidates(stack, following):
            penalty = sum(0.6 for n in inserted if n in self.tags)
            score = self.read_ahead(self.shift(stack, *inserted), at) - penalty
            if score > best_score:
                best, best_score = inserted, score
        return best

    def is_pair(self, i: int) -> bool:
        """Whether the tag after tag `i` closes it."""
        closing = self.fixed[self.tag_kinds[i]].replace("<", "</", 1)
        return i + 1 < len(self.tag_kinds) and self.fixed[self.tag_kinds[i + 1]] == closing

    def nested_end(self, stack: Stack, i: int) -> int | None:
        """Where a block inside a branch ends that begins with tag `i`, if the branch ends right after it."""
        j = self.partner.get(i)
        if j is None or not self.can_close_branch(stack):
            return None
        branch_ends_next = j + 1 < len(self.tag_kinds) and self.tag_kinds[j + 1] == self.closer
        return self.tag_end(j) if branch_ends_next else None

    def read_ahead(self, stack: Stack, at: int) -> int:
        """How many tags after an offset can be read before the next defect, at most `LOOK_AHEAD`."""
        read = 0
        while read < LOOK_AHEAD:
            if at >= len(self.text):
                return LOOK_AHEAD if self.try_shift(stack, END) else read
            token = self.token(stack, at)
            if token is None:
                if self.in_text(stack) and self.terminal_end(TEXT, at) > at:  # the text continues
                    at = self.terminal_end(TEXT, at)
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

    def insertion_candidates(self, stack: Stack, following: frozenset[str]) -> list[tuple[str, ...]]:
        """Sequences of terminals after which one of `following` is accepted; fewest tags first."""
        key = (stack, following)
        if key not in self._insertions:
            suitable = (
                inserted
                for inserted, shifted in self.reachable(stack, MAX_TAGS, MAX_TOKENS, MAX_STATES)
                if any(self.try_shift(shifted, n) for n in following)
            )
            self._insertions[key] = list(islice(suitable, MAX_INSERTIONS))
        return self._insertions[key]

    def closing(self, stack: Stack) -> tuple[str, ...] | None:
        """What closes the innermost open item."""
        for inserted, shifted in self.reachable(stack, *END_LIMITS):
            if self.try_shift(shifted, END) or len(shifted) < len(stack):
                return inserted
        return None

    def reachable(
        self, stack: Stack, max_tags: int, max_tokens: int, max_states: int
    ) -> Iterator[tuple[tuple[str, ...], Stack]]:
        """Sequences of terminals that can be inserted, with the stack after each; fewest tags first."""
        queue: list[tuple[int, int, int, tuple[str, ...], Stack]] = [(0, 0, 0, (), stack)]
        seen = {stack}
        order = 0
        while queue and max_states:
            max_states -= 1
            tags, length, _, inserted, here = heappop(queue)
            if inserted:
                yield inserted, here
            if tags >= max_tags or length >= max_tokens or len(here) > self.max_stack + max_tokens:
                continue
            for name in self.candidates(here[-1]):
                shifted = self.try_shift(here, name)
                if shifted is not None and shifted not in seen:
                    seen.add(shifted)
                    order += 1
                    heappush(
                        queue, (tags + (name in self.tags), length + 1, order, (*inserted, name), shifted)
                    )

    def insert(self, stack: Stack, inserted: tuple[str, ...], at: int) -> Stack:
        """Insert terminals at an offset and return the stack after them."""
        self.repairs.append(Repair(at, inserted, at, self.can_close_branch(stack)))
        self.tokens += [_token(name, "", at, at) for name in inserted]
        return self.shift(stack, *inserted)

    def treat_as_text(self, stack: Stack, at: int, end: int) -> tuple[Stack, int]:
        """Read a misplaced piece as text, joined to the text before it if there is some."""
        last = self.tokens[-1] if self.tokens else None
        extends_text = last is not None and last.type == TEXT and (last.end_pos or 0) > (last.start_pos or 0)
        if not (extends_text and self.has_no_tag(at, end)):  # plain text after a misplaced tag is no defect
            self.repairs.append(Repair(at, (), end, self.can_close_branch(stack)))
        if last is not None and extends_text:
            last.end_pos = end
            return stack, end
        shifted = self.try_shift(stack, TEXT)
        if shifted is not None:
            self.tokens.append(_token(TEXT, self.text, at, end))
            return shifted, end
        return stack, end

    def has_no_tag(self, start: int, end: int) -> bool:
        """Whether no tag begins in a piece of the text."""
        i = bisect_left(self.tag_offsets, start)
        return i >= len(self.tag_offsets) or self.tag_offsets[i] >= end

    def can_close_branch(self, stack: Stack) -> bool:
        """Whether a branch can end here, which means that its text is being read."""
        return bool(self.closer) and self.try_shift(stack, self.closer) is not None


def _token(name: str, text: str, start: int, end: int) -> Token:
    return Token(name, text[start:end] if name in (TEXT, NUMBER) or end > start else "", start, end_pos=end)
