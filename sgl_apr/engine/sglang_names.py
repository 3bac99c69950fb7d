"""Names and versions of SGLang that more than one package needs."""

from __future__ import annotations

SUPPORTED_SGLANG = "0.5.23"
RADIX_CACHE_BACKEND = "apr"  # the radix cache that joins branches
