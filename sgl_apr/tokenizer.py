"""The tokenizer interface of the runtime, and its Hugging Face implementation.

The runtime only encodes text that it injects. Model output stays as the ids that were sampled.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from sgl_apr.errors import AprError, UnsupportedEngine

LONG_TEXT = 16_384  # characters whose encoding takes milliseconds
CONTEXT_TOKENS = 4  # tokens of context that decoding needs to keep a leading space
TAG = re.compile(r"<[^<>]*>")
REPLACEMENT = "\ufffd"  # what a decoder writes for an incomplete character


class Tokenizer(Protocol):
    """What masks, the runtime loop and the scripted engine need from a tokenizer."""

    def __hash__(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a reply."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text. A tag that is one added token becomes that token.
            add_special_tokens: Add what the tokenizer puts at the start of every prompt (a BOS token).

        Raises:
            AprError: The text holds half a surrogate pair, which no token stands for.
        """
        ...

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Return the text of token ids, special tokens included.

        Args:
            ids: The ids to decode.
            after: The ids before them, which may decide about a leading space.
        """
        ...

    def special_token_id(self, tag: str) -> int | None:
        """Return the id of a tag that is one added token, which ordinary text cannot produce; otherwise None."""
        ...


class HfTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library. Needs neither torch nor transformers.

    Args:
        directory: A local checkpoint directory, or a hub id.
        eos_ids: Token ids that end a reply. By default those that the checkpoint declares.

    Raises:
        UnsupportedEngine: There is no usable `tokenizer.json`.
    """

    def __init__(self, directory: str | Path, eos_ids: Iterable[int] = ()) -> None:
        from tokenizers import Tokenizer as Backend

        path = Path(directory) / "tokenizer.json"
        try:
            self._backend = (
                Backend.from_file(str(path)) if path.exists() else Backend.from_pretrained(str(directory))
            )
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise UnsupportedEngine(
                f"no usable tokenizer.json for {str(directory)!r}: expected a directory or hub id "
                f"that has one, or pass tokenizer= ({error})"
            ) from error
        self._added = {
            token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        self._eos_ids = frozenset(eos_ids) or frozenset(_eos_ids(Path(directory), self._added))

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @cached_property
    def max_token_chars(self) -> int:
        """The characters of the longest token. A text of more than `n` times as many has more than `n` tokens."""
        return max(map(len, self._backend.get_vocab()))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        check_encodable(text)
        if len(text) < LONG_TEXT:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        # Only the batch functions let other threads run meanwhile. This one is also the fastest for a long text.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        # Some decoders drop a leading space. Decoding with a little context keeps it.
        context = list(after[-CONTEXT_TOKENS:])
        head = str(self._backend.decode(context, skip_special_tokens=False)) if context else ""
        return str(self._backend.decode([*context, *ids], skip_special_tokens=False))[len(head) :]

    def special_token_id(self, tag: str) -> int | None:
        return self._added.get(tag)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))


