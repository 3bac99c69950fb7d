"""Every method on the same ten Countdown problems with one budget and the model builtin:spawn.

python -m benchmarks.quality.methods [--json] [any other option of sgl-apr eval]
"""

from __future__ import annotations

import sys

from sgl_apr.cli.main import main

ARGUMENTS = ["eval", "countdown", "--methods", "all", "--model", "builtin:spawn", "--limit", "10", "--budget", "tokens=1024"]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main([*ARGUMENTS, *sys.argv[1:]]))
