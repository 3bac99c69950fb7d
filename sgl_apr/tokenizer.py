"""The tokenizer interface of the runtime, and its Hugging Face implementation.

The runtime only encodes text that it injects. Model output stays as the ids that were sampled.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from sgl_apr.errors import AprError, UnsupportedEngine

LONG_TEXT = 16_384  # characters whose encoding takes milliseconds
CONTEXT_TOKENS = 4  # tokens of context that decoding needs to keep a leading space


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

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The ids of all added tokens by their spellings, whether they are special or not."""
        ...


class HfTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library. Needs neither torch nor transformers.

    Args:
        directory: A local checkpoint directory, or a hub id.
        eos_ids: Token ids that end a reply. By default those that the checkpoint declares.

    Attributes:
        declared_dialects: The dialects that a model was trained on, the default first, from `apr_dialects` in
            `tokenizer_config.json`; empty if there is no such entry.

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
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content: i for i, token in added.items() if token.special}
        self._added_tokens = {token.content: i for i, token in added.items()}
        # Whether a text may have an added token without its spelling, as one in capital letters could.
        self.normalizes_added_tokens = self._backend.normalizer is not None and any(
            token.normalized for token in added.values()
        )
        self._eos_ids = frozenset(eos_ids) or frozenset(_eos_ids(Path(directory), self._added))
        self.declared_dialects = _declared_dialects(Path(directory))

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
    def added_tokens(self) -> Mapping[str, int]:
        return self._added_tokens

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token of a byte-level or byte-fallback vocabulary; None if they are not known.

        A token may be a part of a character, and then it has no text of its own.
        """
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        alphabet = _byte_alphabet()
        return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else None

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


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of every character of a byte-level vocabulary: printable ones are themselves, others follow 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


@lru_cache(maxsize=8)
def load_tokenizer(directory: str) -> HfTokenizer:
    """Return the tokenizer of a local checkpoint or hub id. It is read once and cached."""
    return HfTokenizer(directory)


def _declared_dialects(directory: Path) -> tuple[str, ...]:
    """The names in `tokenizer_config.json`."""
    import json

    path = directory / "tokenizer_config.json"
    names = json.loads(path.read_text()).get("apr_dialects") if path.exists() else None
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


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


class AddedTokenScanner:
    """Finds the spellings of added tokens in a text.

    Spaces and single characters are left out: tokenizers add them to shorten text, and they control nothing.

    Attributes:
        ids: The ids of the added tokens.
        spellings: Their spellings.
    """

    def __init__(self, added_tokens: Mapping[str, int]) -> None:
        added = {s: i for s, i in added_tokens.items() if len(s) > 1 and s.strip(" \t\r\n\u2581")}
        self.ids, self.spellings = frozenset(added.values()), frozenset(added)
        self._lengths: dict[str, list[int]] = {}
        for first, length in sorted({(s[0], len(s)) for s in added}):
            self._lengths.setdefault(first, []).append(length)
        self._first = re.compile("|".join(map(re.escape, self._lengths))) if added else None

    def occurrences(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where each occurrence begins and ends, also those that overlap, in the order of their beginnings."""
        for match in self._first.finditer(text) if self._first else ():
            start = match.start()
            for length in self._lengths[match[0]]:
                if text[start : start + length] in self.spellings:
                    yield start, start + length

    def cuts(self, text: str) -> list[int]:
        """Return ascending offsets, so that no piece between them contains an occurrence."""
        return list(dict.fromkeys(start + 1 for start, _ in self.occurrences(text)))


@lru_cache(maxsize=8)
def added_token_scanner(tokenizer: Tokenizer) -> AddedTokenScanner:
    """Return the scanner for the added tokens of a tokenizer."""
    return AddedTokenScanner(tokenizer.added_tokens)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return token ids of text that a stranger wrote. None of them is an added token, such as `<|im_end|>`.

    The text is cut inside each spelling of an added token, and its pieces are encoded one by one. A text without such
    spellings is encoded as usual.

    Args:
        tokenizer: The tokenizer.
        text: The text. The ids decode to it, as those of `tokenizer.encode` do.

    Raises:
        AprError: The text holds half a surrogate pair.
    """
    scanner = added_token_scanner(tokenizer)
    return encode_pieces(tokenizer, text, scanner.cuts(text), excluded=scanner.ids)


def encode_pieces(
    tokenizer: Tokenizer,
    text: str,
    cuts: Sequence[int],
    *,
    excluded: frozenset[int] = frozenset(),
    excluded_at: Container[int] | None = None,
    continues: bool = False,
) -> list[int]:
    """Encode the pieces of a text one by one.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        cuts: Where to cut it: ascending offsets in characters.
        excluded: Ids that no piece may have. A piece that has one all the same is cut further, since tokenizers may
            normalize what they match.
        excluded_at: Where the pieces begin that this holds for. None: it holds for all.
        continues: The text follows other text.
    """
    ids: list[int] = []
    known: dict[tuple[str, bool], list[int]] = {}
    for start, end in pairwise([0, *cuts, len(text)]):
        piece = text[start:end]
        is_plain = excluded_at is None or start in excluded_at
        key = (piece, is_plain)
        encoded = known.get(key) if start and len(piece) < 64 else None
        if encoded is None:
            unwanted = excluded if is_plain else frozenset[int]()
            encoded = _encode_piece(tokenizer, piece, unwanted, is_first=not start and not continues)
            if start and len(piece) < 64:
                known[key] = encoded
        ids += encoded
    return ids


def _encode_piece(tokenizer: Tokenizer, piece: str, excluded: frozenset[int], *, is_first: bool) -> list[int]:
    ids = tokenizer.encode(piece) if is_first else _encode_continuation(tokenizer, piece)
    if excluded.isdisjoint(ids):
        return ids
    if len(piece) == 1:
        return [i for i in ids if i not in excluded]
    middle = len(piece) // 2
    return [
        *_encode_piece(tokenizer, piece[:middle], excluded, is_first=is_first),
        *_encode_piece(tokenizer, piece[middle:], excluded, is_first=False),
    ]


def _encode_continuation(tokenizer: Tokenizer, piece: str) -> list[int]:
    """Encode text that follows other text. Some tokenizers put a space before the text of every call."""
    if _adds_space(tokenizer):
        for anchor in ("\n", "|"):
            before = tokenizer.encode(anchor)
            ids = tokenizer.encode(anchor + piece)
            if ids[: len(before)] == before:
                return ids[len(before) :]
    return tokenizer.encode(piece)


@lru_cache(maxsize=8)
def _adds_space(tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode("a")
    return tokenizer.decode(ids, ids) != "a"
