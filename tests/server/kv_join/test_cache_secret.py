"""The secret of the cache is made when it is needed, and a wrong one is one clear error."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import CACHE_SECRET_ENV, GENERATED_SECRET_ENV
from sgl_apr.server.kv_join.cache_secret import (
    SECRET_BYTES,
    cache_secret,
    check_ranks_share_secret,
    require_shared_secret,
)


@pytest.fixture(autouse=True)
def no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_SECRET_ENV, raising=False)
    monkeypatch.delenv(GENERATED_SECRET_ENV, raising=False)


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch):
    secret = cache_secret()
    assert len(secret) == SECRET_BYTES
    assert (cache_secret(), bytes.fromhex(os.environ[GENERATED_SECRET_ENV])) == (secret, secret)
    monkeypatch.delenv(GENERATED_SECRET_ENV)
    assert cache_secret() != secret


def test_the_operators_secret_is_used(monkeypatch: pytest.MonkeyPatch):
    generated = cache_secret()
    monkeypatch.setenv(CACHE_SECRET_ENV, "0f" * SECRET_BYTES)
    assert cache_secret() == b"\x0f" * SECRET_BYTES != generated


def test_a_wrong_one_is_an_error_that_does_not_print_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_SECRET_ENV, "wrong-secret")
    with pytest.raises(LaunchError, match="12 characters that is not hexadecimal") as error:
        cache_secret()
    assert "wrong-secret" not in str(error.value)


@pytest.mark.parametrize(("digits", "size"), [("", 0), ("a1" * 15, 15), ("a1" * 65, 65)])
def test_a_secret_that_the_hash_does_not_take_is_an_error(
    monkeypatch: pytest.MonkeyPatch, digits: str, size: int
):
    monkeypatch.setenv(CACHE_SECRET_ENV, digits)
    with pytest.raises(LaunchError, match=f"{CACHE_SECRET_ENV} has {size} bytes, expected 16 to 64"):
        cache_secret()


def test_several_nodes_need_the_operators_secret(monkeypatch: pytest.MonkeyPatch):
    """A secret that this machine has made does not count: the others have made their own."""
    require_shared_secret(1)
    cache_secret()
    with pytest.raises(
        LaunchError, match=f"--nnodes 2 needs one secret .* {CACHE_SECRET_ENV} .*openssl rand"
    ):
        require_shared_secret(2)
    monkeypatch.setenv(CACHE_SECRET_ENV, "0f" * SECRET_BYTES)
    require_shared_secret(2)


def test_nodes_with_different_secrets_are_an_error(monkeypatch: pytest.MonkeyPatch):
    digests: list[str] = []

    def gather(digest: str) -> list[str]:
        digests.append(digest)
        return digests

    group = SimpleNamespace(world_size=2, all_gather_object=gather)
    monkeypatch.setenv(CACHE_SECRET_ENV, "0f" * SECRET_BYTES)
    check_ranks_share_secret(group)
    check_ranks_share_secret(group)
    assert "0f0f" not in digests[0]
    monkeypatch.setenv(CACHE_SECRET_ENV, "0e" * SECRET_BYTES)
    check_ranks_share_secret(SimpleNamespace(world_size=1))
    with pytest.raises(LaunchError, match="different secrets"):
        check_ranks_share_secret(group)
