"""Batches: their targets, truncation, loaders, bad input. Layouts: test_layout.py."""

import pickle

import pytest
import torch
from tiny import random_rows

from fastdpo.packing import PreferenceCollator


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
