"""Names, versions and status codes of SGLang that more than one package needs."""

from __future__ import annotations

SUPPORTED_SGLANG = "0.5.23"
RADIX_CACHE_BACKEND = "apr"  # --radix-cache-backend: the radix cache that joins branches
CACHE_MISS_STATUS = 409  # of a request whose layout needs tokens that are not cached, or no longer
GROUP_PARAM = "apr_group"  # a custom parameter: the group of workers that a request is of
