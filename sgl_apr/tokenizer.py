"""A tokenizer as the runtime needs it: ids to text, injected text to ids; model output is never re-tokenized."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from sgl_apr.errors import UnsupportedEngine


class Tokenizer(Protocol):
    """What grammar lowering, the loop and the scripted engine ask of a tokenizer."""

    def __hash__(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a reply."""
        ...

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of `text`; `first` adds what the tokenizer puts at the start of every prompt (a BOS)."""
        ...

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Text of `ids` as it reads behind `after`, special tokens included."""
        ...

    def special(self, tag: str) -> int | None:
        """Id of `tag` if it is one added token that ordinary text cannot produce, else None."""
        ...


class HfTokenizer:
    """A `tokenizer.json` read by the `tokenizers` library: no torch, no transformers."""

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

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=first).ids)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        # Some decoders drop a leading space: decode behind a little context, then take it off again.
        context = list(after[-4:])
        head = str(self._backend.decode(context, skip_special_tokens=False)) if context else ""
        return str(self._backend.decode([*context, *ids], skip_special_tokens=False))[len(head) :]

    def special(self, tag: str) -> int | None:
        return self._added.get(tag)


def split_ids(
    ids: list[int] | tuple[int, ...], text: str, ends: list[int], tokenizer: Tokenizer
) -> Iterator[tuple[int, ...]]:
    """Cut `ids`, whose text is `text`, at the offsets `ends`; a token belongs where its first character lies."""
    starts, high = [0] * len(ids), len(ids)
    cut = ends[-2] if len(ends) > 1 else 0
    # Most end with a tag that is one token. Of a half character nobody can say whether it is whole.
    if 0 < cut < len(text) and text[cut - 1] != "\ufffd" and tokenizer.decode(ids[:-1]) == text[:cut]:
        high, starts[-1], text = high - 1, cut, text[:cut]
    _place(starts, ids, 0, high, 0, text, ends, tokenizer)
    cuts = [0, *(bisect_left(starts, end) for end in ends)]
    cuts[-1] = len(ids)
    for first, last in pairwise(cuts):
        yield tuple(ids[first:last])


def _place(
    starts: list[int],
    ids: list[int] | tuple[int, ...],
    low: int,
    high: int,
    offset: int,
    text: str,
    ends: list[int],
    tokenizer: Tokenizer,
) -> None:
    """Say where the tokens from `low` to `high` start, whose text is `text`, as far as a cut depends on it.

    They are halved until no cut is left inside, so that few have to be decoded apart from the others.
    """
    inside = any(offset < end < offset + len(text) for end in ends)
    middle = (low + high) // 2
    for cut in (*range(middle, high), *range(middle - 1, low, -1)) if inside else ():
        if cut == low:
            continue
        piece = tokenizer.decode(ids[low:cut], ids[:low])
        whole = not piece.endswith("\ufffd")  # half a character, unless the text itself has it there
        if whole or piece + tokenizer.decode(ids[cut:high], ids[:cut]) == text:
            _place(starts, ids, low, cut, offset, piece, ends, tokenizer)
            _place(starts, ids, cut, high, offset + len(piece), text[len(piece) :], ends, tokenizer)
            return
    starts[low:high] = [offset] * (high - low)


@lru_cache(maxsize=8)
def load_tokenizer(directory: str) -> HfTokenizer:
    """The tokenizer of a local checkpoint or hub id, read once."""
    return HfTokenizer(directory)


def _eos_ids(directory: Path, added: dict[str, int]) -> Iterable[int]:
    """End-of-reply ids as the checkpoint declares them: generation config, model config, tokenizer config."""
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
