"""Batches cut by tokens: no part above the budget but single pairs, the parts even, the pairs and targets as before."""

import random
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_rows, tiny_model

import fastdpo
from fastdpo.packing import MicroBatches, PreferenceCollator
from fastdpo.packing.microbatch import even_cuts, fewest, packed_cost, padded_cost

PACKINGS = ["prefix", "varlen", "padded"]


def rows_with_common_prompts(count, seed):
    draw = random.Random(seed)
    rows = random_rows(count, seed=seed, prompt=(3, 20), answer=(1, 15))
    for before, row in pairwise(rows):
        if draw.random() < 0.5:
            row["prompt_ids"] = before["prompt_ids"]
    return rows


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 12), seed=st.integers(0, 10**6), budget=st.integers(1, 300),
    packing=st.sampled_from(PACKINGS), multiple=st.sampled_from([None, 8]),
)  # fmt: skip
def test_parts_keep_to_the_budget(count, seed, budget, packing, multiple):
    rows = rows_with_common_prompts(count, seed)
    collator = PreferenceCollator(packing=packing, max_tokens_per_microbatch=budget, pad_to_multiple_of=multiple)
    whole = PreferenceCollator(packing=packing, pad_to_multiple_of=multiple)(rows)
    parts = collator(rows)
    assert isinstance(parts, MicroBatches) and parts.num_pairs == count
    assert all(part.num_tokens <= budget or part.num_pairs == 1 for part in parts)
    assert torch.cat([part.target_ids for part in parts]).tolist() == whole.target_ids.tolist()
    assert sum((part.tokens_per_pair for part in parts), ()) == whole.tokens_per_pair
    assert (len(parts) == 1) == (whole.num_tokens <= budget or count == 1)
    for wanted in range(1, count + 3):
        again = parts.into(wanted)
        assert len(again) == min(wanted, count) and again.passes == wanted
        assert torch.cat([part.target_ids for part in again]).tolist() == whole.target_ids.tolist()


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), count=st.integers(1, 8), padded=st.booleans())
def test_cuts_are_the_most_even_ones(sizes, count, padded):
    shared = [0, *(min(pair) // 2 for pair in pairwise(sizes))]
    cost = padded_cost(sizes, [2] * len(sizes), None) if padded else packed_cost(sizes, shared)
    count = min(count, len(sizes))
    cuts = even_cuts(len(sizes), count, cost)
    assert [first for first, _ in cuts] == [0, *(end for _, end in cuts[:-1])] and cuts[-1][1] == len(sizes)
    assert len(cuts) == count
    best = min(
        max(cost(a, b) for a, b in zip((0, *inner), (*inner, len(sizes)), strict=True))
        for inner in combinations(range(1, len(sizes)), count - 1)
    )
    # Where neighbours share tokens, cutting between them makes the second dearer, which filling up does not foresee.
    assert best <= max(cost(*cut) for cut in cuts) <= best + (0 if padded else max(shared))
    budget = max(sizes)
    needed = fewest(len(sizes), budget, cost)
    assert all(cost(*cut) <= max(budget, 2 * budget * padded) for cut in even_cuts(len(sizes), needed, cost))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("budget", [1, 40, 90, 10**6])
def test_the_gradient_is_that_of_the_whole_batch(packing, budget):
    model, rows = tiny_model(dtype=torch.float64), rows_with_common_prompts(7, seed=4)
    rows = [dict(row, ref_chosen_logps=-20.0 - i, ref_rejected_logps=-21.0) for i, row in enumerate(rows)]
    whole = fastdpo.batch_loss(model, PreferenceCollator(packing=packing)(rows), reduction="sum")
    expected = torch.autograd.grad(whole.loss, list(model.parameters()))
    parts = PreferenceCollator(packing=packing, max_tokens_per_microbatch=budget)(rows)
    outputs = [fastdpo.batch_loss(model, part, reduction="sum") for part in parts]
    torch.testing.assert_close(torch.cat([output.losses for output in outputs]), whole.losses)
    sums = [torch.autograd.grad(output.loss, list(model.parameters())) for output in outputs]
    for theirs, ours in zip(expected, zip(*sums, strict=True), strict=True):
        torch.testing.assert_close(sum(ours), theirs, rtol=1e-9, atol=1e-9)


def test_they_go_through_a_data_loader():
    rows = random_rows(6)
    collator = PreferenceCollator(max_tokens_per_microbatch=30)
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=collator, num_workers=1)
    batches = [batch.to("meta") for batch in loader]
    assert [batch.num_pairs for batch in batches] == [3, 3]
    assert all(part.input_ids.device.type == "meta" for batch in batches for part in batch)


def test_bad_input():
    with pytest.raises(ValueError, match="max_tokens_per_microbatch is 0"):
        PreferenceCollator(max_tokens_per_microbatch=0)
    with pytest.raises(ValueError, match="no row"):
        PreferenceCollator(max_tokens_per_microbatch=10)([])
