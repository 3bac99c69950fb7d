"""Reads keys and passwords of a server from flags, files and the environment, and keeps them off command lines.

Every user of a machine can read the command lines of its processes. So the launcher hands the secrets to the server
through a socket, removes the environment variables from the server's environment, and overwrites its own command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_apr.server.launch.usage import UsageError
from sgl_apr.server.security.redaction import redact_argv

MAX_SECRET_FILE_BYTES = 8192


@dataclass(frozen=True, slots=True)
class SecretOption:
    """A secret of the server.

    Attributes:
        flag: SGLang's flag, which is followed by the secret.
        variable: The environment variable with the secret.
    """

    flag: str
    variable: str

    @property
    def file_flag(self) -> str:
        """The flag that is followed by a file with the secret."""
        return f"{self.flag}-file"


SECRET_OPTIONS = (
    SecretOption("--api-key", "SGL_APR_API_KEY"),
    SecretOption("--admin-api-key", "SGL_APR_ADMIN_API_KEY"),
    SecretOption("--ssl-keyfile-password", "SGL_APR_SSL_KEYFILE_PASSWORD"),
)
SECRET_VARIABLES = frozenset(option.variable for option in SECRET_OPTIONS)


def take_secrets(
    argv: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[list[str], list[str]]:
    """Separate the secrets from the other flags.

    A flag, a file and the environment may each name a secret. The flag or the file wins over the environment.

    Args:
        argv: The flags of `sgl-apr serve`.
        environment: The environment variables.

    Returns:
        The other flags, which may stand on a command line, and SGLang's flags for the secrets, which may not.

    Raises:
        UsageError: A secret is empty, is not ASCII, is given twice or is missing, or a file cannot be read.
    """
    public: list[str] = []
    values: dict[str, str] = {}
    sources: dict[str, str] = {}
    flags = {option.flag: option for option in SECRET_OPTIONS} | {o.file_flag: o for o in SECRET_OPTIONS}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name not in flags:
            _reject_abbreviation(name)
            public.append(argument)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"argument {name}: expected one argument")
            value = rest.pop(0)
        option = flags[name]
        if sources.get(option.flag, name) != name:
            raise UsageError(f"{option.flag} and {option.file_flag} were both given, expected one of them")
        sources[option.flag] = name
        values[option.flag] = _read_file(name, Path(value)) if name == option.file_flag else value
    for option in SECRET_OPTIONS:
        if option.flag not in values and option.variable in environment:
            sources[option.flag] = option.variable
            values[option.flag] = environment[option.variable]
    for flag, value in values.items():
        _check_value(sources[flag], value)
    # "=", because a secret may begin with "-".
    return public, [f"{flag}={value}" for flag, value in values.items()]


def _reject_abbreviation(flag: str) -> None:
    if flag == "--ssl-keyfile" or not flag.startswith("--") or len(flag) < 3:
        return
    for option in SECRET_OPTIONS:
        if option.flag.startswith(flag):
            raise UsageError(f"found the abbreviation {flag}, expected a flag in full, such as {option.flag}")


def _read_file(flag: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_FILE_BYTES + 1)
        if len(content) > MAX_SECRET_FILE_BYTES:
            raise UsageError(f"{flag} {path}: expected at most {MAX_SECRET_FILE_BYTES} bytes")
        return content.decode().strip("\r\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: {path} cannot be read: {error}") from error


def _check_value(source: str, value: str) -> None:
    if not value:
        raise UsageError(f"{source} is empty, expected a key (leave it out for a server without one)")
    if source.startswith(("--ssl", "SGL_APR_SSL")):
        return
    if not value.isascii() or not value.isprintable() or value != value.strip():
        raise UsageError(
            f"{source} has spaces at its ends, or characters that an HTTP header cannot carry; expected printable ASCII"
        )


def public_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables without those that have a secret of the server."""
    return {name: value for name, value in environment.items() if name not in SECRET_VARIABLES}


def hide_secrets_of_command_line() -> None:
    """Overwrite the secrets on the command line of this process, where the operating system allows it."""
    original = getattr(sys, "orig_argv", sys.argv)
    redacted = redact_argv(original)
    if redacted == list(original):
        return
    try:
        import setproctitle
    except ImportError:  # it comes with SGLang
        return
    setproctitle.setproctitle(" ".join(redacted))
