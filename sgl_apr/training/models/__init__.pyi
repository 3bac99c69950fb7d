from .builtin import builtin_path as builtin_path
from .builtin import locate_model as locate_model
from .description import Description as Description
from .description import describe as describe
from .pretrained import smollm2 as smollm2
from .pretrained import trained_smollm2 as trained_smollm2
from .tiny import random_llama as random_llama

__all__ = [
    "Description",
    "builtin_path",
    "describe",
    "locate_model",
    "random_llama",
    "smollm2",
    "trained_smollm2",
]
