"""Keeps keys and passwords out of everything that SGLang writes about its configuration.

SGLang answers `GET /server_info` with all its arguments, logs them at launch and pickles them into dumps. It leaves
out the keys of watermarks only. `redact` replaces every other secret: the server's own keys, the password of the TLS
key, secrets in arguments that are JSON objects, and passwords in URLs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from sgl_apr.server.hooks import hook_after, hook_around

REDACTED = "<redacted>"  # what SGLang itself writes for a watermark's key
SECRET_ARGUMENTS = frozenset({"api_key", "admin_api_key", "ssl_keyfile_password"})

# Names of secrets inside arguments that are JSON objects, such as the configuration of a storage backend.
_SECRET_NAME = re.compile(
    r"(^|[_-])(api_?key|secret|passw(or)?d|passphrase|credentials?|authorization|bearer|"
    r"(auth|access|session|hf|bearer|api|refresh)_?token|token|"
    r"(secret|access|private|account|secret_access)_?key(_id)?|sas|connection_?string)($|[_-])",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s\"']+(?=@)")


def redact(value: Any, name: str = "") -> Any:
    """Return a copy of a configuration value without its secrets.

    Args:
        value: A value of JSON, or any other object, which is returned as it is.
        name: The name that the value has in its configuration.

    Examples:
        >>> redact({"api_key": "K", "port": 1, "extra": '{"secret_key": "S", "bucket": "b"}'})
        {'api_key': '<redacted>', 'port': 1, 'extra': '{"secret_key": "<redacted>", "bucket": "b"}'}
    """
    if isinstance(value, dict):
        return {
            key: REDACTED
            if item not in (None, "") and _is_secret(key, inside=bool(name))
            else redact(item, str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [redact(item, name or "list") for item in value]
        return items if isinstance(value, list) else tuple(items)
    return _redact_text(value) if isinstance(value, str) else value


def _is_secret(key: object, *, inside: bool) -> bool:
    """Whether a key names a secret. Names of arguments are matched exactly: most of those with "token" are numbers."""
    return isinstance(key, str) and (
        key in SECRET_ARGUMENTS or (inside and _SECRET_NAME.search(key) is not None)
    )


def _redact_text(text: str) -> str:
    if text.lstrip().startswith("{"):
        try:
            parsed = json.loads(text)
        except ValueError:
            pass
        else:
            redacted = redact(parsed, "json")
            return text if redacted == parsed else json.dumps(redacted)
    return _URL_PASSWORD.sub(REDACTED, text) if "://" in text else text


def redact_argv(argv: Sequence[str]) -> list[str]:
    """Return a command line without its secrets.

    Examples:
        >>> redact_argv(["--port", "1", "--api-key", "K", "--admin-api-key=K"])
        ['--port', '1', '--api-key', '<redacted>', '--admin-api-key=<redacted>']
    """
    redacted: list[str] = []
    is_value = False
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        if is_value:
            redacted.append(REDACTED)
        elif equals and is_secret_flag(flag):
            redacted.append(f"{flag}={REDACTED}")
        elif flag.startswith("--") and equals:
            redacted.append(f"{flag}={_redact_text(argument[len(flag) + 1 :])}")
        else:
            redacted.append(_redact_text(argument))
        is_value = not equals and is_secret_flag(argument)
    return redacted


def is_secret_flag(flag: str) -> bool:
    """Return whether a flag of SGLang, or an abbreviation that argparse accepts, is followed by a secret."""
    if flag == "--ssl-keyfile" or len(flag) < 4:
        return False
    return any(("--" + name.replace("_", "-")).startswith(flag) for name in SECRET_ARGUMENTS)


def register_hooks() -> None:
    """Redact what SGLang writes about its arguments: answers, logs, dumps and representations."""
    arguments = "sglang.srt.server_args:ServerArgs"
    hook_after(f"{arguments}.resolved_dict", [], _redact_dict)
    hook_after(f"{arguments}.__repr__", [], _redact_representation)
    hook_around(
        "sglang.srt.sampling.watermarking.core:redact_watermark_command_line",
        ["argv", "watermark_config"],
        _redact_command_line,
    )
    hook_after(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._server_args_for_dump", [], _redact_dump
    )


def _redact_dict(resolved: dict[str, Any], *_: Any) -> Any:
    return redact(resolved)


def _redact_representation(text: str, arguments: Any) -> str:
    for name in arguments.__struct_fields__:
        value = getattr(arguments, name)
        redacted = redact({name: value})[name] if isinstance(value, str | dict | list | tuple) else value
        if redacted is not value and redacted != value:
            text = text.replace(f"{name}={value!r}", f"{name}={redacted!r}")
    return text


def _redact_command_line(original: Any, argv: Sequence[str], *rest: Any, **options: Any) -> Any:
    return original(redact_argv(argv), *rest, **options)


def _redact_dump(arguments: Any, *_: Any) -> Any:
    # SGLang itself writes this dictionary if it has a watermark's key to hide.
    return arguments if isinstance(arguments, dict) else arguments.resolved_dict()
