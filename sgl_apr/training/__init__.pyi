from . import advantages as advantages
from . import models as models
from . import rewards as rewards
from .attention_mask import Visibility as Visibility
from .collate import Collator as Collator
from .config import SftConfig as SftConfig
from .grpo_config import GrpoConfig as GrpoConfig
from .training_rows import TrainingRow as TrainingRow
from .training_rows import build_training_rows as build_training_rows
from .training_tree import TrainingTree as TrainingTree
from .training_tree import build_training_tree as build_training_tree
from .training_tree import logprobs as logprobs
from .trie import FlatTree as FlatTree
from .trie import Trie as Trie
from .trl import TrlRollouts as TrlRollouts
from .trl import for_trl as for_trl
from .verl import for_verl as for_verl

__all__ = [
    "Collator",
    "FlatTree",
    "GrpoConfig",
    "SftConfig",
    "TrainingRow",
    "TrainingTree",
    "Trie",
    "TrlRollouts",
    "Visibility",
    "advantages",
    "build_training_rows",
    "build_training_tree",
    "for_trl",
    "for_verl",
    "logprobs",
    "models",
    "rewards",
]
