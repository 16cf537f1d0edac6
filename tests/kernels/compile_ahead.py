"""Compile the kernels for GPUs that need not be here, and print what the assembler made of each, a JSON object a line.

Run in a process of its own, without TRITON_INTERPRET: `python tests/kernels/compile_ahead.py sm_90 gfx942:0,1`. With
`--predecessors` it is the row kernels of `benchmarks/kernels/block_kernels.py`.
"""

import argparse
import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
from ptx import races
from sass import main_loop

from fastdpo_kernels import gather_kv, token_logprobs, token_logprobs_grad

# (V, row stride, elements before the first row) of logits without edges, and with edges: rows that begin or end inside
# a 16-byte vector. One kernel serves all shapes of a kind.
SHAPES = {
    False: [(128256, 128256, 0), (49152, 49168, 8), (8200, 8200, 16)],
    True: [(50257, 50259, 1), (32001, 32001, 0), (128256, 128257, 0), (49152, 49152, 3)],
}

# (H, d, dv) of keys and values, and (T, K, heads first) of what one kernel each way serves.
HEADS = [(8, 128, 128), (16, 192, 128), (5, 80, 80)]
GATHERS = [(160, 256, True), (33, 47, False), (7, 7, True)]


class MockDriver:
    """As much of a driver as `warmup` asks for."""

    def __init__(self, gpu: str):
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        if self.gpu.startswith("gfx"):
            return GPUTarget("hip", self.gpu, 64)
        return GPUTarget("cuda", int(self.gpu.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.gpu  # compiled kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


class CompileOnly:
    """Stands for a kernel in its launcher and compiles, with the arguments at hand, what would be launched."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_for(*args: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)

        return compile_for


def rows_of(n: int, v: int, stride: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Logits (n, v) that begin `offset` elements after a 16-byte boundary."""
    memory = torch.empty(offset + n * stride, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((n, v), (stride, 1), offset)


# The modules of the row kernels: of forward and backward, and of both in one pass.
Modules = tuple[ModuleType, ModuleType]
CURRENT: Modules = (token_logprobs, token_logprobs_grad)


def launch(
    shape: tuple[int, int, int], dtype: torch.dtype, gradient: str, stats: bool, softcap: float | None,
    modules: Modules = CURRENT,
) -> dict[str, Any]:  # fmt: skip
    """The kernels that the launchers start for logits of this shape on the active driver.

    `gradient`: "in place", into "other rows" that are aligned differently, or in "one pass" with the forward.
    """
    v, stride, offset = shape
    n = 2 + v % 5
    # Slices of longer vectors, as a chunk of rows has them: one element on, they begin at no 16-byte boundary.
    labels, floats = torch.zeros(n + 1, dtype=torch.int64)[v % 2 :][:n], torch.zeros(n + 1)[v % 2 :][:n]
    logits = rows_of(n, v, stride, offset, dtype)
    options: dict[str, Any] = {"softcap": softcap, "ignore_index": -v}
    two_passes, in_one = modules
    forward = CompileOnly(two_passes._token_logprobs_fwd_kernel)
    backward = CompileOnly(two_passes._token_logprobs_bwd_kernel)
    one_pass = CompileOnly(in_one._token_logprobs_fwd_grad_kernel)
    with (
        mock.patch.multiple(two_passes, _token_logprobs_fwd_kernel=forward, _token_logprobs_bwd_kernel=backward),
        mock.patch.multiple(in_one, _token_logprobs_fwd_grad_kernel=one_pass),
    ):
        if gradient == "one pass":
            in_one.token_logprobs_fwd_grad(logits, labels, stats=stats, **options)
        else:
            two_passes.token_logprobs_fwd(logits, labels, stats=stats, **options)
            out = logits if gradient == "in place" else rows_of(n, v, stride + 1, offset, dtype)
            norms = torch.zeros(2, n)
            two_passes.token_logprobs_bwd(logits, labels, norms, floats, out=out, **options)
    kernels = {"forward": forward.compiled, "backward": backward.compiled, "one pass": one_pass.compiled}
    return {name: compiled for name, compiled in kernels.items() if compiled is not None}


def variants(whole: Sequence[int], modules: Modules = CURRENT) -> Iterator[tuple[dict[str, Any], Any]]:
    """What each variant is, how many kernels its shapes need, and the kernel for the first of them.

    whole  of the eight combinations of edges, dtype and softcap, the numbers of those of which all variants are made;
           of the others only those that need the most registers
    """
    combinations = itertools.product(SHAPES, (torch.bfloat16, torch.float32), (None, 30.0))
    for number, (edges, dtype, softcap) in enumerate(combinations):
        essential = number not in whole
        if essential and (edges, dtype, softcap) != (True, torch.bfloat16, 30.0):
            continue
        cases = [(True, "in place"), (True, "one pass")]
        if dtype == torch.bfloat16:
            cases += [(True, "other rows")] * edges
        if not essential:
            cases += [(False, "in place"), (False, "one pass")]
        name = f"{str(dtype).removeprefix('torch.')}{' softcap' * (softcap is not None)}{' edges' * edges}"
        seen: set[int] = set()
        for stats, gradient in cases:
            launches = [launch(shape, dtype, gradient, stats, softcap, modules) for shape in SHAPES[edges]]
            for kernel in launches[0]:
                detail = f" {gradient}" if kernel == "backward" else " stats" * stats
                ids = {id(kernels[kernel]) for kernels in launches}
                if not ids <= seen:
                    what = {"kernel": kernel, "variant": name + detail, "kernels": len(ids)}
                    yield what, launches[0][kernel]
                seen |= ids


def gather_launch(heads: tuple[int, int, int], rows: tuple[int, int, bool], dtype: torch.dtype) -> dict[str, Any]:
    """The kernels that the launchers start for keys and values in this place."""
    (h, *sizes), (num_rows, num_gathered, heads_first) = heads, rows

    def tensors(n: int) -> list[Tensor]:
        if heads_first:
            return [torch.empty(h, n, size, dtype=dtype).transpose(0, 1) for size in sizes]
        return [torch.empty(n, h, size, dtype=dtype) for size in sizes]

    index, offsets = torch.zeros(num_gathered, dtype=torch.int64), torch.zeros(num_rows + 1, dtype=torch.int64)
    forward, backward = CompileOnly(gather_kv._gather_kv_fwd_kernel), CompileOnly(gather_kv._gather_kv_bwd_kernel)
    with mock.patch.multiple(gather_kv, _gather_kv_fwd_kernel=forward, _gather_kv_bwd_kernel=backward):
        gather_kv.gather_kv_fwd(*tensors(num_rows), index)
        gather_kv.gather_kv_bwd(*tensors(num_gathered), index, offsets)
    return {"gather": forward.compiled, "gather backward": backward.compiled}


def gather_variants(whole: Sequence[int]) -> Iterator[tuple[dict[str, Any], Any]]:
    """As `variants`, where most is whole; the heads that need the most registers are the last."""
    for heads, dtype in itertools.product(HEADS if len(whole) > 4 else HEADS[-1:], (torch.bfloat16, torch.float32)):
        launches = [gather_launch(heads, rows, dtype) for rows in GATHERS]
        for kernel, compiled in launches[0].items():
            name = f"{str(dtype).removeprefix('torch.')} {' '.join(map(str, heads))}"
            count = len({id(kernels[kernel]) for kernels in launches})
            yield {"kernel": kernel, "variant": name, "kernels": count}, compiled


def cuda_resources(cubin: bytes, itemsize: int | None) -> dict[str, Any]:
    """What a kernel uses, and of a row kernel, for logits of this size, what its main loop executes for an element."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, assembly = (
            subprocess.run([tool.path, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in [(triton.knobs.nvidia.cuobjdump, "-res-usage"), (triton.knobs.nvidia.nvdisasm, "-c")]
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    executed = {}
    if itemsize is not None:
        loop = main_loop(assembly)
        elements = loop.bytes_of_block() / itemsize
        executed = {
            "instructions": len(loop.instructions) / elements,
            "special": loop.count("MUFU") / elements,
            "barriers": loop.count("BAR"),
        }
    return {
        **executed,
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"],
        "loads": collections.Counter(re.findall(r"\bLDG\.[A-Z0-9.]+", assembly)),
        "stores": collections.Counter(re.findall(r"\bSTG\.[A-Z0-9.]+", assembly)),
    }


def hip_resources(assembly: str) -> dict[str, Any]:
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)}
    return {
        "registers": numbers["vgpr_count"],
        "spills": sum(numbers[k] for k in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")),
        "loads": collections.Counter(re.findall(r"\b(?:global|buffer)_load_\w+", assembly)),
        "stores": collections.Counter(re.findall(r"\b(?:global|buffer)_store_\w+", assembly)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("gpu", nargs="+", help="sm_90, gfx942; with `:2,5` these combinations are whole (`variants`)")
    parser.add_argument("--predecessors", action="store_true")
    arguments = parser.parse_args()
    for words in arguments.gpu:
        gpu, colon, numbers = words.partition(":")
        whole = [int(number) for number in numbers.split(",") if number] if colon else range(8)
        triton.runtime.driver.set_active(MockDriver(gpu))
        kernels = itertools.chain(variants(whole), gather_variants(whole))
        if arguments.predecessors:
            sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels"))
            import block_kernels

            kernels = variants(whole, (block_kernels, block_kernels))
        for what, kernel in kernels:
            asm = kernel.asm
            itemsize = None if what["kernel"].startswith("gather") else (2 if "16" in what["variant"] else 4)
            made = cuda_resources(asm["cubin"], itemsize) if "cubin" in asm else hip_resources(asm["amdgcn"])
            if "ptx" in asm:
                made["races"] = races(asm["ptx"])
            print(json.dumps({"gpu": gpu, **what, **made}), flush=True)
