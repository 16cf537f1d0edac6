"""What work costs, counted: function calls and bytes are the same on every machine, seconds are not."""

import contextlib
import gc
import sys
import tracemalloc
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def calls(work):
    """How many functions, of Python or of C, are called from Python in `work()`: a loop over a million rows is seen."""
    count = 0

    def counting(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counting)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@dataclass
class Memory:
    """Bytes of Python and numpy: that were allocated within and are still held; and at most held at once."""

    held: int = 0
    peak: int = 0


@contextlib.contextmanager
def memory():
    gc.collect()
    tracemalloc.start()
    found = Memory()
    try:
        yield found
    finally:
        gc.collect()
        found.held, found.peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside took at one time."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result
