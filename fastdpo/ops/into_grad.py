"""The gradient of a head added straight to `.grad`, where nobody would see a difference.

Autograd takes from a backward a gradient of its own for each tensor and adds it to what `.grad` holds. Of a head that
copy can be gigabytes, and a pass over them; adding to `.grad` at once also rounds once instead of twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo_kernels.linear_logprobs import CPU_SLAB


def grad_to_add_to(ctx: Any, index: int) -> Tensor | None:
    """`.grad` of the tensor input `index` of an autograd function, if its backward may add to that in place.

    It may if the engine would do this and no more: the input is a leaf whose `.grad` is there already, this is a
    `backward` that accumulates into it (no `torch.autograd.grad`, no `backward(inputs=...)` without it), no hook waits
    for the gradient, and no other process is to have a share of it. The backward then gives None in its place.

    Call it in a backward that makes no graph.
    """
    edges = getattr(ctx, "next_functions", ())  # of a function that torch.compile has taken over there are none
    node: Any = edges[index][0] if index < len(edges) else None
    if type(node).__name__ != "AccumulateGrad" or torch.compiler.is_compiling():
        return None
    leaf = node.variable
    grad = leaf.grad
    if type(leaf) not in (Tensor, torch.nn.Parameter) or type(grad) is not Tensor:  # none, or a DTensor, say
        return None
    plain = grad.layout == torch.strided and grad.is_contiguous() and not grad.requires_grad
    if not plain or grad.dtype not in (leaf.dtype, torch.float32):
        return None
    if dist.is_available() and dist.is_initialized():  # DistributedDataParallel's hooks cannot be seen from Python
        return None
    if leaf.is_cuda and torch.cuda.current_stream(leaf.device) != torch.cuda.default_stream(leaf.device):
        return None  # for which autograd would let streams wait for each other
    return grad if _is_accumulated(node) and not _has_hooks(leaf, node) else None


def _is_accumulated(node: Any) -> bool:
    """Whether the backward that is running adds to the `.grad` of this leaf."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of a leaf that torch.autograd.grad was asked for
        return False


def _has_hooks(leaf: Tensor, node: Any) -> bool:
    if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
        return True
    # A node does not list its hooks; but a hook's handle knows those that it stands beside.
    handles = node.register_hook(_nothing), node.register_prehook(_nothing)
    try:
        return any(len(handle.hooks_dict_ref()) > 1 for handle in handles)
    finally:
        for handle in handles:
            handle.remove()


def _nothing(*_: Any) -> None: ...


def add_scaled(grad: Tensor, total: Tensor, factor: Tensor) -> None:
    """grad += factor * total in one pass, rounded once to the dtype of grad; both (V, D), factor ()."""
    # On a CPU operands of several dtypes are cast first, whole: rows at a time, so that the casts stay small.
    rows = grad.shape[0] if grad.is_cuda or grad.dtype == total.dtype else CPU_SLAB
    for start in range(0, grad.shape[0], rows):
        part = slice(start, start + rows)
        grad[part].addcmul_(total[part], factor)
