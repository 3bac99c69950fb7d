"""Lets SGLang import the module of the served model's class, in place of all its 200 modules of models.

SGLang imports them all to find the class for the architecture in a model's config.json. It imports only what it has to
if `SGLANG_EXTERNAL_MODEL_PACKAGE` names a package that has the class. Such a package is `sgl_apr.server.model_package`.
SGLang still imports all modules as soon as it needs another class: for a draft model, for an architecture that is
unknown, or because the package could not be imported.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import MODEL_MODULE_ENV, ONE_MODEL_MODULE_ENV
from sgl_apr.server.hooks import is_enabled, require_sglang

EXTERNAL_PACKAGE_ENV = "SGLANG_EXTERNAL_MODEL_PACKAGE"
DISABLED_ENV = "SGLANG_DISABLED_MODEL_ARCHS"  # modules that the operator does not want
PACKAGE = "sgl_apr.server.model_package"
SGLANG_MODELS = "sglang.srt.models"

logger = logging.getLogger(__name__)


def import_only_served_model(args: Any) -> None:
    """Let the processes that SGLang starts from now on import one module of models, if it is clear which.

    Args:
        args: SGLang's `ServerArgs`.
    """
    if not is_enabled(ONE_MODEL_MODULE_ENV) or any(map(os.environ.get, (EXTERNAL_PACKAGE_ENV, DISABLED_ENV))):
        return
    try:
        model_config = require_sglang("sglang.srt.arg_groups.overrides:model_config_of")(args)
        require_sglang(f"sglang.srt.environ:envs.{EXTERNAL_PACKAGE_ENV}")
    except LaunchError as error:
        logger.warning("SGLang imports the classes of all models: %s", error)
        return
    architectures = getattr(model_config.hf_config, "architectures", None) or []
    module = model_module(architectures)
    if module is None or f"{SGLANG_MODELS}.registry" in sys.modules:
        logger.info("SGLang imports the classes of all models to find one of %s", list(architectures))
        return
    os.environ[EXTERNAL_PACKAGE_ENV] = PACKAGE
    os.environ[MODEL_MODULE_ENV] = module


def model_module(architectures: Sequence[str]) -> str | None:
    """Return the module of SGLang that defines the class of a model, without importing it.

    Args:
        architectures: As in the model's config.json. SGLang takes the first that it knows.

    Returns:
        The module, or None if none or several define the class of the first architecture.

    Examples:
        >>> model_module(["LlamaForCausalLM"])
        'sglang.srt.models.llama'
        >>> model_module(["MyOwnModel"]) is None
        True
    """
    if not architectures or not str(architectures[0]).isidentifier():
        return None
    name = str(architectures[0]).encode()
    definition = re.compile(rb"^class " + name + rb"\b", re.MULTILINE)

    def defines(source: bytes) -> bool:
        # The plain searches come first, because they are much faster.
        return b"class " + name in source and b"EntryClass" in source and bool(definition.search(source))

    files = (file for folder in _model_folders() for file in folder.glob("*.py"))
    modules = [file.stem for file in files if defines(file.read_bytes())]
    return f"{SGLANG_MODELS}.{modules[0]}" if len(modules) == 1 else None


def _model_folders() -> list[Path]:
    package, *rest = SGLANG_MODELS.split(".")
    spec = find_spec(package)  # of the parent alone, because that imports nothing
    return [Path(folder, *rest) for folder in (spec.submodule_search_locations or [])] if spec else []
