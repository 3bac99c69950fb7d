"""Chooses the replica and the data-parallel rank of a request, and knows what SGLang's router drops from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

ROUTING_KEY_HEADER = "X-SMG-Routing-Key"  # SGLang's router (--policy manual) sends one key to one replica
ROUTING_KEY_FIELD = "routing_key"  # a field of a request: a routing key of its own

# Fields and sampling parameters that the router silently drops.
ROUTER_DROPPED_FIELDS = frozenset(
    {
        *("cache_salt", "max_thinking_tokens", "require_reasoning", "session_id", "watermark"),
        *("beam_width", "custom_params", "logit_bias", "stop_regex", "structural_tag"),
    }
)


def routing_key(rid: str) -> str:
    """Return the key of a request that has none of its own: the trajectory's part of its id.

    Examples:
        >>> routing_key("apr-1f3a-01"), routing_key("apr-1f3a")
        ('apr-1f3a', 'apr-1f3a')
    """
    return "-".join(rid.split("-")[:2])


def dp_rank(key: str, ranks: int) -> int:
    """Return the data-parallel rank of a key, out of `ranks`. It is the same in every process."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % ranks


def dropped_by_router(body: Mapping[str, Any]) -> list[str]:
    """Return the names of what a router would drop from a `/generate` request.

    Examples:
        >>> dropped_by_router({"cache_salt": "mine", "sampling_params": {"logit_bias": {"5": 1.0}, "stop_regex": ()}})
        ['cache_salt', 'logit_bias']
    """
    sampling = body.get("sampling_params")
    fields = {**body, **sampling} if isinstance(sampling, Mapping) else body
    return sorted(name for name in ROUTER_DROPPED_FIELDS if fields.get(name))


def healthy_worker_urls(answer: Mapping[str, Any]) -> list[str]:
    """Return the URLs of the healthy replicas from a router's `/workers`, which may list each rank of a replica.

    Examples:
        >>> healthy_worker_urls({"workers": [{"url": f"http://one:1@{rank}", "is_healthy": True} for rank in (0, 1)]})
        ['http://one:1']
    """
    healthy = (str(worker["url"]) for worker in answer["workers"] if worker["is_healthy"])
    return sorted({re.sub(r"/?(@\d+)?$", "", url) for url in healthy})
