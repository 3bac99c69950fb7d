"""Which of several replicas a request goes to, and what a router makes of it; pure, and nothing is sent in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

ROUTING_KEY_HEADER = "X-SMG-Routing-Key"  # by it SGLang's router keeps to one replica (--policy manual)
ROUTING_KEY_FIELD = "routing_key"  # among the fields of a request: a key of its own

# Fields and sampling parameters that the router leaves out of what it sends on, without a word.
ROUTER_DROPPED_FIELDS = frozenset(
    {
        *("cache_salt", "max_thinking_tokens", "require_reasoning", "session_id", "watermark"),
        *("beam_width", "custom_params", "logit_bias", "stop_regex", "structural_tag"),
    }
)


def routing_key(rid: str) -> str:
    """The key of a request that has none of its own: the trajectory's part of its id.

    >>> key_of("apr-1f3a-01"), key_of("apr-1f3a")
    ('apr-1f3a', 'apr-1f3a')
    """
    return "-".join(rid.split("-")[:2])


def dp_rank(key: str, ranks: int) -> int:
    """The data-parallel rank that a key belongs to, of so many: the same in every process."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % ranks


def dropped_by_router(body: Mapping[str, Any]) -> list[str]:
    """What a router would leave out of a `/generate` request, by name, and answer another one.

    >>> lost({"cache_salt": "mine", "sampling_params": {"logit_bias": {"5": 1.0}, "stop_regex": ()}})
    ['cache_salt', 'logit_bias']
    """
    sampling = body.get("sampling_params")
    given = {**body, **sampling} if isinstance(sampling, Mapping) else body
    return sorted(name for name in ROUTER_DROPPED_FIELDS if given.get(name))


def healthy_worker_urls(answer: Mapping[str, Any]) -> list[str]:
    """Where the replicas are that are well, by a router's `/workers`, which may list each rank of one.

    >>> addresses({"workers": [{"url": f"http://one:1@{rank}", "is_healthy": True} for rank in (0, 1)]})
    ['http://one:1']
    """
    well = (str(worker["url"]) for worker in answer["workers"] if worker["is_healthy"])
    return sorted({re.sub(r"/?(@\d+)?$", "", url) for url in well})
