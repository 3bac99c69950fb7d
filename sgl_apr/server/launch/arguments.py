"""Makes SGLang's server arguments from the user's flags and the defaults of this package."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.errors import LaunchError
from sgl_apr.server.hooks import check_hooks_applied, has_accelerator
from sgl_apr.server.kv_join.cache_secret import require_shared_secret
from sgl_apr.server.kv_join.compatibility import attention_backends, incompatibility
from sgl_apr.server.launch.attention_backend import (
    AttentionChoice,
    ResolvedAttention,
    choose_attention,
    describe_backends,
    resolved_attention,
    without_side_effects,
)
from sgl_apr.server.launch.defaults import DEFAULT_POOL_TOKENS, default_flags, pool_tokens
from sgl_apr.server.launch.preflight import local_config
from sgl_apr.server.launch.usage import UsageError, UsageParser


@dataclass(frozen=True, slots=True)
class LaunchArguments:
    """The arguments that a server is started with.

    Attributes:
        args: SGLang's `ServerArgs`, resolved.
        attention: The attention backend, or those of prefill and decode, and why on a GPU.
    """

    args: Any
    attention: str


def server_args(argv: list[str]) -> Any:
    """Return SGLang's `ServerArgs`: those of `launch_arguments`."""
    return launch_arguments(argv).args


def launch_arguments(argv: list[str]) -> LaunchArguments:
    """Resolve the defaults of this package followed by the user's flags.

    Args:
        argv: The user's flags, without those of this package.

    Raises:
        UsageError: The flags are wrong, or ask for what is not supported.
        LaunchError: The plugin was not loaded, or SGLang would run on another platform.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sgl_apr.server import plugin

    if not plugin.activated:
        raise LaunchError(
            "SGLang did not load the plugin of sgl-apr: is it installed, and in SGLANG_PLUGINS?"
        )
    check_hooks_applied()
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import ServerArgs, prepare_server_args
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = UsageParser(prog="sgl-apr serve", add_help=False)
    ServerArgs.add_cli_args(parser)
    try:
        merged = ConfigArgumentMerger(parser).merge_config_with_args(argv) if "--config" in argv else argv
        parsed = parser.parse_args(merged)
    except (ValueError, OSError) as error:  # from the configuration file
        raise UsageError(str(error)) from error
    accelerator = has_accelerator()
    if not accelerator and type(current_platform).__name__ != "TorchCpuPlatform":
        raise LaunchError(f"SGLang runs on {current_platform!r} instead of the CPU platform of sgl-apr")
    config = _read_model_config(parsed.model_path, parsed.revision)
    tokens = DEFAULT_POOL_TOKENS if accelerator else _affordable_pool_tokens(config)
    flags = [*default_flags(accelerator=accelerator, max_tokens=tokens), *merged]
    attention = _choose_attention(flags, parsed) if accelerator else AttentionChoice()
    flags = [*flags, *attention.flags]
    args = prepare_server_args(flags)
    args.resolve_once()
    cache = parsed.radix_cache_backend
    if cache in (None, RADIX_CACHE_BACKEND) and (
        what := incompatibility(resolving_view(args), model_config_of(args))
    ):
        if cache:
            raise UsageError(f"--radix-cache-backend {cache} does not work with {what}")
        tried = f" ({'; '.join(attention.rejected)})" if attention.rejected else ""
        print(
            f"sgl-apr: branches are not joined in the KV cache: that does not work with {what}{tried}",
            file=sys.stderr,
        )
    elif cache is None:
        args = prepare_server_args([*flags, "--radix-cache-backend", RADIX_CACHE_BACKEND])
        args.resolve_once()
    view = resolving_view(args)
    if view.radix_cache_backend == RADIX_CACHE_BACKEND:
        require_shared_secret(view.nnodes)
    for flag, used in (
        ("--tokenizer-worker-num above 1", view.tokenizer_worker_num > 1),
        ("gRPC", view.grpc_mode or view.smg_grpc_mode or view.grpc_port is not None),
        ("--encoder-only", view.encoder_only),
        ("--use-ray", view.use_ray),
        ("SGLANG_RUST_SERVER", os.environ.get("SGLANG_RUST_SERVER", "0").lower() in {"1", "true"}),
    ):
        if used:
            raise UsageError(f"{flag} is not supported")
    backends = describe_backends(*attention_backends(view))
    return LaunchArguments(args, ", ".join(filter(None, (backends, attention.reason))))


def _choose_attention(flags: Sequence[str], parsed: Namespace) -> AttentionChoice:
    """Choose the attention backend on an NVIDIA GPU. What the user sets is not changed.

    Args:
        flags: All flags of the server.
        parsed: Those of the user.
    """
    from sglang.srt.runtime_context import get_platform
    from sglang.srt.server_args import prepare_server_args

    if not get_platform().is_cuda or parsed.device not in (None, "cuda"):
        return AttentionChoice()
    if parsed.attention_backend or parsed.prefill_attention_backend or parsed.decode_attention_backend:
        return AttentionChoice(reason="set by a flag")

    joins = parsed.radix_cache_backend in (None, RADIX_CACHE_BACKEND)

    def resolve(more_flags: Sequence[str]) -> ResolvedAttention:
        with without_side_effects():
            args = prepare_server_args([*flags, *more_flags])
            args.resolve_once()
            return resolved_attention(args, joins=joins)

    return choose_attention(resolve, page_size_is_set=parsed.page_size is not None)


def _read_model_config(model: str, revision: str | None) -> dict[str, Any]:
    """Return the config.json of a model, empty if it is not on this machine."""
    path = local_config(model, revision or "main")
    config: dict[str, Any] = {} if path is None else json.loads(path.read_text())
    return config


def _affordable_pool_tokens(config: Mapping[str, Any]) -> int:
    import psutil

    return pool_tokens(config, psutil.virtual_memory().available)
