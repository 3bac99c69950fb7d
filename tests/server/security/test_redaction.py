"""No secret of a server's arguments is in what SGLang writes about them."""

from __future__ import annotations

import json

import pytest

from sgl_apr.server.security.redaction import REDACTED, is_secret_flag, redact, redact_argv


def test_every_secret_is_replaced_and_nothing_else():
    arguments = {
        "api_key": "K",
        "admin_api_key": None,
        "ssl_keyfile_password": "P",
        "ssl_keyfile": "key.pem",
        "max_total_tokens": 5,
        "tokenizer_path": "/model",
        "otlp_traces_endpoint": "http://user:P@collector:4317/v1",
        "encoder_urls": ["http://a:b@one", "http://two"],
        "hicache_storage_backend_extra_config": json.dumps(
            {"secret_key": "S", "bucket": "b", "tp": {"token": "T"}}
        ),
        "model_loader_extra_config": "{}",
        "kv_events_config": {"publisher": "zmq", "password": "P"},
        "num_reserved_decode_tokens": 512,
    }
    redacted = redact(arguments)
    changed = {name: value for name, value in redacted.items() if value != arguments[name]}
    assert changed == {
        "api_key": REDACTED,
        "ssl_keyfile_password": REDACTED,
        "otlp_traces_endpoint": f"http://{REDACTED}@collector:4317/v1",
        "encoder_urls": [f"http://{REDACTED}@one", "http://two"],
        "hicache_storage_backend_extra_config": json.dumps(
            {"secret_key": REDACTED, "bucket": "b", "tp": {"token": REDACTED}}
        ),
        "kv_events_config": {"publisher": "zmq", "password": REDACTED},
    }


@pytest.mark.parametrize(
    ("argv", "redacted"),
    [
        (["--api-key", "K", "--port", "1"], ["--api-key", REDACTED, "--port", "1"]),
        (["--api-key=K"], [f"--api-key={REDACTED}"]),
        (["--admin-api", "K"], ["--admin-api", REDACTED]),
        (["--ssl-keyfile-password", "K"], ["--ssl-keyfile-password", REDACTED]),
        (["--ssl-keyfile", "file"], ["--ssl-keyfile", "file"]),
        (["--otlp-traces-endpoint=http://u:p@h"], [f"--otlp-traces-endpoint=http://{REDACTED}@h"]),
        (["--api-key-file", "file"], ["--api-key-file", "file"]),
    ],
)
def test_command_lines(argv: list[str], redacted: list[str]):
    assert redact_argv(argv) == redacted


def test_sglang_has_no_other_flag_that_looks_like_a_secret():
    """A new argument of SGLang for a key or a password has to be added to `SECRET_ARGUMENTS`."""
    from sglang.srt.server_args import ServerArgs

    words = ("key", "password", "secret", "credential")
    suspicious = {
        name for name in ServerArgs.__struct_fields__ if any(word in name.split("_") for word in words)
    }
    known = {"watermark_key", "watermark_key_b"}  # SGLang redacts them itself
    assert {name for name in suspicious - known if not is_secret_flag("--" + name.replace("_", "-"))} == set()


def test_representation_dump_and_dictionary_of_sglangs_arguments():
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    arguments = ServerArgs(
        model_path="dummy", api_key="KEY1", admin_api_key="KEY2", otlp_traces_endpoint="http://a:PW@b"
    )
    assert arguments.api_key == "KEY1"
    for text in (repr(arguments), str(arguments), str(arguments.resolved_dict())):
        assert not [secret for secret in ("KEY1", "KEY2", "PW") if secret in text]
    assert f"api_key={REDACTED!r}" in repr(arguments)
