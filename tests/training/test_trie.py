"""The prefix tree against brute force on small random trees: visibility, positions, and order."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.trie import ROOT, Cursor, Trie


def grown(rng: random.Random, joins: bool) -> tuple[Trie, dict[int, frozenset[int]], dict[int, int]]:
    """A random tree, with the visible nodes and the position of every node by brute force."""
    trie, sees, at = Trie(), dict[int, frozenset[int]](), dict[int, int]()
    places: list[tuple[Cursor, frozenset[int], int]] = [(ROOT, frozenset(), -1)]
    while len(places) < 14:
        cursor, seen, last = rng.choice(places)
        if joins and rng.random() < 0.3 and cursor.node >= 0 and not cursor.ends:
            ends = []
            for _ in range(rng.randint(1, 3)):
                end = put(trie, rng, cursor, seen, last, sees, at)
                if rng.random() < 0.3:  # a join in a branch
                    inner = [put(trie, rng, *end, sees, at) for _ in range(2)]
                    end = joined(trie, end[0], inner)
                    end = put(trie, rng, *end, sees, at)
                ends.append(end)
            behind = joined(trie, cursor, ends)
            places.append(put(trie, rng, *behind, sees, at))
        else:
            places.append(put(trie, rng, cursor, seen, last, sees, at))
    return trie, sees, at


def put(trie, rng, cursor, seen, last, sees, at):
    ids = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
    cursor, nodes = trie.insert(cursor, ids)
    for node in nodes.tolist():
        seen, last = seen | {node}, last + 1
        assert sees.setdefault(node, seen) == seen
        assert at.setdefault(node, last) == last
    return cursor, seen, last


def joined(trie, fork, ends):
    return (
        trie.join(fork, [e[0] for e in ends]),
        frozenset().union(*(e[1] for e in ends)),
        max(e[2] for e in ends),
    )


@pytest.mark.parametrize("joins", [False, True])
def test_visibility_and_positions_match_brute_force(joins: bool):
    most = 0
    for seed in range(300):
        trie, sees, at = grown(random.Random(seed), joins)
        (flat, index), n = trie.flatten(), len(trie)
        assert sorted(index.tolist()) == list(range(n)) == sorted(sees)
        expected = np.zeros((n, n), dtype=bool)
        for node, seen in sees.items():
            expected[index[node], index[sorted(seen)]] = True
        assert (Visibility.from_trees([flat]).dense_mask()[0, 0].numpy() == expected).all()
        assert [int(flat.positions[index[node]]) for node in range(n)] == [at[node] for node in range(n)]
        most = max(most, len(flat.joined))
    assert bool(most) == joins


def test_equal_prefixes_share_nodes():
    trie = Trie()
    long = list(range(50))
    _, first = trie.insert(ROOT, long)
    cursor, _ = trie.insert(ROOT, long[:20])
    _, again = trie.insert(cursor, long[20:])
    assert again.tolist() == first[20:].tolist()
    assert len(trie) == 50
    trie.insert(cursor, [99])
    assert len(trie) == 51


def test_parents_predict_their_tokens():
    trie = Trie()
    cursor, _ = trie.insert(ROOT, [1, 2])
    ends = [trie.insert(cursor, [3])[0], trie.insert(cursor, [4, 5])[0]]
    trie.insert(trie.join(cursor, ends), [6, 7])
    flat, _ = trie.flatten()
    assert flat.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert flat.positions.tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert flat.parents.tolist() == [-1, 0, 1, 1, 3, -1, 5]


def test_rows_do_not_see_one_another():
    rng = random.Random(5)
    flats = [grown(rng, True)[0].flatten()[0] for _ in range(3)]
    row = flats[0].concatenate([flats[1].shifted(len(flats[0].ends))])
    dense = Visibility.from_trees([row, flats[2]]).dense_mask()[:, 0].numpy()
    size = len(flats[0].ends)
    assert not dense[0, size:, :size].any()
    for k, flat in enumerate(flats):
        begin = size if k == 1 else 0
        here = slice(begin, begin + len(flat.ends))
        alone = Visibility.from_trees([flat]).dense_mask()[0, 0].numpy()
        assert (dense[k // 2, here, here] == alone).all()


@pytest.mark.parametrize("joins", [False, True])
def test_block_masks_match_those_of_flex_attention(joins: bool):
    """The same blocks are visited with the same function; a full block may count as partial."""
    full = 0
    for seed in range(40):
        rng = random.Random(seed)
        sight = Visibility.from_trees([grown(rng, joins)[0].flatten()[0] for _ in range(2)])
        found, size = sight.block_mask(8), sight.ends.shape[1]
        counted = create_block_mask(sight.mask_mod, 2, None, size, size, device="cpu", BLOCK_SIZE=8)
        assert torch.equal(found.to_dense(), counted.to_dense())
        mine, theirs = (_full(mask) for mask in (found, counted))
        assert not (mine & ~theirs).any()
        full += int(mine.sum())
    assert full


def _full(mask) -> torch.Tensor:
    """(rows, queries, keys) of the blocks that are full."""
    numbers, which = mask.full_kv_num_blocks[:, 0], mask.full_kv_indices[:, 0].long()
    chosen = torch.arange(which.shape[-1]) < numbers.unsqueeze(-1)
    return torch.zeros(which.shape, dtype=torch.bool).scatter(-1, which, chosen)
