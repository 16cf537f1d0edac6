"""A batch cut by tokens into micro-batches that each fit one forward pass; the gradient is that of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdpo.packing.batch import PreferenceBatch
from fastdpo.packing.tree import SortedSequences

if TYPE_CHECKING:
    from fastdpo.packing.collator import PreferenceCollator


@dataclass(frozen=True)
class Cost:
    """Tokens that the rows [first, end) of a batch take in one forward pass.

    tokens  exactly
    fewest  at least so many; unlike `tokens`, never less for rows [first, end + 1)
    """

    tokens: Callable[[int, int], int]
    fewest: Callable[[int, int], int]


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


def fewest_cuts(num_rows: int, budget: int, cost: Cost) -> list[tuple[int, int]]:
    """[first, end) of runs of neighbours that take at most `budget` tokens each; of one row where that takes more.

    Rows that fit together are one run. Otherwise each run takes as many rows as fit, the first run first.
    """
    runs, first = [], 0
    while first < num_rows:
        end = first + 1
        # Beginnings are shared where that pays, and one row more may be what makes it pay: a longer run can fit
        # where a shorter one does not.
        for longer in range(first + 2, num_rows + 1):
            if cost.fewest(first, longer) > budget:
                break
            if cost.tokens(first, longer) <= budget:
                end = longer
        runs.append((first, end))
        first = end
    return runs


def even_cuts(num_rows: int, count: int, cost: Cost, budget: int | None = None) -> list[tuple[int, int]]:
    """[first, end) of `count` runs of neighbours that take about the same number of tokens.

    Where `count` runs can keep to `budget` tokens by `fewest_cuts`, they do, but for runs of one row.
    """
    count = min(count, num_rows)
    if count == 1:
        return [(0, num_rows)]
    low, high = 1, cost.tokens(0, num_rows)
    runs = [(0, num_rows)]
    if budget is not None and budget < high and len(kept := fewest_cuts(num_rows, budget, cost)) <= count:
        high, runs = budget, kept
    while low < high:  # `runs` are those of `high`
        middle = (low + high) // 2
        smaller = fewest_cuts(num_rows, middle, cost)
        if len(smaller) <= count:
            high, runs = middle, smaller
        else:
            low = middle + 1
    while len(runs) < count:  # then one with several rows can be cut anywhere
        largest = max((run for run in runs if run[1] - run[0] > 1), key=lambda run: cost.tokens(*run))
        place, (first, end) = runs.index(largest), largest
        middle = min(range(first + 1, end), key=lambda cut: max(cost.tokens(first, cut), cost.tokens(cut, end)))
        runs[place : place + 1] = [(first, middle), (middle, end)]
    return runs


def packed_cost(sequences: Sequence[Sequence[np.ndarray]], share: bool) -> Cost:
    """Of rows of so many sequences of token ids (1-D int64) each, packed into one."""
    starts = [0, *accumulate(map(len, sequences))]  # the number of each row's first sequence
    if not share:
        total = [0, *accumulate(sum(map(len, row)) for row in sequences)]
        return _monotone(lambda first, end: total[end] - total[first])
    ordered = SortedSequences([sequence for row in sequences for sequence in row])
    return Cost(
        tokens=cache(lambda first, end: ordered.num_tokens(starts[first], starts[end])),
        fewest=cache(lambda first, end: ordered.fewest_tokens(starts[first], starts[end])),
    )


def padded_cost(widths: Sequence[int], sequences: Sequence[int], multiple_of: int | None) -> Cost:
    """Of rows of so many sequences each, all of a batch padded to the widest."""
    total = [0, *accumulate(sequences)]

    def tokens(first: int, end: int) -> int:
        width = max(widths[first:end])
        return (total[end] - total[first]) * (-(-width // multiple_of) * multiple_of if multiple_of else width)

    return _monotone(tokens)


def _monotone(tokens: Callable[[int, int], int]) -> Cost:
    return Cost(tokens, tokens)
