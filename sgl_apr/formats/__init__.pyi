from .branch_prompts import BranchPrompt as BranchPrompt
from .branch_prompts import register_branch_prompt as register_branch_prompt
from .conversion import convert as convert
from .dialects import Dialect as Dialect
from .dialects import dialect as dialect
from .dialects import dialect_names as dialect_names
from .dialects import register_dialect as register_dialect
from .grammar import Grammar as Grammar
from .lenient_parser import Defect as Defect
from .lenient_parser import Reading as Reading
from .lenient_parser import detect as detect
from .lenient_parser import read as read
from .masks.writer import MaskOptions as MaskOptions
from .presets import Preset as Preset
from .presets import dialect_for as dialect_for
from .presets import preset as preset

__all__ = [
    "BranchPrompt",
    "Defect",
    "Dialect",
    "Grammar",
    "MaskOptions",
    "Preset",
    "Reading",
    "convert",
    "detect",
    "dialect",
    "dialect_for",
    "dialect_names",
    "preset",
    "read",
    "register_branch_prompt",
    "register_dialect",
]
