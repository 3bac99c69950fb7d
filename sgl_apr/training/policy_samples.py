"""What a policy gradient learns from: the decoded tokens of replies, each with its advantage, its old log-probability and its mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sgl_apr.training.mask_replay import MaskReplay, RecordedGrammars
from sgl_apr.training.training_tree import Floats, TrainingTree, build_training_tree, logprobs
from sgl_apr.training.trie import Ints
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class PolicySample:
    """One context of a reply.

    Attributes:
        tree: Its tokens, m of which were decoded.
        advantages: (m,).
        old_logprobs: (m,), the log-probabilities of the policy that decoded them.
        masks: (m,), numbers of the masks of a `MaskReplay`.
    """

    tree: TrainingTree
    advantages: Floats
    old_logprobs: Floats
    masks: Ints


def make_policy_samples(
    trajectory: Trajectory,
    advantages: Mapping[Path, float],
    replay: MaskReplay,
    grammars: RecordedGrammars,
) -> list[PolicySample]:
    """The contexts of a reply in which any token has an advantage.

    Tokens whose log-probability the server did not report, those of aborted branches, have none.

    Args:
        trajectory: The reply, sampled with `logprobs=True`.
        advantages: The advantage of what each sequence decoded, by its path. Those that are missing have none.
        replay: Replays the masks.
        grammars: The grammars of its calls.

    Raises:
        AprError: If the reply has no log-probabilities, or a mask cannot be replayed.
    """
    complete = build_training_tree([trajectory], eos=replay.eos, separate_contexts=True)
    old = logprobs(complete, [trajectory])
    paths = [trajectory.spans[span].path for span in complete.spans]
    weights = np.asarray([advantages.get(path, 0.0) for path in paths], dtype=np.float32)
    weights[np.isnan(old)] = 0.0
    if not weights.any():
        return []
    masks = replay.replay(complete, trajectory, grammars)
    samples, begin = list[PolicySample](), 0
    for tree in complete.split():
        own = (complete.sources >= begin) & (complete.sources < begin + tree.tokens)
        begin += tree.tokens
        if weights[own].any():
            samples.append(PolicySample(tree, weights[own], np.nan_to_num(old[own]), masks[own]))
    return samples
