"""Names that the processes of a server share, and the environment variables that switch parts of the plugin off."""

from __future__ import annotations

CPU_ATTENTION_BACKEND = "apr_cpu"

LAUNCHED_ENV = "SGLANG_APR_LAUNCHED"  # set in every process that `sgl-apr serve` or `Server` starts
CACHE_SECRET_ENV = "SGLANG_APR_SECRET"  # the secret of the cache, if the operator sets it
GENERATED_SECRET_ENV = "SGLANG_APR_GENERATED_SECRET"  # the secret that the first process makes for all others

# Each of these switches one feature off if it is "0". All are on by default.
KV_JOIN_ENV = "SGLANG_APR_KV_JOIN"  # joins in the KV cache: SGLang's cache and positions stay as they are
SHARED_PREFIX_ENV = "SGLANG_APR_SHARED_PREFIX"  # CPU attention reads a shared prefix once for all requests
MASK_SLICES_ENV = "SGLANG_APR_MASK_SLICES"  # llguidance prepares token masks for free text
GRAMMAR_LIMITS_ENV = "SGLANG_APR_GRAMMAR_LIMITS"  # grammars that take too long for a token are refused
PADDED_MATMUL_ENV = "SGLANG_APR_PADDED_MATMUL"  # on a CPU, two or three rows are multiplied as four
FORK_START_ENV = "SGLANG_APR_FORK_START"  # on a CPU, SGLang's processes start by fork in place of spawn
PAUSE_GC_ENV = "SGLANG_APR_PAUSE_GC"  # no garbage is collected while SGLang is imported
SKIP_FLASHINFER_ENV = "SGLANG_APR_SKIP_FLASHINFER"  # on a CPU, flashinfer is not imported
ONE_MODEL_MODULE_ENV = "SGLANG_APR_ONE_MODEL_MODULE"  # one module of models is imported in place of all
MASK_KERNEL_ENV = "SGLANG_APR_MASK_KERNEL"  # on a CPU, a C kernel applies token masks
QUICK_WARMUP_ENV = "SGLANG_APR_QUICK_WARMUP"  # the first request is sent as soon as the server listens

MODEL_MODULE_ENV = "SGLANG_APR_MODEL_MODULE"  # the module of SGLang with the served model's class
