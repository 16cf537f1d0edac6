"""What the benchmarks of whole models share: the models, how far numbers may differ, and what an error is called."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from workloads import MODELS

from fastdpo.device import is_out_of_memory


@dataclass(frozen=True)
class Tolerance:
    """Nats by which a token's log-prob may be off, at random; and how far the gradient's norm may be, relatively."""

    token: float
    norm: float

    def sum(self, targets: int) -> float:
        """Three standard deviations of the sum of so many log-probs."""
        return 3 * self.token * math.sqrt(targets)


# Between the contestants, a Llama of 12 layers and 1024 channels in bfloat16 was off by up to 0.006 nats and 0.0022 of
# the norm (hh, CPU, 2026-11-21); deeper and wider ones round more. What is left out or counted twice is nats off.
TOLERANCES = {torch.float32: Tolerance(1e-4, 1e-3), torch.bfloat16: Tolerance(2e-2, 1e-2)}


def make_model(name: str, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> Any:
    """Made where it is to run: on a CPU the random numbers of 8B alone would take minutes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**MODELS[name]), dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradient_norm(model: Any) -> float:
    grads = (weight.grad for weight in model.parameters() if weight.grad is not None)
    # In float32: a norm of bfloat16 is itself rounded to eight bits.
    return torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]).norm().item()


def forget() -> None:
    """What one step leaves would count against the next: garbage, and free memory that the process holds on to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def told(error: Exception) -> tuple[str, str]:
    """(status, reason): the first line, with the name of the exception."""
    error.with_traceback(None)  # whose frames would hold on to tensors
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")
    return ("out of memory" if is_out_of_memory(error) else "failed"), reason


def failed(row: dict[str, Any], error: Exception, figures: Iterable[str]) -> None:
    """Notes in a contestant's row what became of it, and takes its figures out."""
    status, reason = told(error)
    row.update(dict.fromkeys(figures), status=status, reason=reason)


class BackboneTokens:
    """How many tokens a model's backbone runs from now on, padding too, whoever runs it."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.base_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, backbone: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += kwargs["input_ids"].numel()
