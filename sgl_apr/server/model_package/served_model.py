"""The classes of the module of SGLang that `MODEL_MODULE_ENV` names. SGLang reads `EntryClass`."""

from __future__ import annotations

import os
from importlib import import_module

from sgl_apr.server.constants import MODEL_MODULE_ENV

EntryClass = import_module(os.environ[MODEL_MODULE_ENV]).EntryClass
