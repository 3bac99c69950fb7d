"""Which of several replicas a request goes to: one key for all of a trajectory; pure, and nothing is sent in here."""

from __future__ import annotations

from hashlib import blake2b

HEADER = "X-SMG-Routing-Key"  # by it SGLang's router keeps to one replica (--policy manual)
FIELD = "routing_key"  # among the fields of a request: a key of its own


def key_of(rid: str) -> str:
    """The key of a request that has none of its own: the trajectory's part of its id.

    >>> key_of("apr-1f3a-01"), key_of("apr-1f3a")
    ('apr-1f3a', 'apr-1f3a')
    """
    return "-".join(rid.split("-")[:2])


def rank_of(key: str, ranks: int) -> int:
    """The data-parallel rank that a key belongs to, of so many: the same in every process."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % ranks
