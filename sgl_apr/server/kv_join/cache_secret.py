"""The secret that all processes of a server share, with which the trees of joined prompts are named."""

from __future__ import annotations

import os
import secrets
from hashlib import blake2b
from typing import Any

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import CACHE_SECRET_ENV, GENERATED_SECRET_ENV

SECRET_BYTES = 32
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 64  # the hash takes no longer keys


def cache_secret() -> bytes:
    """Return the secret of this process's server: the operator's, or else one that the first process makes.

    Raises:
        LaunchError: The environment variable `CACHE_SECRET_ENV` is not hexadecimal, or too short or too long.
    """
    text = os.environ.get(CACHE_SECRET_ENV)
    if text is None:
        text = os.environ.setdefault(GENERATED_SECRET_ENV, secrets.token_hex(SECRET_BYTES))
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        # The value is not printed: it may be the right secret with a typing error.
        raise LaunchError(
            f"{CACHE_SECRET_ENV} has a value of {len(text)} characters that is not hexadecimal, expected an even "
            "number of hexadecimal digits (leave it unset: the server then makes one)"
        ) from None
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise LaunchError(
            f"{CACHE_SECRET_ENV} has {len(secret)} bytes, expected {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}: "
            f"{2 * MIN_SECRET_BYTES} to {2 * MAX_SECRET_BYTES} hexadecimal digits"
        )
    return secret


def require_shared_secret(nodes: int) -> None:
    """Check that the operator has set the secret if a server runs on several machines.

    Each machine would otherwise make its own, and the same joined prompt would be in trees of different names.

    Args:
        nodes: Machines that the server runs on.

    Raises:
        LaunchError: It is not set.
    """
    if nodes > 1 and CACHE_SECRET_ENV not in os.environ:
        raise LaunchError(
            f"--nnodes {nodes} needs one secret for the cache on all nodes: set the environment variable "
            f"{CACHE_SECRET_ENV} to the same {2 * SECRET_BYTES} hexadecimal digits on each of them (`openssl rand -hex "
            f"{SECRET_BYTES}` makes them), or serve with --radix-cache-backend stock, without joins in the KV cache"
        )


def check_ranks_share_secret(group: Any) -> None:
    """Check on every rank of a server that all have the same secret. Each rank waits for all others.

    Args:
        group: SGLang's group of the ranks with one model.

    Raises:
        LaunchError: Some ranks have another secret: those of a node where the operator has set another one.
    """
    if group.world_size == 1:
        return
    digest = blake2b(b"all ranks have the same secret", key=cache_secret(), digest_size=16).hexdigest()
    if len(set(group.all_gather_object(digest))) > 1:
        raise LaunchError(
            f"the nodes of this server have different secrets, expected the same {CACHE_SECRET_ENV} on each of them"
        )
