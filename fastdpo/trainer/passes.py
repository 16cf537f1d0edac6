"""An optimizer step in passes of bounded size: as many on every process, gradients exchanged once."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastdpo.packing import MicroBatches, PreferenceBatch

_OFFLOADED = 1024  # elements of a tensor that is worth a copy
PATIENCE = timedelta(days=30)  # with which processes that are done wait for the slowest, where that may take long


class HostCounts:
    """Small integers of every process, exchanged on the host: the device is not waited for."""

    def __init__(self, patience: timedelta | None = None) -> None:
        """`patience`: how long a process waits for the others; default: as long as the run's own group does."""
        self._group: Any = None
        self._patience = patience

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """The values of each process; all of them call this, with as many values."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return [list(values)]
        if self._group is None:
            suits = dist.get_backend() == "gloo" and self._patience is None
            self._group = dist.group.WORLD if suits else dist.new_group(backend="gloo", timeout=self._patience)
        own = torch.tensor(values, dtype=torch.int64)
        all_values = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(all_values, own, group=self._group)
        return [each.tolist() for each in all_values]


def agree(batches: Sequence[Any], counts: HostCounts, signal: int = 0) -> tuple[list[Any], float, int]:
    """The batches of a step, each cut into as many passes on every process; what the step's pairs weigh together, over
    all processes (their number, where the rows carry no weights); and the signal that any process was sent, or 0.

    The mean length of the chosen answers, by which an NLL is divided, becomes that of the whole step, too: whichever
    way its pairs are dealt out, the gradient is the same.
    """
    lengths = [len(batch) if isinstance(batch, MicroBatches) else 1 for batch in batches]
    weight = sum(batch.total_weight for batch in batches)
    tokens = sum(batch.chosen_tokens or 0.0 for batch in batches)
    everywhere = counts.gather([signal, _as_integer(weight), _as_integer(tokens), *lengths])
    signals, weights, chosen, *needed = zip(*everywhere, strict=True)
    cut = [
        batch.into(max(each)) if isinstance(batch, MicroBatches) else batch
        for batch, each in zip(batches, needed, strict=True)
    ]
    total = sum(map(_as_number, weights))
    # A tensor, because torch.compile would make a new graph for every number.
    mean = torch.tensor(sum(map(_as_number, chosen)) / (total or 1.0))
    for part in itertools.chain.from_iterable(map(passes_of, cut)):
        if part.chosen_tokens is not None:
            part["mean_chosen_length"] = mean
    return cut, total, max(signals)


def _as_integer(value: float) -> int:
    """The bits of a float64, to be exchanged with integers."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _as_number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def passes_of(batch: Any) -> list[PreferenceBatch]:
    """The passes of a batch as `agree` cut it. Where a process has fewer pairs than there are passes, it repeats one
    with weight 0: sharded models exchange weights in every pass, and none may be missing."""
    if not isinstance(batch, MicroBatches):
        return [batch]
    parts = list(batch)
    idle = PreferenceBatch({**parts[-1], "weight": 0.0})
    return parts + [idle] * (batch.passes - len(parts))


def without_exchange(model: Any) -> Any:
    """Within it, a backward leaves the gradients of a DistributedDataParallel model on their process."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def activations_on_host() -> Iterator[None]:
    """Within it, what a GPU's forward keeps for the backward waits in pinned host memory; weights stay."""

    def pack(tensor: Tensor) -> Any:
        if tensor.device.type == "cpu" or isinstance(tensor, torch.nn.Parameter) or tensor.numel() < _OFFLOADED:
            return tensor
        held = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
        held.copy_(tensor, non_blocking=True)
        return tensor.device, held

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
