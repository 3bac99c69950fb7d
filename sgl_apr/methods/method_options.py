"""The options of methods: those of `areason` that concern requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.option_checks import (
    JSON_OPTION_NAMES,
    TOOL_OPTION_NAMES,
    check_option_names,
    check_options,
)

# Options of `areason` that are about forks of the model. A method forks as it is defined.
FORK_OPTION_NAMES = (
    "dialect", "join", "mode", "min_blocks", "max_blocks", "min_width", "policy", "cap_width_by_load", "eager_branches", "scoring",
    "constrain",
    "forbid_angle_brackets", "branch_prompt_template",
)  # fmt: skip


METHOD_OPTION_NAMES = (
    *(name for name in JSON_OPTION_NAMES if name not in FORK_OPTION_NAMES), "request_fields", *TOOL_OPTION_NAMES,
)  # fmt: skip


def check_method_options(options: Mapping[str, Any]) -> None:
    """Check the options of a method that concern its requests.

    Raises:
        AprError: One has an unknown name, a wrong type, or a value that is not possible.
    """
    for name in options:
        if name in FORK_OPTION_NAMES:
            raise AprError(f"no option {name!r}: a method has a fixed structure")
    check_option_names(options, METHOD_OPTION_NAMES)
    check_options(options)
