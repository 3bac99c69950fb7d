"""Keys of a server come from flags, files or the environment, and get onto no command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_apr.server.launch.secret_options import public_environment, take_secrets
from sgl_apr.server.launch.usage import UsageError


def test_secrets_are_separated(tmp_path: Path):
    (tmp_path / "key").write_text("from-file\n")
    argv = [
        "--model",
        "m",
        "--api-key",
        "K",
        "--admin-api-key-file",
        str(tmp_path / "key"),
        "--ssl-keyfile",
        "f",
    ]
    public, secrets = take_secrets(
        argv, {"SGL_APR_SSL_KEYFILE_PASSWORD": "pä ss", "SGL_APR_API_KEY": "unused"}
    )
    assert public == ["--model", "m", "--ssl-keyfile", "f"]
    assert sorted(secrets) == ["--admin-api-key=from-file", "--api-key=K", "--ssl-keyfile-password=pä ss"]


def test_the_environment_is_used_and_not_passed_on():
    environment = {"SGL_APR_API_KEY": "K", "SGL_APR_ADMIN_API_KEY": "-A", "PATH": "/bin"}
    assert take_secrets(["--port=1"], environment) == (["--port=1"], ["--api-key=K", "--admin-api-key=-A"])
    assert public_environment(environment) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["--api-key", ""], {}, "--api-key is empty"),
        (["--api-key="], {}, "--api-key is empty"),
        ([], {"SGL_APR_ADMIN_API_KEY": ""}, "SGL_APR_ADMIN_API_KEY is empty"),
        (["--api-key"], {}, "argument --api-key: expected one argument"),
        (["--api-key", "--port", "1"], {}, "argument --api-key: expected one argument"),
        (["--api-key-file", "/no/such"], {}, "--api-key-file: /no/such cannot be read"),
        (["--api-key", "k", "--api-key-file", "/no"], {}, r"/no cannot be read|both given"),
        (["--api-k", "K"], {}, "found the abbreviation --api-k, expected a flag in full"),
        (["--adm=K"], {}, "found the abbreviation --adm"),
        (["--api-key", "schlüssel"], {}, "expected printable ASCII"),
        (["--api-key", "two\nlines"], {}, "expected printable ASCII"),
        (["--api-key", " k"], {}, "expected printable ASCII"),
    ],
)
def test_mistakes(argv: list[str], environment: dict[str, str], message: str):
    with pytest.raises(UsageError, match=message) as error:
        take_secrets(argv, environment)
    assert "schlüssel" not in str(error.value)


def test_a_flag_and_a_file_are_both_given(tmp_path: Path):
    (tmp_path / "key").write_text("K")
    with pytest.raises(UsageError, match="were both given, expected one of them"):
        take_secrets(["--api-key-file", str(tmp_path / "key"), "--api-key", "K"], {})
