"""The operator's limits on requests to any route of the server, and the flags that set them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgl_apr.server.api.limits import add_number_flags
from sgl_apr.server.launch.usage import UsageParser

MIB = 2**20
# By flag: the field of `GuardLimits`, the lowest value, and the help text.
LIMIT_FLAGS: Mapping[str, tuple[str, int | float, str]] = {
    "--apr-max-body-bytes": (
        "body_bytes", 1024, "bytes of a request's body (default: 8 MiB; 64 MiB for a multimodal model)",
    ),
    "--apr-body-timeout": ("body_timeout", 0.1, "seconds in which a body has to arrive (default: 60)"),
    "--apr-max-slow-bodies": (
        "slow_bodies", 1, "requests whose body takes longer than a second to arrive, at once (default: 64)",
    ),
    "--apr-max-connections": ("connections", 1, "open connections (default: 8192)"),
    "--apr-header-timeout": ("header_timeout", 0.1, "seconds in which a request's headers have to arrive (default: 30)"),
    "--apr-max-json-values": (
        "json_values", 100, "keys, strings, objects and lists in a body (default: 50000); numbers are not counted",
    ),
    "--apr-max-json-entries": ("json_entries", 100, "entries of all lists in a body (default: 1000000)"),
    "--apr-max-messages": ("messages", 1, "messages of a chat, and parts of their content (default: 2048)"),
    "--apr-max-json-depth": ("json_depth", 8, "nesting depth of a body's JSON (default: 100)"),
    "--apr-max-prompt-chars": (
        "prompt_chars", 1, "characters of one prompt (default: the context's tokens times the longest token's characters)",
    ),
    "--apr-max-prompts": (
        "prompts", 1, "sequences that a request asks for: its prompts times n (default: 1024)",
    ),
    "--apr-max-batch-bytes": (
        "batch_bytes", 1024, "bytes of the sampling parameters of a batch: their JSON times its sequences (default: 2 MiB)",
    ),
    "--apr-max-n": ("n", 1, "n, best_of and beam_width of a request (default: 128)"),
    "--apr-max-grammar-chars": (
        "grammar_chars", 1, "characters of a JSON schema, regex, EBNF or structural tag (default: 65536)",
    ),
    "--apr-max-top-logprobs": (
        "top_logprobs", 1, "top log-probabilities, and token_ids_logprob, per token (default: 1000)",
    ),
    "--apr-max-prompt-logprobs": (
        "prompt_logprobs", 1, "log-probabilities of a prompt: its tokens times those per token times n (default: 400000)",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """What a request to any route of the server may contain, and who may send it.

    Attributes:
        body_bytes: Bytes of a body. None: 8 MiB, or 64 MiB if the model reads images, video or audio.
        body_timeout: Seconds in which a body has to arrive.
        slow_bodies: Requests whose body takes longer than a second to arrive, at once.
        connections: Open connections.
        header_timeout: Seconds in which the headers of a request have to arrive.
        json_values: Keys, strings, objects and lists in a body.
        json_entries: Entries of all lists in a body.
        messages: Messages of a chat, and parts of their content.
        json_depth: Nesting depth of a body's JSON.
        prompt_chars: Characters of one prompt. None: what the context can hold.
        prompts: Sequences that one request asks for: its prompts times `n`.
        batch_bytes: Bytes of the sampling parameters of all sequences of a batch, as JSON.
        n: `n`, `best_of` and `beam_width` of a request.
        grammar_chars: Characters of a grammar.
        top_logprobs: Top log-probabilities per token.
        prompt_logprobs: Log-probabilities of the tokens of a prompt, for all of its `n` sequences.
        stop_regex: Whether requests may have `stop_regex`.
        sessions: Whether requests may open and use SGLang's sessions.
        origins: Origins of web pages that may send requests. "*" is any.
        hosts: Names in the header `Host` that are served in addition to the loopback names. "*" is any.
    """

    body_bytes: int | None = None
    body_timeout: float = 60.0
    slow_bodies: int = 64
    connections: int = 8192
    header_timeout: float = 30.0
    json_values: int = 50_000
    json_entries: int = 1_000_000
    messages: int = 2048
    json_depth: int = 100
    prompt_chars: int | None = None
    prompts: int = 1024
    batch_bytes: int = 2 * MIB
    n: int = 128
    grammar_chars: int = 65_536
    top_logprobs: int = 1000
    prompt_logprobs: int = 400_000
    stop_regex: bool = False
    sessions: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def add_guard_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags of the guard to a parser. A flag that is not given leaves no attribute."""
    add_number_flags(parser, LIMIT_FLAGS)
    for flag, field, text in (
        ("--apr-allow-stop-regex", "stop_regex", "allow `stop_regex`, which SGLang's scheduler matches at every step (a slow one stops the server)"),
        ("--apr-allow-sessions", "sessions", "allow sessions (`/open_session`), by which SGLang lets any client end the server and fill its memory"),
    ):  # fmt: skip
        parser.add_argument(flag, dest=field, action="store_true", default=argparse.SUPPRESS, help=text)
    for flag, field, metavar, text in (
        ("--apr-allow-origin", "origins", "ORIGIN", "web pages that may use the server, for example https://chat.example.com"),
        ("--apr-allow-host", "hosts", "NAME", "names in the header Host that are served, where the server listens on loopback"),
    ):  # fmt: skip
        parser.add_argument(
            flag,
            dest=field,
            nargs="+",
            action="extend",
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=f"{text}; * allows any",
        )


def parse_guard_arguments(argv: Sequence[str]) -> tuple[GuardLimits, list[str]]:
    """Parse the flags of the guard.

    Returns:
        The limits, and the remaining arguments.

    Raises:
        UsageError: A value is missing, not a number, or too low.
    """
    parser = UsageParser(add_help=False, allow_abbrev=False)
    add_guard_arguments(parser)
    parsed, remaining = parser.parse_known_args(list(argv))
    values = vars(parsed)
    for name in ("origins", "hosts"):
        if name in values:
            values[name] = tuple(value.strip().rstrip("/").lower() for value in values[name])
    return GuardLimits(**values), remaining
