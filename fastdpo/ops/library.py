"""Definition of the operators in torch.library: opaque to torch.compile, transparent to the FLOP counter.

Their derivative is one backward pass. What autograd could ask for besides raises: left to itself it takes a tangent or
a second derivative that nobody has defined for zero.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_OPERATORS: list[tuple[Any, Callable[..., Any]]] = []
_seen = False


def define(name: str, function: Callable[..., Any], *, mutates: tuple[str, ...] = ()) -> Any:
    """The operator fastdpo::<name> with `function` as its implementation on every device."""
    operator = torch.library.custom_op(f"fastdpo::{name}", function, mutates_args=mutates)
    _OPERATORS.append((operator, function))
    return operator


def see_products() -> None:
    """Lets `torch.utils.flop_counter.FlopCounterMode` count the products inside the operators, not a formula of ours.

    It has to be called before an operator is. Until someone imports that module there is nothing to do; importing it
    here would bring triton along.
    """
    global _seen
    if torch.compiler.is_compiling() or _seen:  # in this order, or a compiled graph would depend on what was seen
        return
    counter = sys.modules.get("torch.utils.flop_counter")
    mode_class = getattr(counter, "_FlopCounterMode", None)
    if mode_class is None:
        return
    _seen = True
    for operator, function in _OPERATORS:
        torch.library.register_torch_dispatch(operator, mode_class, _counted(function))


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def rule(mode: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with mode:
            return function(*args, **kwargs)

    return rule


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """That nothing but `backward` is to differentiate what `name` makes of the tensors; costs next to nothing.

    Raises:
        NotImplementedError: a tensor carries a tangent, or a transform of torch.func is to differentiate by it.
    """
    if forward_ad._current_level >= 0 and any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad); "
            "differentiate it with backward() or torch.autograd.grad."
        )
    if in_transform() and any(tensor is not None and _is_tracked(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{name} is not implemented under torch.func's grad, vjp, jacrev and hessian; "
            "differentiate it with backward() or torch.autograd.grad."
        )


def _has_tangent(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True  # which of the tensors have one is not to be seen from here
    return forward_ad.unpack_dual(tensor).tangent is not None


def _is_tracked(tensor: Tensor) -> bool:
    """Whether a transform that differentiates has wrapped the tensor, under others or not."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def in_transform() -> bool:
    """Whether a transform of torch.func is running, vmap for one."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for a sample of torch.func.vmap, whose values nothing may depend on."""
    return in_transform() and torch._C._functorch.is_batchedtensor(tensor)


def requires_grad(tensor: Tensor) -> bool:
    """Of the tensor that vmap may have wrapped, too: what it wraps does not say so itself."""
    while in_transform() and not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def first_derivative_only(
    name: str, *, connected: bool = True
) -> Callable[[Callable[..., tuple[Tensor | None, ...]]], Callable[..., tuple[Tensor | None, ...]]]:
    """Of a backward: the gradients that it gives raise NotImplementedError where they are differentiated again.

    torch's own `once_differentiable` does so only where what comes in requires a gradient: of a plain sum it takes the
    gradient for a constant.

    Args:
        connected: whether the saved tensors lead back to all inputs. If they do not, a graph of the backward
            (create_graph=True) is refused at once, for asked for one input it would not be seen to depend on it.
    """

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            if not connected:
                raise NotImplementedError(_second(name))
            sources = [each for each in (*ctx.saved_tensors, *grads) if each is not None and each.requires_grad]
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not sources:
                return results
            return tuple(None if each is None else _Once.apply(name, each, *sources) for each in results)

        return wrapper

    return decorate


def _second(name: str) -> str:
    return f"{name} has no second derivative; call backward() or torch.autograd.grad without create_graph=True."


class _Once(torch.autograd.Function):
    """A gradient that depends on tensors in a way that is not implemented."""

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_second(ctx.name))
