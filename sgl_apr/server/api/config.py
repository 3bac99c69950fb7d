"""The operator's settings for the HTTP API, and the command line flags that set them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from sgl_apr.errors import AprError, GrammarError
from sgl_apr.formats.dialects import Dialect, register_dialect
from sgl_apr.runtime.value_checks import SAMPLING_TYPES, check_type, drop_nulls
from sgl_apr.server.api.limits import LIMIT_FLAGS, RequestLimits, add_limit_arguments
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.server.api.tools.sources import ToolSources, tool_source
from sgl_apr.server.launch.usage import UsageError, UsageParser

NESTED_OPTIONS = ("budget", "pacing", "retry", "sampling")  # objects whose fields are merged one by one


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """The operator's settings for the HTTP API.

    Attributes:
        limits: How large a trajectory may be, and how many may run and wait.
        default_options: Options of every trajectory, unless its request sets them.
        all_chats: Whether a chat completion without `apr` is a trajectory, too.
        dialects: Dialects from files, in addition to those that every server has.
        plain_messages: Whether messages of chat requests without `apr` are kept from having control tokens, too.
        tools: Where the operator's tools come from: values of `--apr-tools`.
        tool_sources: The same, loaded.
        attention: The attention backend of the server, and why on a GPU.
    """

    limits: RequestLimits = field(default_factory=RequestLimits)
    default_options: Mapping[str, Any] = field(default_factory=dict)
    all_chats: bool = False
    dialects: tuple[Dialect, ...] = ()
    plain_messages: bool = False
    tools: tuple[str, ...] = ()
    tool_sources: ToolSources = field(default_factory=ToolSources)
    attention: str = ""


def add_api_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags of the HTTP API to a parser. A flag that is not given leaves no attribute."""
    add_limit_arguments(parser)
    parser.add_argument(
        "--apr-default",
        dest="default_options",
        type=_parse_default_options,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help='options of every trajectory that its request does not set: \'{"budget": {"width": 4}}\'',
    )
    parser.add_argument(
        "--apr-all-chats",
        dest="all_chats",
        action="store_true",
        default=argparse.SUPPRESS,
        help="answer chat completions without `apr` as if they had an empty one",
    )
    parser.add_argument(
        "--apr-plain-messages",
        dest="plain_messages",
        action="store_true",
        default=argparse.SUPPRESS,
        help="in chat requests without `apr`, too, tags that a user or a tool spells are text and no control tokens",
    )
    parser.add_argument(
        "--apr-dialect",
        dest="dialects",
        action="append",
        type=_parse_dialect,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="a .lark file, whose dialect requests can name; can be repeated",
    )
    parser.add_argument(
        "--apr-tools",
        dest="tools",
        action="append",
        type=tool_source,
        default=argparse.SUPPRESS,
        metavar="MODULE:NAME",
        help="tools that requests can name and this server runs: a function, a Tool or a list of them in a Python module, "
        "MODULE:NAME() for what a function returns, or a file *.json with mcpServers; can be repeated",
    )


def _parse_dialect(file: str) -> Dialect:
    """Read a grammar file and register its dialect in this process, so that options and requests can name it."""
    try:
        dialect = Dialect.from_file(file)
        register_dialect(dialect)
    except GrammarError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return dialect


def parse_api_arguments(argv: Sequence[str]) -> tuple[ApiConfig, list[str]]:
    """Parse the flags of the HTTP API.

    Returns:
        The settings, and the remaining arguments, which are SGLang's.

    Raises:
        UsageError: A value is missing, of the wrong type, or not possible.
    """
    parser = UsageParser(add_help=False, allow_abbrev=False)
    add_api_arguments(parser)
    parsed, remaining = parser.parse_known_args(list(argv))
    values = vars(parsed)
    limits = RequestLimits(
        **{name: values.pop(name) for name, _, _ in LIMIT_FLAGS.values() if name in values}
    )
    dialects = tuple(values.pop("dialects", ()))
    names = [dialect.name for dialect in dialects]
    if len({*names}) < len(names):
        raise UsageError(f"--apr-dialect: two files of one name: {', '.join(sorted(names))}")
    tools = tuple(values.pop("tools", ()))
    config = ApiConfig(limits, dialects=dialects, tools=tools, **values)
    if config.default_options:
        _check_default_options(config)
    return config, remaining


def merge_options(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge options. Later ones win. Of `NESTED_OPTIONS`, the fields are merged.

    A null counts as absent.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in drop_nulls(layer).items():
            if name in NESTED_OPTIONS and name in merged:
                value = check_type(name, merged[name], dict) | drop_nulls(check_type(name, value, dict))
            merged[name] = value
    return merged


def _parse_default_options(text: str) -> dict[str, Any]:
    """Parse the JSON of `--apr-default`. Sampling parameters are moved into the object `sampling`."""
    try:
        options = drop_nulls(check_type("the value", orjson.loads(text), dict))
        sampling = {name: options.pop(name) for name in SAMPLING_TYPES if name in options}
        return merge_options(options, {"sampling": sampling}) if sampling else options
    except ValueError as error:  # orjson's
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    except AprError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check_default_options(config: ApiConfig) -> None:
    """Check default options as those of a request, as far as that is possible without the model.

    Raises:
        UsageError: A request without options of its own would be refused.
    """
    from sgl_apr.engine.scripted import ByteTokenizer
    from sgl_apr.server.api.options import OptionsParser, ReasonRequest

    try:
        ResponseOptions.pop_from(options := dict(config.default_options))
        options.pop("tools", None)  # checked once the tools are loaded
        parser = OptionsParser(config.limits, ByteTokenizer(), context_length=2**31, vocab_size=2**31)
        parser.parse(ReasonRequest([0], options))
    except AprError as error:
        raise UsageError(f"argument --apr-default: {error}") from None
