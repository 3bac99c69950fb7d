"""Seeds of requests, which are the same in every run with the same seed."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(seed: int, *where: object) -> int:
    """A seed of 31 bits for the request at `where`, the same in every run with this `seed`."""
    digest = blake2b(" ".join(map(str, (seed, *where))).encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
