"""What a packed row says of each sequence, against what it must say."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from counting import calls, memory
from drawing import draws
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.packing import pack
from fastdpo.packing.tree import KEYS_PER_TOKEN, build_tree

# Few different tokens, so that beginnings coincide at every depth.
ids = st.lists(st.integers(3, 5), max_size=6)
sequences_strategy = st.lists(st.tuples(ids, ids), min_size=1, max_size=9)


def seen_by_segments(layout):
    """row -> the rows it attends to, as variable-length attention reads the layout."""
    num_rows = int(layout.cu_seqlens_q[-1])
    keys = list(range(num_rows)) if layout.kv_index is None else layout.kv_index.tolist()
    cu_q, cu_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    assert cu_k[-1] == len(keys)
    assert list(layout.q_lengths) == [b - a for a, b in pairwise(cu_q)]
    assert list(layout.k_lengths) == [b - a for a, b in pairwise(cu_k)]
    assert layout.max_seqlen_q == max(layout.q_lengths, default=0)
    assert layout.max_seqlen_k == max(layout.k_lengths, default=0)
    seen = {}
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        for row in range(q0, q1):
            seen[row] = keys[k0 : k1 - (q1 - 1 - row)]
    return seen


def seen_by_intervals(layout):
    ends = layout.subtree_end.tolist()
    return {i: [j for j in range(i + 1) if i < ends[j]] for i in range(len(ends))}


@draws(400)
@given(sequences=sequences_strategy, share=st.booleans())
def test_every_sequence_sees_itself_and_nothing_else(sequences, share):
    row = pack(sequences, share=share)
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    layout = row.layout
    assert layout.positions.tolist() == positions
    seen = seen_by_segments(layout)
    assert seen == seen_by_intervals(layout)
    for own, rows in seen.items():
        assert rows[-1] == own
        assert [positions[key] for key in rows] == list(range(len(rows)))

    found = {}
    for target_row, target, number in zip(
        row.target_rows.tolist(), row.target_ids.tolist(), row.sequence_numbers.tolist(), strict=True
    ):
        found.setdefault(number, []).append(([tokens[key] for key in seen[target_row]], target))
    wanted = {}
    for number, (prompt, completion) in enumerate(sequences):
        whole = [*prompt, *completion]
        steps = [(whole[:i], whole[i]) for i in range(max(1, len(prompt)), len(whole))]
        if steps:
            wanted[number] = steps
    assert found == wanted
    assert row.sequence_numbers.tolist() == sorted(row.sequence_numbers.tolist())
    assert row.target_counts == tuple(len(wanted.get(number, ())) for number in range(len(sequences)))
    unshared = sum(len(prompt) + len(completion) for prompt, completion in sequences)
    assert row.unshared_tokens == unshared
    assert len(tokens) == unshared if not share else len(tokens) <= unshared

    if layout.kv_index is None:
        assert layout.kv_copies is None and layout.kv_offsets is None
    else:
        order = torch.argsort(layout.kv_index, stable=True)
        assert torch.equal(layout.kv_copies, order)
        counts = torch.bincount(layout.kv_index, minlength=len(tokens))
        assert torch.equal(layout.kv_offsets, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))


@draws(300)
@given(sequences=st.lists(ids, min_size=1, max_size=12), worth=st.sampled_from([0, 1, 3, 10**6]))
def test_what_is_shared_is_what_pays(sequences, worth):
    """With every beginning worth its price, no two siblings begin with the same token; with none, only equals share."""
    import fastdpo.packing.tree as module

    arrays = [np.array(sequence, dtype=np.int64) for sequence in sequences]
    before, module.KEYS_PER_TOKEN = module.KEYS_PER_TOKEN, worth
    try:
        tree = build_tree(arrays, True)
    finally:
        module.KEYS_PER_TOKEN = before
    children = {}
    for path in tree.paths:
        for parent, child in pairwise([-1, *path]):
            children.setdefault(parent, set()).add(child)
    first_tokens = {
        parent: [sequences[tree.nodes[child].sequence][tree.nodes[child].begin] for child in below]
        for parent, below in children.items()
    }
    everything = {tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)}
    maximal = [s for s in everything if not any(s == other[: len(s)] for other in everything - {s})]
    unshared = sum(map(len, maximal))  # a sequence that another begins with lies within it
    pays = (unshared - len(everything)) * worth >= unshared
    assert sum(node.length for node in tree.nodes) == (len(everything) if pays else unshared)
    if pays:
        assert all(len(set(tokens)) == len(tokens) for tokens in first_tokens.values())
    else:
        assert all(len(below) == 1 for parent, below in children.items() if parent != -1)


def test_the_price_of_sharing():
    def rows(prompt, answers):
        return pack([([7] * prompt, [8 + i] * answers) for i in range(2)]).input_ids.shape[1]

    assert rows(100, 50) == 200  # the prompt once
    assert rows(2, 100) == 204  # two tokens saved, 204 keys gathered
    n = 10
    assert n * KEYS_PER_TOKEN == 2 * (n + 150)  # the border, still shared
    assert rows(n, 150) == n + 300 and rows(n, 151) == 2 * n + 302


def conversation(turns, tokens=15):
    """A pair at each turn, whose prompt is all that was said before it."""
    said, pairs = [], []
    for turn in range(turns):
        said = [*said, *(1000 * turn + i for i in range(tokens))]
        chosen = [1000 * turn + 500 + i for i in range(tokens)]
        pairs += [(said, chosen), (said, [7, *chosen])]
        said = [*said, *chosen]
    return pairs


@pytest.mark.parametrize("turns", [2, 12, 24])
def test_turns_of_a_conversation_stand_once(turns):
    """Prompts that lie within one another: every token once, however deep; the keys are gathered for all anyway."""
    pairs = conversation(turns)
    distinct = {tuple([*prompt, *answer][:n]) for prompt, answer in pairs for n in range(1, len(prompt + answer) + 1)}
    row = pack(pairs)
    assert row.input_ids.shape[1] == len(distinct) == turns * (15 + 15 + 16)


def test_several_depths():
    """A system prompt, two questions behind it, answers that begin alike."""
    system, one, two = [3] * 20, [4] * 9, [5] * 7
    answers = [[6] * 8 + [7], [6] * 8 + [8, 9], [9] * 3, [6] * 8]
    sequences = [([*system, *question], answer) for question in (one, two) for answer in answers]
    row = pack(sequences)
    assert row.input_ids.shape[1] == 20 + sum(len(question) + 8 + 1 + 2 + 3 for question in (one, two))
    assert len(row.layout.q_lengths) == 6  # the answers that end inside another need no segment of their own
    assert row.layout.q_lengths[0] == 20 + 9 + 8 + 1
    assert row.layout.k_lengths[:3] == (38, 39, 32)


@pytest.mark.slow
def test_deep_trees_need_no_recursion():
    sequences = [([3] * n, [4]) for n in range(1, 1500)]
    row = pack(sequences)
    assert row.target_counts == (1,) * 1499
    assert pack([([], [3] * n) for n in range(1, 1500)]).input_ids.shape[1] == 1499


@pytest.mark.parametrize("share", [False, True])
def test_nothing_to_run(share):
    row = pack([([], []), ([], [])], share=share)
    assert row.input_ids.shape == (1, 0) and row.target_counts == (0, 0)
    assert row.layout.cu_seqlens_q.tolist() == [0]


def test_order_is_that_of_the_sequences():
    row = pack([([9], [9]), ([3], [3]), ([5], [5])])
    assert row.input_ids.tolist() == [[9, 9, 3, 3, 5, 5]]


def test_building_a_layout_takes_no_step_of_python_for_each_token():
    draw = random.Random(0)

    def pairs_of(length):
        made = []
        for _ in range(64):
            prompt, chosen, rejected = (
                np.array([draw.randrange(50000) for _ in range(part)]) for part in (4 * length, 3 * length, 3 * length)
            )
            made += [(prompt, chosen), (prompt, rejected)]
        return made

    short, long = pairs_of(10), pairs_of(100)
    pack(short)
    few, many = calls(lambda: pack(short)), calls(lambda: pack(long))
    assert many <= few + 10  # ten times as many tokens
    assert many < 100 * len(long)
    with memory() as used:
        row = pack(long)
    own = sum(value.nbytes for value in (row.input_ids, row.position_ids, row.target_rows, row.target_ids))
    layout = row.layout
    own += sum(value.nbytes for value in (layout.kv_index, layout.kv_copies, layout.kv_offsets, layout.subtree_end))
    assert used.peak < 3 * own
