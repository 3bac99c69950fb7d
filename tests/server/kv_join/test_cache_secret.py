"""The secret of the cache is made when it is needed, and a wrong one is one clear error."""

from __future__ import annotations

import os

import pytest

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import CACHE_SECRET_ENV
from sgl_apr.server.kv_join.cache_secret import SECRET_BYTES, cache_secret


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CACHE_SECRET_ENV, raising=False)
    secret = cache_secret()
    assert len(secret) == SECRET_BYTES
    assert (cache_secret(), bytes.fromhex(os.environ[CACHE_SECRET_ENV])) == (secret, secret)
    monkeypatch.delenv(CACHE_SECRET_ENV)
    assert cache_secret() != secret


def test_a_wrong_one_is_an_error_that_does_not_print_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_SECRET_ENV, "wrong-secret")
    with pytest.raises(LaunchError, match="12 characters that is not hexadecimal") as error:
        cache_secret()
    assert "wrong-secret" not in str(error.value)
