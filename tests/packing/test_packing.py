"""Layouts and batches, checked against what they must say of each sequence."""

import pickle
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_rows

from fastdpo.packing import Group, PreferenceCollator, pack

ids = st.lists(st.integers(3, 96), max_size=6)
groups_strategy = st.lists(
    st.tuples(ids, st.lists(ids, min_size=1, max_size=4)).map(lambda pair: Group(*pair)), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(groups=groups_strategy, share=st.booleans())
def test_every_completion_sees_its_prompt_and_itself(groups, share):
    row = pack(groups, share=share)
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    layout = row.layout
    keys = list(range(len(tokens))) if layout.kv_index is None else layout.kv_index.tolist()
    cu_q, cu_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    assert cu_q[-1] == len(tokens) and cu_k[-1] == len(keys)
    assert list(layout.q_lengths) == [b - a for a, b in pairwise(cu_q)]
    assert list(layout.k_lengths) == [b - a for a, b in pairwise(cu_k)]

    # What each row attends to: the keys of its segment up to its own place, counted from the segment's end.
    seen = {}
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        for row_number in range(q0, q1):
            seen[row_number] = keys[k0 : k1 - (q1 - 1 - row_number)]
            assert seen[row_number][-1] == row_number

    found = {}
    for target_row, target, completion in zip(
        row.target_rows.tolist(), row.target_ids.tolist(), row.completion_ids.tolist(), strict=True
    ):
        context = [tokens[key] for key in seen[target_row]]
        assert [positions[key] for key in seen[target_row]] == list(range(len(context)))
        found.setdefault(completion, []).append((context, target))
    wanted, number = {}, 0
    for group in groups:
        for completion in group.completions:
            sequence = [*group.prompt, *completion]
            first = max(1, len(group.prompt))
            steps = [(sequence[:i], sequence[i]) for i in range(first, len(sequence))]
            if steps:
                wanted[number] = steps
            number += 1
    assert found == wanted
    unshared = sum(len(g.prompt) + len(c) for g in groups for c in g.completions)
    assert row.unshared_tokens == unshared
    if share:
        assert len(tokens) == sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)
    else:
        assert len(tokens) == unshared


@pytest.mark.parametrize("packing", ["prefix", "varlen", "padded"])
def test_batches_name_the_same_targets(packing):
    rows = random_rows(6, seed=1)
    batch = PreferenceCollator(packing=packing)(rows)
    assert batch.num_pairs == 6
    expected = [[*row["chosen_ids"], *row["rejected_ids"]] for row in rows]
    assert batch.target_ids.tolist() == [token for pair in expected for token in pair]
    assert batch.tokens_per_pair == tuple(len(pair) for pair in expected)
    sequence_ids = [
        i + offset
        for i, row in enumerate(rows)
        for side, offset in (("chosen_ids", 0), ("rejected_ids", 6))
        for _ in row[side]
    ]
    assert batch.sequence_ids.tolist() == sequence_ids
    prompts, answers = (sum(len(r["prompt_ids"]) for r in rows), sum(map(len, expected)))
    assert batch.unshared_tokens == 2 * prompts + answers
    if packing == "prefix":
        assert batch.num_tokens == prompts + answers
        assert batch.saved_tokens_fraction == pytest.approx(prompts / (2 * prompts + answers))
    if packing == "varlen":
        assert batch.saved_tokens_fraction == 0


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("packing", ["prefix", "varlen", "padded"])
def test_truncation(mode, packing):
    row = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8]}
    batch = PreferenceCollator(packing=packing, max_length=5, truncation_mode=mode)([row])
    by_sequence = {
        side: batch.target_ids[batch.sequence_ids == side].tolist() for side in (0, 1)
    }  # keep_start: 1 2 3 4 5 | 1 2 3 4 8; keep_end: 3 4 5 6 7 | 1 2 3 4 8
    assert by_sequence == {0: [5] if mode == "keep_start" else [5, 6, 7], 1: [8]}


def test_keep_end_that_cuts_into_the_prompt_differently_does_not_share_it():
    from tiny import naive_sequence_logps, tiny_model

    import fastdpo

    model = tiny_model(dtype=torch.float64)
    row = {"prompt_ids": [11, 12, 13, 14], "chosen_ids": [15, 16, 17], "rejected_ids": [18]}
    batch = PreferenceCollator(max_length=5, truncation_mode="keep_end")([row])
    ours = fastdpo.sequence_logps(model, batch)
    chosen = naive_sequence_logps(model, [{**row, "prompt_ids": [13, 14]}])[0]
    rejected = naive_sequence_logps(model, [row])[1]
    torch.testing.assert_close(ours, torch.stack([chosen, rejected]), rtol=1e-10, atol=1e-10)


def test_references_in_the_rows():
    rows = [
        {**row, "ref_chosen_logps": -1.0 - i, "ref_rejected_logps": -5.0 - i} for i, row in enumerate(random_rows(2))
    ]
    batch = PreferenceCollator()(rows)
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -5.0, -6.0]
    for row in rows:
        del row["ref_rejected_logps"]
    with pytest.raises(ValueError, match="not the other one"):
        PreferenceCollator()(rows)


def test_padding_to_a_multiple():
    batch = PreferenceCollator(packing="padded", pad_token_id=2, pad_to_multiple_of=16)(random_rows(3))
    assert batch.input_ids.shape[1] % 16 == 0
    assert (batch.input_ids[batch.attention_mask == 0] == 2).all()


def test_batches_go_through_a_data_loader_and_pickle():
    rows = random_rows(5)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=PreferenceCollator(), num_workers=1)
    batches = list(loader)
    assert [batch.num_pairs for batch in batches] == [2, 2, 1]
    direct = PreferenceCollator()(rows[:2])
    assert torch.equal(batches[0].input_ids, direct.input_ids)
    assert torch.equal(batches[0].to("cpu").layout.cu_seqlens_k, direct.layout.cu_seqlens_k)
    assert pickle.loads(pickle.dumps(direct)).tokens_per_pair == direct.tokens_per_pair
    assert direct.to("meta").layout.kv_index.device.type == "meta"
    with pytest.raises(AttributeError, match="no field 'labels'"):
        _ = direct.labels


def test_bad_input():
    with pytest.raises(ValueError, match="packing is 'flat'"):
        PreferenceCollator(packing="flat")
    with pytest.raises(ValueError, match="truncation_mode is 'middle'"):
        PreferenceCollator(truncation_mode="middle")
    with pytest.raises(ValueError, match="max_length is 1"):
        PreferenceCollator(max_length=1)
    with pytest.raises(ValueError, match="no row"):
        PreferenceCollator()([])
    with pytest.raises(ValueError, match="no rejected_ids"):
        PreferenceCollator()([{"prompt_ids": [1], "chosen_ids": [2]}])


def test_building_a_large_layout_is_quick():
    import time

    draw = random.Random(0)
    lengths = {"prompt_ids": 400, "chosen_ids": 300, "rejected_ids": 300}
    rows = [{name: [draw.randrange(100) for _ in range(n)] for name, n in lengths.items()} for _ in range(64)]
    collator, best = PreferenceCollator(), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        collator(rows)
        best = min(best, time.perf_counter() - began)
    assert best < 0.1, f"{best:.3f} s for 64 pairs of 1,000 tokens"