def check_encodable(text: str) -> None:
    """Check that a text can be encoded as UTF-8.

    Raises:
        AprError: It holds half a surrogate pair, as JSON such as `"\\ud800"` does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AprError(
            f"character {error.start} of the text is {text[error.start]!r}, half a surrogate pair: "
            "expected text that UTF-8 can encode"
        ) from None


def split_token_ids(
    ids: list[int] | tuple[int, ...], text: str, ends: list[int], tokenizer: Tokenizer
) -> Iterator[tuple[int, ...]]:
    """Split token ids at character offsets of their text.

    A token belongs to the piece in which its first character lies.

    Args:
        ids: Token ids whose text is `text`.
        text: The decoded text.
        ends: End offset of every piece in characters, ascending. The last is the length of the text.
        tokenizer: The tokenizer of the ids.

    Yields:
        The ids of each piece.
    """
    if not ends:
        return
    pending: list[int] = []
    starts: list[int] = []
    low, offset, cuts_at_tags = 0, 0, True
    for end in ends[:-1]:
        pending.append(end)
        high = _cut_at_tag(ids, low, text, offset, end, tokenizer, len(ends)) if cuts_at_tags else None
        if high is None:
            continue
        if high < 0:
            cuts_at_tags = False  # looking further could take quadratic time
            continue
        yield from _split_piece(starts, ids, low, high, offset, text, pending, tokenizer)
        low, offset, pending = high, end, []
    yield from _split_piece(starts, ids, low, len(ids), offset, text, [*pending, len(text)], tokenizer)


def _cut_at_tag(
    ids: list[int] | tuple[int, ...],
    low: int,
    text: str,
    offset: int,
    end: int,
    tokenizer: Tokenizer,
    pieces: int,
) -> int | None:
    """Where the ids have to be cut if a tag that is one token begins or ends at `end`.

    Returns:
        The index of the next token. None without such a tag, -1 if it is not the first of its kind.
    """
    if not offset < end < len(text) or text[end - 1] == REPLACEMENT:  # half a character may be there
        return None
    starting = TAG.match(text, end)
    tag = starting[0] if starting else text[max(offset, text.rfind("<", offset, end)) : end]
    token_id = tokenizer.special_token_id(tag)
    if token_id is None:
        return None
    try:
        index = ids.index(token_id, low) + (starting is None)
    except ValueError:
        return None
    # One that occurs once cannot be another. Counting is only quicker than decoding for a few pieces.
    if pieces < 4 and ids.count(token_id) == 1 and text.count(tag) == 1:
        return index
    return index if tokenizer.decode(ids[low:index], _context(ids, low)) == text[offset:end] else -1


def _context(ids: list[int] | tuple[int, ...], index: int) -> Sequence[int]:
    """The ids before an index on which the text of the next may depend."""
    return ids[max(0, index - CONTEXT_TOKENS) : index]


def _split_piece(
    starts: list[int],
    ids: list[int] | tuple[int, ...],
    low: int,
    high: int,
    offset: int,
    text: str,
    ends: list[int],
    tokenizer: Tokenizer,
) -> list[tuple[int, ...]]:
    """Split `ids[low:high]`, whose text begins at `offset` and ends with the last of `ends`."""
    if len(ends) == 1:
        return [tuple(ids[low:high])]
    if not starts:  # made once, and only where it is needed
        starts += [0] * len(ids)
    _locate_tokens(starts, ids, low, high, offset, text[offset : ends[-1]], ends, tokenizer)
    cuts = [low, *(bisect_left(starts, end, low, high) for end in ends[:-1]), high]
    return [tuple(ids[first:last]) for first, last in pairwise(cuts)]


def _locate_tokens(
    starts: list[int],
    ids: list[int] | tuple[int, ...],
    low: int,
    high: int,
    offset: int,
    text: str,
    ends: list[int],
    tokenizer: Tokenizer,
) -> None:
    """Fill `starts[low:high]` with the character offsets of these tokens, precisely where a cut depends on it.

    Bisects until no cut is left inside, so that few pieces have to be decoded separately.
    """
    next_end = bisect_right(ends, offset)
    has_cut = next_end < len(ends) and ends[next_end] < offset + len(text)
    middle = (low + high) // 2
    for cut in (*range(middle, high), *range(middle - 1, low, -1)) if has_cut else ():
        if cut == low:
            continue
        piece = tokenizer.decode(ids[low:cut], _context(ids, low))
        # A replacement character is either half of one that the cut splits, or stands in the text itself.
        splits_no_character = not piece.endswith(REPLACEMENT)
        if splits_no_character or piece + tokenizer.decode(ids[cut:high], _context(ids, cut)) == text:
            _locate_tokens(starts, ids, low, cut, offset, piece, ends, tokenizer)
            _locate_tokens(starts, ids, cut, high, offset + len(piece), text[len(piece) :], ends, tokenizer)
            return
    starts[low:high] = [offset] * (high - low)


@lru_cache(maxsize=8)
def load_tokenizer(directory: str) -> HfTokenizer:
    """Return the tokenizer of a local checkpoint or hub id. It is read once and cached."""
    return HfTokenizer(directory)


def _eos_ids(directory: Path, added: dict[str, int]) -> Iterable[int]:
    """The end-of-reply ids that a checkpoint declares in its generation, model or tokenizer configuration."""
    import json

    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.exists():
            value = json.loads(path.read_text()).get("eos_token_id")
            if value is not None:
                return [value] if isinstance(value, int) else list(value)
    path = directory / "tokenizer_config.json"
    if path.exists():
        token = json.loads(path.read_text()).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in added:
            return [added[content]]
    return []


def truncate_tokens(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """`text`, or its first `max_tokens` tokens."""
    ids = tokenizer.encode(text)
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens])
