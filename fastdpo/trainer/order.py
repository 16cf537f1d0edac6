"""The order in which a run takes its rows, where it is not transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from fastdpo.trainer.dataset import TokenCounts
from fastdpo.trainer.sampling import BalancedSampler, LengthGroupedSampler, PromptGroupedSampler, prompt_groups

BALANCED = "batch_rebalance"


def pair_sampler(dataset: Dataset, args: Any, packing: str, batch_size: int, processes: int) -> Any:
    """The sampler for `args` (a DPOConfig).

    packing     decides what a row costs
    batch_size  pairs of a device batch, of which each of so many processes takes one in turn
    """
    counts = TokenCounts.of(dataset).cut(args.max_length)
    costs = {
        "prefix": counts.prompt + counts.answer_total,
        "varlen": counts.counts * counts.prompt + counts.answer_total,
        "padded": counts.counts * counts.longest,
    }[packing]
    seed = args.seed if args.data_seed is None else args.data_seed
    accumulation = args.gradient_accumulation_steps
    base: Any
    groups = None
    if args.train_sampling_strategy == "group_by_length":
        base = LengthGroupedSampler(costs, batch_size * processes * accumulation, seed=seed)
    elif args.train_sampling_strategy == "group_by_prompt":
        groups = prompt_groups(_prompts(dataset))
        base = PromptGroupedSampler(groups, seed=seed)
    elif args.train_sampling_strategy == "sequential":
        base = range(len(dataset))
    else:  # each row a group of its own: any order
        base = PromptGroupedSampler(np.arange(len(dataset)), seed=seed)
    if args.max_tokens_per_microbatch is None and args.train_sampling_strategy != BALANCED:
        return base
    return BalancedSampler(
        base, costs, batch_size=batch_size, processes=processes, accumulation=accumulation, groups=groups
    )


def _prompts(dataset: Dataset) -> Any:
    for table in dataset.select_columns(["prompt_ids"]).with_format("arrow").iter(batch_size=10_000):
        column = table["prompt_ids"].combine_chunks()
        ids, ends = column.flatten().to_numpy(zero_copy_only=False), np.cumsum(column.value_lengths().to_numpy())
        yield from np.split(ids, ends[:-1])
