"""A GPU that is not there, so that what is meant for one can be rehearsed on a CPU: tensors stay on the CPU.

    python benchmarks/fake_gpu.py SCRIPT ARGUMENTS...       a benchmark
    PYTEST_PLUGINS=fake_gpu python -m pytest ...            tests; with this folder on PYTHONPATH

`torch.cuda` says that there is a device, `device="cuda"` and `.cuda()` mean the CPU, Triton kernels run in the
interpreter, events read the wall clock, no memory is ever taken, and a graph runs again what was captured. Speeds and
memory mean nothing, and nothing that only a device can get wrong is seen; but the programs run to their end.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 << 30


def install() -> None:
    """For the rest of this process, and its main thread."""
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # which asks for the symbols of a CUDA build if there is a device
        import bitsandbytes  # noqa: F401
    import torch
    from torch.overrides import TorchFunctionMode

    here = Path(__file__).resolve().parent
    sys.path += [str(here), str(here.parent), str(here.parent / "kernels")]
    import timing

    from fastdpo import device

    device.gemm_flops_per_second = lambda *args: 1e12  # before anybody imports it; that of a GPU is too large here
    timing.COPY_BYTES["cuda"], timing.PRODUCT_ROWS["cuda"] = timing.COPY_BYTES["cpu"], timing.PRODUCT_ROWS["cpu"]
    timing.FILLER_BYTES = 1 << 10

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.cuda:
                return args[0]
            if function is torch.device:  # still says what it was made for
                return function(*args, **(kwargs or {}))
            kwargs = {key: _on_the_cpu(value) for key, value in (kwargs or {}).items()}
            return function(*map(_on_the_cpu, args), **kwargs)

    def _on_the_cpu(value: Any) -> Any:
        named = isinstance(value, str) and value.partition(":")[0] == "cuda"
        return torch.device("cpu") if named or (isinstance(value, torch.device) and value.type == "cuda") else value

    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    for name, value in {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *args: NAME,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: SimpleNamespace(
            name=NAME, total_memory=MEMORY, multi_processor_count=132
        ),
        "mem_get_info": lambda *args: (MEMORY, MEMORY),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "current_stream": lambda *args: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": _captured,
    }.items():
        setattr(torch.cuda, name, value)
    autocast = torch.autocast.__init__

    def on_the_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = on_the_cpu  # type: ignore[method-assign]
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode", "set_device"):
        setattr(torch.cuda, name, nothing)
    OnTheCpu().__enter__()


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, **options: Any) -> None:
        self.time = 0.0

    def record(self, *stream: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)


class _Graph:
    """The operations of a capture: `replay` runs them again, and writes over what they returned."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        with torch.no_grad():
            for operation, args, kwargs, returned in self.calls:
                again = tree_leaves(operation(*args, **kwargs))
                for old, new in zip(tree_leaves(returned), again, strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def _captured(graph: _Graph) -> Iterator[None]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            returned = operation(*args, **(kwargs or {}))
            graph.calls.append((operation, args, kwargs or {}, returned))
            return returned

    with Recorded():
        yield


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
elif "fake_gpu" in os.environ.get("PYTEST_PLUGINS", "").split(
    ","
):  # in pytest's workers, too, before any test's import
    install()
