"""Evaluation sets of several processes: batches alike in number and size, in which every row counts once.

accelerate fills the last batches up with rows from the beginning of the data set, which then count twice in each mean.
Here what fills up is marked, and the collator leaves it out of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from fastdpo.packing.groups import FILLER


class EvenRows(Dataset):
    """A data set with a length, and behind its rows marked ones, up to a multiple of `multiple`."""

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self._length = -(-len(dataset) // multiple) * multiple

    @property
    def total_dataset_length(self) -> int:
        """What accelerate takes for the length when it cuts what processes have gathered."""
        return len(self.dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < len(self.dataset):
            return dict(self.dataset[number])
        return {**self.dataset[number % len(self.dataset)], FILLER: True}


class EvenStream(IterableDataset):
    """The same of a data set that is streamed."""

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset, self.multiple = dataset, multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, None
        for row in self.dataset:
            count += 1
            yield row
        for _ in range(-count % self.multiple):
            assert row is not None
            yield {**row, FILLER: True}

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
