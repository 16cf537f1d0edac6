"""The gradient of a head added straight to `.grad`, where nobody would see a difference; before backward on request.

Autograd takes from a backward a gradient of its own for each tensor and adds it to what `.grad` holds. Of a head that
copy can be gigabytes, and a pass over them; adding to `.grad` at once also rounds once instead of twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

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
    if grad is None or _why_not(leaf, grad, node) is not None or not _is_accumulated(node):
        return None
    return cast(Tensor, grad)


def _why_not(leaf: Tensor, grad: Tensor, node: Any) -> str | None:
    """Why autograd must add to the `.grad` of a leaf, or None."""
    if type(leaf) not in (Tensor, torch.nn.Parameter) or type(grad) is not Tensor:
        return f"it is a {type(leaf).__name__} with a gradient of type {type(grad).__name__}"
    if grad.layout != torch.strided or not grad.is_contiguous() or grad.requires_grad:
        return "its gradient is not contiguous, or part of a graph"
    if grad.dtype not in (leaf.dtype, torch.float32):
        return f"it is {leaf.dtype} and its gradient {grad.dtype}"
    if dist.is_available() and dist.is_initialized():  # DistributedDataParallel's hooks cannot be seen from Python
        return "torch.distributed is initialized, and other processes may be to have a share of its gradient"
    if leaf.is_cuda and torch.cuda.current_stream(leaf.device) != torch.cuda.default_stream(leaf.device):
        return "this is not the default stream, and autograd would let streams wait for each other"
    return "a hook waits for its gradient" if _has_hooks(leaf, node) else None


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


_WAITS = "_fastdpo_waits_for_backward"  # an attribute of a `.grad`: a new one, after zero_grad, has none
_CLOSE = 1e-3  # how far the gradient that a backward brings may be from what was said, as a share of it


class GradAhead:
    """`.grad` of a head's weight while a forward adds to it what only the backward after it would give.

    Raises:
        ValueError: something else must have a part in that gradient.
        RuntimeError: the forward before this one had no backward.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """scale (): the gradient that the backward will bring for the sum that the forward gives."""
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        why_not = _why_not(weight, grad, get_gradient_edge(weight).node)
        if why_not is not None:
            raise ValueError(f"head_grad_scale cannot add to the gradient of weight: {why_not}; leave it out.")
        if getattr(grad, _WAITS, False):
            raise RuntimeError(
                "weight.grad holds the head's gradient of a linear_loss with head_grad_scale that had no backward; "
                "each needs its own before the next, and none may be checkpointed. Set weight.grad = None to go on."
            )
        weight.grad = grad
        setattr(grad, _WAITS, True)
        self._weight, self.scale, self.grad, self._version = weight, scale, grad, -1

    def added(self) -> None:
        """The forward is done."""
        self._version = self.grad._version

    def settle(self, grad_loss: Tensor) -> None:
        """That the backward is the one that was announced.

        Raises:
            RuntimeError: `.grad` is not what it was; on a CPU also another gradient than `scale`. On a GPU, where
                looking would wait for it, that makes the first row NaN.
        """
        if self._weight.grad is not self.grad or self.grad._version != self._version:
            raise RuntimeError(
                "weight.grad has changed since linear_loss with head_grad_scale added to it; call zero_grad before the "
                "forward pass, not between it and backward."
            )
        setattr(self.grad, _WAITS, False)
        wrong = ~((grad_loss - self.scale).abs() <= _CLOSE * self.scale.abs())
        if not wrong.is_cuda and wrong:
            raise RuntimeError(
                f"by head_grad_scale, backward would bring {float(self.scale):.6g} for the sum of the losses, and it "
                f"brings {float(grad_loss):.6g}; weight.grad holds the head's gradient for the former."
            )
        _spoil(self.grad, wrong)


def _spoil(grad: Tensor, wrong: Tensor) -> None:
    """Makes the first row NaN if `wrong` ()."""
    grad[:1].masked_fill_(wrong, torch.nan)
