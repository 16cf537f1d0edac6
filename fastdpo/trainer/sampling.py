"""The order of an epoch's rows: rows of like length or of one prompt together, device batches of like cost.

An order follows from the sampler's arguments and (seed, epoch) alone: every process finds the same one, and a resumed
run that skips the batches it has seen (accelerate's `skip_first_batches`) goes on where it stopped. The epoch is 0
until `set_epoch`. (numpy may change what a seed draws from one version to another.)

The first two samplers are fair: each row is equally likely to stand at each place of the epoch, hence in each optimizer
step, so that the expected gradient of a step is that of plain shuffling. Rows of one step are not independent, though:
they are alike, and the gradient varies more from step to step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class _EpochSampler(Sampler[int]):
    """`count` rows in the order that `_order` draws for (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more.")
        self.seed = seed
        self.epoch = 0
        self._count = count

    def set_epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it must be 0 or more.")
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(self._order(np.random.default_rng([self.seed, self.epoch])).tolist())

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


class LengthGroupedSampler(_EpochSampler):
    """Batches of rows of like length; fair.

    A random permutation is cut into megabatches of `megabatch * batch_size` rows; each is sorted by length (equal
    lengths stay in random order) and cut into batches; the batches of all megabatches are shuffled. What is too little
    for a batch at the end of the permutation is random rows, and ends the epoch. Inside a batch the rows ascend in
    length from a random place on, the shortest coming after the longest: were they sorted, the shortest of the first
    batch would be what accelerate fills up the last batch of the epoch with.

    lengths     (n,) cost of each row, in tokens
    batch_size  rows of an optimizer step, over all processes and accumulation steps
    megabatch   batches sorted together: more of them, and the rows of a batch are more alike

    Raises:
        ValueError: no rows, lengths that are no list of finite numbers of 0 or more, a size below 1, a seed below 0.
    """

    def __init__(self, lengths: Any, batch_size: int, *, seed: int, megabatch: int = 50) -> None:
        self.lengths = _checked_lengths(lengths)
        _check_sizes(batch_size=batch_size, megabatch=megabatch)
        super().__init__(len(self.lengths), seed)
        self.batch_size = batch_size
        self.megabatch = megabatch

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        rows = rng.permutation(len(self))
        in_batches = len(rows) - len(rows) % self.batch_size
        rows, rest = rows[:in_batches], rows[in_batches:]
        megabatches = np.arange(len(rows)) // (self.megabatch * self.batch_size)
        batches = rows[np.lexsort((self.lengths[rows], megabatches))].reshape(-1, self.batch_size)
        batches = rng.permutation(batches)
        begins = rng.integers(self.batch_size, size=(len(batches), 1))
        batches = np.take_along_axis(batches, (begins + np.arange(self.batch_size)) % self.batch_size, axis=1)
        return np.concatenate([batches.ravel(), rest])


class PromptGroupedSampler(_EpochSampler):
    """Rows of one prompt next to each other, so that packing runs their prompt once; fair.

    Groups in random order, the rows of each in random order, and all of it rotated by a random number of places: with
    the rotation every row stands at each place with probability 1/n, whatever the sizes of the groups. It parts at
    most one group, one half of which then begins the epoch and the other ends it; ends of batches part others.

    groups  (n,) integers, equal for rows of one group (see `prompt_groups`)

    Raises:
        ValueError: no rows, groups that are no list of integers, a seed below 0.
    """

    def __init__(self, groups: Any, *, seed: int) -> None:
        groups = _checked_groups(groups)
        super().__init__(len(groups), seed)
        self._numbers = np.unique(groups, return_inverse=True)[1]  # (n,), 0 to the number of groups

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        rows = rng.permutation(len(self))
        places = rng.permutation(self._numbers.max() + 1)  # of the groups
        rows = rows[np.argsort(places[self._numbers[rows]], kind="stable")]
        return np.roll(rows, rng.integers(len(rows)))


def prompt_groups(prompts: Iterable[Any]) -> np.ndarray:
    """(n,) int64: a number for each prompt (a sequence of token ids), the same for prompts to be run together.

    Those are equal prompts, and those that continue the shortest prompt of the group to at most twice its length, as
    the turns of one conversation do. So any two prompts of a group have in common at least half of the longer one,
    and a short prompt which very many others begin with, such as a system prompt alone, does not gather them all. A
    longer continuation founds a group of its own, which takes what continues it.

    Takes 4 bytes of memory a token meanwhile.

    Raises:
        ValueError: no prompts, or one that is not a sequence of numbers.
    """
    # Every id in four bytes, so that a beginning in tokens is one in bytes; sorted, it stands before all that goes on
    # from it, and those stand together.
    keys = [_key(row, prompt) for row, prompt in enumerate(prompts)]
    if not keys:
        raise ValueError("prompts is empty; it must hold one sequence of token ids for each row.")
    groups = np.empty(len(keys), dtype=np.int64)
    founders: list[tuple[bytes, int]] = []  # (first prompt, number) of groups, each a beginning of the next
    count = 0
    for row in sorted(range(len(keys)), key=keys.__getitem__):
        key = keys[row]
        while founders and not key.startswith(founders[-1][0]):
            founders.pop()
        # The last founder is the longest: where it is too short, those before it are.
        if not founders or len(key) > 2 * len(founders[-1][0]):
            founders.append((key, count))
            count += 1
        groups[row] = founders[-1][1]
    return groups


class BalancedSampler(Sampler[int]):
    """The rows of another order, moved about inside each optimizer step so that device batches cost about the same.

    accelerate cuts the order into device batches of `batch_size` rows and deals them out in turn: batch i goes to
    process i % processes. Of each step the costliest row goes first, each into the cheapest device batch that still
    has room. Device batches that run at the same time are then chosen to be alike, for what could not be evened out.
    Every step keeps its rows, so its gradient is the same. An incomplete step ends with the rows that the base order
    ends with, too few for a batch on each process; whole batches among them are balanced, and the short one is last.

    base          a sampler, or the rows in order
    lengths       (n,) cost of each row of the data, in tokens
    batch_size    rows of a device batch
    processes     processes that take device batches in turn
    accumulation  device batches of a process in an optimizer step
    groups        (n,) integers: rows of one group stay together where a device batch has room for them all. Larger
                  groups are cut, and so is one that no batch has room for any more.

    Raises:
        ValueError: lengths or groups of another count than the base or not numbers, a size below 1; while running: a
            row of the base that is not one of the n.
    """

    def __init__(
        self,
        base: Sampler[int] | Sequence[int],
        lengths: Any,
        *,
        batch_size: int,
        processes: int,
        accumulation: int = 1,
        groups: Any = None,
    ) -> None:
        _check_sizes(batch_size=batch_size, processes=processes, accumulation=accumulation)
        self.base: Any = base
        self.lengths = _checked_lengths(lengths)
        self.groups = None if groups is None else _checked_groups(groups)
        for name, values in (("lengths", self.lengths), ("groups", self.groups)):
            if values is not None and len(values) != len(self):
                raise ValueError(
                    f"{name} has {len(values)} values and base has {len(self)} rows; give {name} one value a row."
                )
        self.batch_size = batch_size
        self.processes = processes
        self.accumulation = accumulation

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(map(self._balanced_step, self._steps(iter(self.base))))

    def _steps(self, rows: Iterator[int]) -> Iterator[np.ndarray]:
        size = self.batch_size * self.processes * self.accumulation
        while len(step := np.fromiter(itertools.islice(rows, size), dtype=np.int64)):
            if step.min() < 0 or step.max() >= len(self.lengths):
                raise ValueError(
                    f"base holds row {step.min() if step.min() < 0 else step.max()}, and lengths are given for rows "
                    f"0 to {len(self.lengths) - 1}; give base and lengths of the same data."
                )
            yield step

    def _balanced_step(self, rows: np.ndarray) -> list[int]:
        # What is too little for a batch on every process stays the end of the base's order: accelerate may drop it, and
        # it must then be random rows, not cheap ones.
        everywhere = len(rows) - len(rows) % (self.batch_size * self.processes)
        whole = len(rows) - len(rows) % self.batch_size
        return [
            *self._balanced(rows[:everywhere]).tolist(),
            *self._balanced(rows[everywhere:whole]).tolist(),
            *rows[whole:].tolist(),
        ]

    def _balanced(self, rows: np.ndarray) -> np.ndarray:
        """Whole device batches. Their order, and that of the rows in each, is that of their first places in `rows`."""
        costs = self.lengths[rows].tolist()
        batches = _pack(self._units(rows), costs, self.batch_size)
        batches.sort(key=lambda batch: -sum(costs[place] for place in batch))
        rounds = [sorted(batches[i : i + self.processes]) for i in range(0, len(batches), self.processes)]
        return rows[[place for together in sorted(rounds) for batch in together for place in batch]]

    def _units(self, rows: np.ndarray) -> list[list[int]]:
        """Places in `rows` that are to stay together."""
        if self.groups is None:
            return [[place] for place in range(len(rows))]
        units: dict[int, list[int]] = {}
        for place, group in enumerate(self.groups[rows].tolist()):
            units.setdefault(group, []).append(place)
        return list(units.values())


def _pack(units: list[list[int]], costs: list[float], size: int) -> list[list[int]]:
    """Places into batches of `size`: the costliest unit first, each into the cheapest batch with room for all of it."""
    batches: list[list[int]] = [[] for _ in range(len(costs) // size)]
    cheapest = [(0.0, number) for number in range(len(batches))]  # a heap of the batches with room
    for unit in sorted(units, key=lambda unit: -sum(costs[place] for place in unit)):
        while unit:
            too_full = []
            while cheapest and size - len(batches[cheapest[0][1]]) < len(unit):
                too_full.append(heapq.heappop(cheapest))
            if cheapest:
                cost, number = heapq.heappop(cheapest)
            else:  # no batch has room for all of it: most of it goes into the one with the most room
                emptiest = min(range(len(too_full)), key=lambda i: len(batches[too_full[i][1]]))
                cost, number = too_full.pop(emptiest)
            room = size - len(batches[number])
            placed, unit = unit[:room], unit[room:]
            batches[number] += placed
            for entry in too_full:
                heapq.heappush(cheapest, entry)
            if len(batches[number]) < size:
                heapq.heappush(cheapest, (cost + sum(costs[place] for place in placed), number))
    return [sorted(batch) for batch in batches]


def _key(row: int, prompt: Any) -> bytes:
    ids = np.asarray(prompt, dtype=">i4")
    if ids.ndim != 1:
        raise ValueError(f"prompt {row} has shape {ids.shape}; it must be one sequence of token ids.")
    return ids.tobytes()


def _checked_lengths(lengths: Any) -> np.ndarray:
    values = np.asarray(lengths)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"lengths has shape {values.shape}; it must hold one number for each row, and at least one.")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"lengths holds {values.dtype}; it must hold the rows' numbers of tokens.")
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"lengths holds {values[row]} for row {row}; it must be a finite number of 0 or more.")
    return values


def _checked_groups(groups: Any) -> np.ndarray:
    values = np.asarray(groups)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"groups has shape {values.shape}; it must hold one number for each row, and at least one.")
    if values.dtype.kind not in "iu":
        raise ValueError(f"groups holds {values.dtype}; it must hold integers, equal for rows of one group.")
    return values


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be 1 or more.")
