"""What work costs, counted: function calls and bytes are the same on every machine, seconds are not."""

import contextlib
import gc
import sys
import tracemalloc
from dataclasses import dataclass


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
