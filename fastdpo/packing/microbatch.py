"""A batch cut by tokens into micro-batches that each fit one forward pass; the gradient is that of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from fastdpo.packing.batch import PreferenceBatch

if TYPE_CHECKING:
    from fastdpo.packing.collator import PreferenceCollator

Cost = Callable[[int, int], int]  # tokens that the pairs [first, end) of a batch take in one forward pass


@dataclass(frozen=True)
class MicroBatches:
    """The pairs of one batch in order, as micro-batches. Moves and pins like a tensor.

    A single pair longer than the budget is a micro-batch of its own. `into` cuts the same pairs into more parts, so
    that every process of a data-parallel run can take as many as the one that needs most.
    """

    parts: tuple[PreferenceBatch, ...]
    rows: Sequence[Any]
    collator: PreferenceCollator
    passes: int  # the forward passes it stands for: those of `parts`, and any that do nothing

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return iter(self.parts)

    @property
    def num_pairs(self) -> int:
        return len(self.rows)

    @property
    def total_weight(self) -> float:
        return sum(part.total_weight for part in self.parts)

    @property
    def chosen_tokens(self) -> float | None:
        """Of pairs: targets of the chosen answers, times their pairs' weights; on the host."""
        each = [part.chosen_tokens for part in self.parts]
        return None if None in each else sum(count for count in each if count is not None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatches:
        return replace(self, parts=tuple(part.to(device, non_blocking=non_blocking) for part in self.parts))

    def pin_memory(self) -> MicroBatches:
        return replace(self, parts=tuple(part.pin_memory() for part in self.parts))

    def into(self, count: int) -> MicroBatches:
        """The same pairs in `count` micro-batches; where there are fewer pairs, in one a pair, the rest do nothing."""
        return self if count == self.passes else self.collator.microbatches(self.rows, count)


def fewest(num_pairs: int, budget: int, cost: Cost) -> int:
    """Into how many runs of neighbours the pairs must be cut, so that none takes more than `budget` tokens."""
    return len(_fill(num_pairs, budget, cost))


def even_cuts(num_pairs: int, count: int, cost: Cost) -> list[tuple[int, int]]:
    """[first, end) of `count` runs of neighbours that take about the same number of tokens."""
    count = min(count, num_pairs)
    low, high = 1, cost(0, num_pairs)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(num_pairs, middle, cost)) <= count:
            high = middle
        else:
            low = middle + 1
    runs = _fill(num_pairs, low, cost)
    while len(runs) < count:  # then one with several pairs can be cut anywhere
        largest = max((run for run in runs if run[1] - run[0] > 1), key=lambda run: cost(*run))
        place, (first, end) = runs.index(largest), largest
        middle = min(range(first + 1, end), key=lambda cut: max(cost(first, cut), cost(cut, end)))
        runs[place : place + 1] = [(first, middle), (middle, end)]
    return runs


def _fill(num_pairs: int, budget: int, cost: Cost) -> list[tuple[int, int]]:
    """Each run takes as many pairs as fit, and one at least."""
    runs, first = [], 0
    for end in range(1, num_pairs + 1):
        if end == num_pairs or cost(first, end + 1) > budget:
            runs.append((first, end))
            first = end
    return runs


def packed_cost(sizes: Sequence[int], shared: Sequence[int]) -> Cost:
    """`sizes[i]` tokens of pair i, less `shared[i]` of them where pair i - 1 stands in the same run."""
    total, saved = [0, *accumulate(sizes)], [0, *accumulate(shared)]

    def cost(first: int, end: int) -> int:
        return total[end] - total[first] - (saved[end] - saved[first + 1])

    return cost


def padded_cost(widths: Sequence[int], rows: Sequence[int], multiple_of: int | None) -> Cost:
    """`rows[i]` rows of pair i, all of a run as wide as the widest."""
    total = [0, *accumulate(rows)]

    def cost(first: int, end: int) -> int:
        width = max(widths[first:end])
        return (total[end] - total[first]) * (-(-width // multiple_of) * multiple_of if multiple_of else width)

    return cost
