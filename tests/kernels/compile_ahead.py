"""Compile the kernels for GPUs that need not be here, and print what the assembler made of each, a JSON object a line.

Run in a process of its own, without TRITON_INTERPRET: `python tests/kernels/compile_ahead.py 80 90 100`.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
from fastdpo_kernels import token_logprobs


class MockDriver:
    """As much of a CUDA driver as `warmup` asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def variants() -> Iterator[tuple[dict[str, Any], Any]]:
    """What each variant is, and the kernel compiled for the active driver. In warmup, a dtype stands for a pointer."""
    n, v, ignore_index, inner, outer = 1000, 128256, -100, 0.03, 30.0
    options = {"num_warps": token_logprobs.NUM_WARPS, "grid": (1,)}
    forward, backward = token_logprobs._token_logprobs_fwd_kernel, token_logprobs._token_logprobs_bwd_kernel
    f32, i64 = torch.float32, torch.int64
    for dtype in (torch.bfloat16, torch.float32):
        for softcap in (False, True):
            options["HAS_SOFTCAP"] = softcap
            name = f"{str(dtype).removeprefix('torch.')}{' softcap' if softcap else ''}"
            for stats in (False, True):
                arguments = (dtype, i64, f32, f32, f32 if stats else None, v, n, v, ignore_index, inner, outer)
                kernel = forward.warmup(*arguments, HAS_STATS=stats, BLOCK_V=token_logprobs.FORWARD_BLOCK, **options)
                yield {"kernel": "forward", "variant": name + " stats" * stats}, kernel
            arguments = (dtype, i64, f32, f32, dtype, v, v, v, ignore_index, inner, outer)
            kernel = backward.warmup(*arguments, BLOCK_V=token_logprobs.BACKWARD_BLOCK, **options)
            yield {"kernel": "backward", "variant": name}, kernel


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers a thread, bytes of stack (spills), and how often each kind of global load and store is in the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, assembly = (
            subprocess.run([tool.path, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in [(triton.knobs.nvidia.cuobjdump, "-res-usage"), (triton.knobs.nvidia.nvdisasm, "-c")]
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {**numbers, "memory": collections.Counter(re.findall(r"\b(?:LDG|STG)\.[A-Z0-9.]+", assembly))}


if __name__ == "__main__":
    for capability in sys.argv[1:]:
        triton.runtime.driver.set_active(MockDriver(int(capability)))
        for what, kernel in variants():
            print(json.dumps({"sm": int(capability), **what, **resources(kernel.asm["cubin"])}), flush=True)
