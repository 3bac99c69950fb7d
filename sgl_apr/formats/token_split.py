"""Splits token ids at character offsets of their text."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from sgl_apr.tokenizer import CONTEXT_TOKENS, Tokenizer

TAG = re.compile(r"<[^<>]*>")
REPLACEMENT = "\ufffd"  # what a decoder writes for an incomplete character


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
