"""Batches cut by tokens: no part above the budget but single pairs, the parts even, the pairs and targets as before."""

import random
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from drawing import draws
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_rows, tiny_model

import fastdpo
from fastdpo.packing import MicroBatches, PreferenceCollator
from fastdpo.packing.microbatch import even_cuts, fewest_cuts, packed_cost, padded_cost

PACKINGS = ["prefix", "varlen", "padded"]


def rows_with_common_prompts(count, seed):
    draw = random.Random(seed)
    rows = random_rows(count, seed=seed, prompt=(3, 20), answer=(1, 15))
    for before, row in pairwise(rows):
        if draw.random() < 0.5:
            row["prompt_ids"] = before["prompt_ids"]
    return rows


@draws(150)
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


@draws(150)
@given(
    count=st.integers(1, 7), seed=st.integers(0, 10**6), packing=st.sampled_from(PACKINGS),
    kind=st.sampled_from(["pairs", "lists", "answers"]), long=st.booleans(),
)  # fmt: skip
def test_the_cost_is_that_of_the_row_that_is_built(count, seed, packing, kind, long):
    """Of every run of rows: also where sharing barely pays, or pays for a run and not for a longer or shorter one."""
    rows = rows_of(kind, count, seed, long)
    collator = PreferenceCollator(packing=packing, mismatched=False, pad_to_multiple_of=[None, 8][seed % 2])
    cost = collator._cost(collator._grouping(rows))
    for first in range(count):
        for end in range(first + 1, count + 1):
            assert cost.tokens(first, end) == collator(rows[first:end]).num_tokens
            assert cost.fewest(first, end) <= cost.tokens(first, end)
            assert end == count or cost.fewest(first, end) <= cost.fewest(first, end + 1)


@draws(30)
@given(count=st.integers(2, 7), seed=st.integers(0, 10**6), packing=st.sampled_from(PACKINGS))
def test_mismatched_completions_count(count, seed, packing):
    rows = rows_of("answers", count, seed, long=False)
    whole = PreferenceCollator(packing=packing)(rows).num_tokens
    fits = PreferenceCollator(packing=packing, max_tokens_per_microbatch=whole)(rows)
    assert len(fits) == 1 and fits.parts[0].num_tokens == whole
    with pytest.raises(ValueError, match="cannot be cut into micro-batches"):
        PreferenceCollator(packing=packing, max_tokens_per_microbatch=whole - 1)(rows)


def rows_of(kind, count, seed, long):
    """Rows of a kind; `long`: with completions so much longer than the prompts that sharing those barely pays."""
    draw = random.Random(seed)
    lengths = {"prompt": (1, 12), "answer": (60, 130)} if long else {"prompt": (1, 20), "answer": (1, 15)}
    pairs = random_rows(count, seed=seed, **lengths)
    for before, row in pairwise(pairs):
        if draw.random() < 0.5:
            row["prompt_ids"] = before["prompt_ids"] + [5] * draw.randint(0, 3)
    if kind == "lists":
        return [
            {"prompt_ids": row["prompt_ids"], "completions_ids": [row["chosen_ids"], row["rejected_ids"], [7, 8]]}
            for row in pairs
        ]
    if kind == "answers":
        return [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": draw.random() < 0.5}
            for row in pairs
        ]
    return pairs


def test_a_longer_run_may_fit_where_a_shorter_one_does_not():
    """Nothing is shared among the first two rows, since it would not pay; with the third it does, and saves tokens."""
    prompt = list(range(100, 108))
    rows = [
        {"prompt_ids": prompt, "chosen_ids": [10 + i, *[50 + i] * 59], "rejected_ids": [20 + i, *[60 + i] * 59]}
        for i in range(2)
    ]
    rows.append({"prompt_ids": prompt, "chosen_ids": [30], "rejected_ids": [31]})
    # A second prompt is there to make it dearer: 4 sequences of 68 tokens and one of 500.
    rows[0] = {"prompt_ids": prompt, "chosen_ids": rows[0]["chosen_ids"], "rejected_ids": [9] * 560}
    collator = PreferenceCollator()
    whole, two = collator(rows).num_tokens, collator(rows[:2]).num_tokens
    assert whole < two
    assert len(PreferenceCollator(max_tokens_per_microbatch=whole)(rows)) == 1


@draws(200)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), count=st.integers(1, 8), padded=st.booleans())
def test_cuts_are_the_most_even_ones(sizes, count, padded):
    rows = [[np.full(size, number)] for number, size in enumerate(sizes)]
    cost = padded_cost(sizes, [2] * len(sizes), None) if padded else packed_cost(rows, share=True)
    count = min(count, len(sizes))
    cuts = even_cuts(len(sizes), count, cost)
    assert [first for first, _ in cuts] == [0, *(end for _, end in cuts[:-1])] and cuts[-1][1] == len(sizes)
    assert len(cuts) == count
    best = min(
        max(cost.tokens(a, b) for a, b in zip((0, *inner), (*inner, len(sizes)), strict=True))
        for inner in combinations(range(1, len(sizes)), count - 1)
    )
    assert max(cost.tokens(*cut) for cut in cuts) == best
    budget = max(sizes) * (1 + padded)
    kept = fewest_cuts(len(sizes), budget, cost)
    assert all(cost.tokens(*cut) <= budget for cut in kept)
    for more in range(len(kept), len(sizes) + 1):
        assert all(cost.tokens(*cut) <= budget for cut in even_cuts(len(sizes), more, cost, budget))


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
