"""What a benchmark ran on, for its JSON."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    """The processor and its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count() or 0}


def versions(*packages: str) -> dict[str, str]:
    """Of Python and some packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
