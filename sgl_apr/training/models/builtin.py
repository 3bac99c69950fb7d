"""The models that ship with this package: small, trained on Countdown, and they decide for themselves when to fork."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sgl_apr.errors import AprError

BUILTIN_NAME = "builtin"
# The first knows seven formats. The second knows one, whose branches are messages, and is that of docs/countdown.md.
DIRECTORIES = {BUILTIN_NAME: "countdown", "builtin:spawn": "countdown-spawn"}
SMOLLM2_NAME = "smollm2"
MODEL_FLAGS = ("--model", "--model-path")


def builtin_path(name: str = BUILTIN_NAME) -> Path:
    """The directory of a checkpoint.

    Args:
        name: `builtin` or `builtin:spawn`.

    Raises:
        AprError: There is no such model.
    """
    if name not in DIRECTORIES:
        raise AprError(f"there is no model {name!r} in this package, expected {' or '.join(DIRECTORIES)}")
    return Path(__file__).parent / DIRECTORIES[name]


def locate_model(model: str) -> str:
    """Resolve a model as the command line names it: a name that `sgl-apr model` knows, or anything that SGLang can load.

    `smollm2:threadweaver` is SmolLM2 with the tags of that dialect, `smollm2:trained` what `sgl-apr model smollm2 --trained`
    prints, and `smollm2:ledger` one that is trained to read long texts in parts (docs/methods.md).

    Raises:
        AprError: The model is `smollm2`, and the package that holds it is not installed, or it has not been trained; or no model
            `builtin:...` has that name.
    """
    family = model.partition(":")[0]
    if family == SMOLLM2_NAME:
        from sgl_apr.training.models.pretrained import locate_smollm2

        return str(locate_smollm2(model))
    return str(builtin_path(model)) if family == BUILTIN_NAME else model


def locate_models(argv: Sequence[str]) -> list[str]:
    """Resolve the model of a command line of `sgl-apr serve`, as `locate_model` does.

    Examples:
        >>> locate_models(["--model", "org/name", "--port", "30000"])
        ['--model', 'org/name', '--port', '30000']
    """
    resolved = list(argv)
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag not in MODEL_FLAGS:
            continue
        if equals:
            resolved[index] = f"{flag}={locate_model(value)}"
        elif index + 1 < len(argv):
            resolved[index + 1] = locate_model(argv[index + 1])
    return resolved
