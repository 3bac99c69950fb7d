"""Names that the processes of a server share."""

from __future__ import annotations

LAUNCHED_ENV = "SGLANG_APR_LAUNCHED"
CPU_ATTENTION_BACKEND = "apr_cpu"
CACHE_SECRET_ENV = "SGLANG_APR_SECRET"  # made by the first process of a server, for all of them
KV_JOIN_ENV = "SGLANG_APR_KV_JOIN"  # 0: SGLang's cache and positions are left alone
