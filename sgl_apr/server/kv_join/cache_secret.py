"""The secret that all processes of a server share, with which the trees of joined prompts are named."""

from __future__ import annotations

import os
import secrets

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import CACHE_SECRET_ENV

SECRET_BYTES = 32


def cache_secret() -> bytes:
    """Return the secret of this process's server. The first process that asks for it makes it.

    Raises:
        LaunchError: The environment variable `CACHE_SECRET_ENV` is not hexadecimal.
    """
    text = os.environ.setdefault(CACHE_SECRET_ENV, secrets.token_hex(SECRET_BYTES))
    try:
        return bytes.fromhex(text)
    except ValueError:
        # The value is not printed: it may be the right secret with a typing error.
        raise LaunchError(
            f"{CACHE_SECRET_ENV} has a value of {len(text)} characters that is not hexadecimal, expected an even "
            "number of hexadecimal digits (leave it unset: the server then makes one)"
        ) from None
