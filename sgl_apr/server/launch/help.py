"""The help text of `sgl-apr serve`, and the flags of this package."""

from __future__ import annotations

import argparse

from sgl_apr.server.api.config import add_api_arguments
from sgl_apr.server.guard.limits import add_guard_arguments
from sgl_apr.server.launch.secret_options import SECRET_OPTIONS

HELP_WIDTH = 110  # columns
HEAD = """\
usage: sgl-apr serve --model MODEL [any flag of SGLang's server]

Serves a model with SGLang for adaptive parallel reasoning. MODEL is a directory or a Hugging Face id.

examples:
  sgl-apr serve --model $(sgl-apr model builtin)                # the small model of this package
  sgl-apr serve --model Qwen/Qwen3-8B --port 8000 --context-length 32768
  sgl-apr serve --model ./my-model --max-total-tokens 8192      # a directory of yours, a smaller KV cache

When the server is ready, it prints one line with its URL to standard output. Everything else goes to standard
error. Ctrl-C or SIGTERM stops it. The exit status is 0 after a stop, 130 after Ctrl-C while the server starts,
2 for wrong flags, and 1 for other errors.

Defaults, which your flags override:
  everywhere      --grammar-backend llguidance --schedule-policy lpm
                  --radix-cache-backend apr, which joins branches in the KV cache; where that does not work, one
                  line says why; --radix-cache-backend stock is SGLang's own
  with a GPU      SGLang's own attention backend; if the model cannot run on it, or branches cannot be joined with
                  it, the first of fa3, triton and flashinfer that can; the ready line says which and why
  without a GPU   --device cpu --attention-backend apr_cpu --dtype float32 --max-total-tokens 32768
                  --sampling-backend pytorch --sleep-on-idle, no CUDA graphs

Keys:
  --api-key-file FILE, --admin-api-key-file FILE, or the environment variables SGL_APR_API_KEY and
  SGL_APR_ADMIN_API_KEY. --api-key K and --admin-api-key K work, too, but other users of the machine can read K on
  the command line until the command has started. See docs/security.md.

"""
TAIL = """
All other flags are SGLang's: python -m sglang.launch_server --help lists them.
"""
SECTIONS = (
    (
        "Trajectories on the server (`apr` in an OpenAI body, /apr/generate)",
        "A request that sets a higher limit is refused. A request that sets none gets the server's.",
        add_api_arguments,
    ),
    ("Requests to any route", "A larger request is refused with a status above 400.", add_guard_arguments),
)


def help_text() -> str:
    """Return the help text of `sgl-apr serve`."""
    formatter = argparse.HelpFormatter("sgl-apr serve", max_help_position=32, width=HELP_WIDTH)
    for title, text, add_arguments in SECTIONS:
        parser = argparse.ArgumentParser(add_help=False)
        add_arguments(parser)
        formatter.start_section(title)
        formatter.add_text(text)
        formatter.add_arguments(parser._actions)
        formatter.end_section()
    return HEAD + formatter.format_help() + TAIL


def own_flags() -> list[str]:
    """Return the flags of `sgl-apr serve` that SGLang does not have."""
    parser = argparse.ArgumentParser(add_help=False)
    for _, _, add_arguments in SECTIONS:
        add_arguments(parser)
    return [*parser._option_string_actions, *(option.file_flag for option in SECRET_OPTIONS)]
