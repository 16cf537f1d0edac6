"""Ranked lists of completions of one prompt."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastdpo.groups.base import GroupInputs, Groups
from fastdpo.groups.checks import check_vector, reference
from fastdpo.losses import ListTerms, WeightedLosses
from fastdpo.types import LossOutput, TokenMetrics


class Lists(Groups):
    """The completions of prompt 0, best first, then those of prompt 1, and so on."""

    what = "lists"

    def __init__(self, losses: WeightedLosses, inputs: GroupInputs, lengths: Tensor | None, like: Tensor) -> None:
        """`lengths` (S,) or None; `like`: an (S,) tensor of the log-probs' dtype and device."""
        self.losses, self.dtype = losses, like.dtype
        self.sizes = list_sizes(inputs.list_sizes, like.shape[0])
        self.count, self.starts = len(self.sizes), [0, *accumulate(self.sizes)]
        self.weights = check_vector("pair_weights", inputs.pair_weights, self.count, like, "lists")
        self.divergence, self.grad_dtype = losses.divergence, inputs.grad_dtype
        places = torch.arange(max(self.sizes), device=like.device)
        sizes = on_device(self.sizes, like.device)
        self.first = sizes.cumsum(0) - sizes  # (B,) the slot of each list's best
        self.valid = places < sizes.unsqueeze(1)  # (B, K)
        self.slots = torch.where(self.valid, self.first.unsqueeze(1) + places, self.first.unsqueeze(1))
        self.refs = self._padded(0, self.count, reference(inputs.ref_logps, losses, like))
        self.lengths = None if lengths is None else self._padded(0, self.count, lengths.to(like.dtype))

    @property
    def slots_per_group(self) -> tuple[int, ...]:
        return self.sizes

    def _padded(self, first: int, end: int, values: Tensor) -> Tensor:
        """(slots,) of the lists [first, end) -> (lists, K), 0 behind the last completion."""
        return torch.where(self.valid[first:end], values[self.slots[first:end] - self.starts[first]], 0.0)

    def group_ids(self, sequence_ids: Tensor) -> Tensor:
        return torch.searchsorted(self.first, sequence_ids, right=True) - 1

    def rejected(self) -> Tensor:
        return torch.ones(self.starts[-1], dtype=torch.bool, device=self.first.device).index_fill_(0, self.first, False)

    def _terms(self, first: int, end: int, sums: Tensor) -> ListTerms:
        part = slice(first, end)
        lengths = None if self.lengths is None else self.lengths[part]
        return ListTerms(self._padded(first, end, sums), self.refs[part], self.valid[part], lengths, self.divergence)

    def __call__(self, first: int, end: int, sums: Tensor, sums_p2: Tensor | None = None) -> Tensor:
        return self.weighted(self.losses(self._terms(first, end, self.bounded(sums.to(self.dtype)))), first, end)

    def output(self, losses: Tensor, loss: Tensor, sums: Tensor, tokens: TokenMetrics | None) -> LossOutput:
        """Chosen is the best of each list, rejected the mean over the others."""
        terms = self._terms(0, self.count, sums.detach().to(self.dtype))
        rewards = torch.where(terms.valid, self.losses.beta * terms.scores, 0.0)
        others = terms.valid.sum(1) - 1
        better = torch.ones(rewards.shape[1], rewards.shape[1], dtype=torch.bool, device=sums.device).triu(1)
        compared = terms.valid.unsqueeze(1) & better  # (lists, better, worse)
        right = (rewards.unsqueeze(2) > rewards.unsqueeze(1)) & compared
        return LossOutput(
            loss, losses, terms.logps[:, 0], terms.logps[:, 1:].sum(1) / others, rewards[:, 0],
            rewards[:, 1:].sum(1) / others, tokens=tokens,
            accuracies=right.sum((1, 2)).to(rewards.dtype) / compared.sum((1, 2)),
        )  # fmt: skip


def list_sizes(sizes: int | Sequence[int] | None, num_sequences: int) -> tuple[int, ...]:
    """Completions of each prompt, as host integers.

    Raises:
        ValueError: they do not add up, or a list has fewer than two.
    """
    assert sizes is not None
    if isinstance(sizes, numbers.Integral):
        sizes = int(sizes)
        if sizes < 1 or num_sequences % sizes:
            raise ValueError(f"list_sizes is {sizes}, and {num_sequences} sequences are no multiple of it.")
        sizes = (sizes,) * (num_sequences // sizes)
    if not isinstance(sizes, Sequence) or not all(isinstance(size, numbers.Integral) for size in sizes):
        raise ValueError(f"list_sizes is {sizes!r}; it must be a whole number, or a list of them, on the host.")
    sizes = tuple(map(int, sizes))
    if sum(sizes) != num_sequences:
        raise ValueError(f"list_sizes add up to {sum(sizes)}, and there are {num_sequences} sequences.")
    if sizes and min(sizes) < 2:
        raise ValueError(
            f"list_sizes has {min(sizes)} (list {sizes.index(min(sizes))}); a ranking needs at least two completions."
        )
    if not sizes:
        raise ValueError("the batch holds no list (B = 0); leave empty batches out.")
    return sizes


def best_first(ranks: Tensor, sizes: int | Sequence[int] | None) -> Tensor:
    """(S,) the order of the completions, list by list, each from its best to its worst; a wait for the device.

    Raises:
        ValueError: two ranks of a list are alike.
    """
    if sizes is None:
        raise ValueError("list_sizes is missing: it says how many of the completions belong to each prompt.")
    order: list[int] = []
    start, values = 0, ranks.tolist()
    for number, size in enumerate(list_sizes(sizes, len(values))):
        some = values[start : start + size]
        if any(rank != rank for rank in some):
            raise ValueError(f"the ranks of list {number} are {some}; every rank must be a number.")
        if len(set(some)) < size:
            raise ValueError(f"the ranks of list {number} are {some}; no two may be alike: leave one of a tie out.")
        order += sorted(range(start, start + size), key=values.__getitem__)
        start += size
    return torch.tensor(order, device=ranks.device)


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as a tensor there; a GPU is not waited for."""
    if len(set(values)) <= 1:
        return torch.full((len(values),), values[0] if values else 0, dtype=torch.long, device=device)
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
