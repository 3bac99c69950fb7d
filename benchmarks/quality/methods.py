"""Every method on the same 50 Countdown problems with 2,048 tokens for each and the built-in model.

python -m benchmarks.quality.methods [--json] [any other option of sgl-apr eval]
"""

from __future__ import annotations

import sys

from sgl_apr.cli.main import main

ARGUMENTS = ["eval", "countdown", "--methods", "all", "--model", "builtin", "--limit", "50", "--budget", "tokens=2048"]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main([*ARGUMENTS, *sys.argv[1:]]))
