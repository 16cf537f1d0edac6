"""Keys and values gathered for attention over shared prefixes, with a gradient that is the same every time.

gather_kv_fwd, gather_kv_bwd (kernels) <- the operators fastdpo::gather_kv and gather_kv_backward <- `gather_kv`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdpo.ops.dispatch import check_device, check_float, check_impl, check_integers, gather_kernels
from fastdpo.ops.library import define, first_derivative_only, refuse_transforms


def gather_kv(
    key: Tensor, value: Tensor, index: Tensor, copies: Tensor, offsets: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(key.index_select(0, index), value.index_select(0, index)), and a backward that gathers, too.

    The gradient of row t is the sum of the gradients of its copies, in float32 (float64 for float64), in the order of
    `copies`, rounded once. So it is bitwise the same every time, where that of `index_select` on a GPU adds in the
    dtype of the gradients and in no fixed order. One read and one write each way, of keys and values together. An
    operator of torch.library: `torch.compile(fullgraph=True)` traces through it. It has no second derivative.

    Args:
        key: (T, H, d) bfloat16, float16, float32 or float64, any strides, on CPU or GPU.
        value: (T, H, dv), of the same dtype.
        index: (K,) integers in [0, T): the row of each gathered key.
        copies: (K,) integers in [0, K), and
        offsets: (T + 1,) integers, the inverse of `index`: copies[offsets[t] : offsets[t + 1]] are the gathered keys of
            row t, none for a row that is not in `index`. That is a stable argsort of `index`, and its bincount,
            cumulated.
        impl: "auto" (Triton on a GPU, eager PyTorch elsewhere), "triton" or "eager".

    Returns:
        (K, H, d) and (K, H, dv), contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. What stands in `index`, `copies` and `offsets` is not
            checked: on a GPU that would wait for the device.
    """
    _check(key, value, index, copies, offsets)
    check_impl(impl)
    refuse_transforms("gather_kv", key, value)
    gathered_key, gathered_value = _forward_op(key, value, index.long(), copies.long(), offsets.long(), impl)
    return gathered_key, gathered_value


def _check(key: Tensor, value: Tensor, index: Tensor, copies: Tensor, offsets: Tensor) -> None:
    check_float("key", key)
    check_float("value", value)
    if key.dim() != 3 or 0 in key.shape[1:]:
        raise ValueError(
            f"key has shape {tuple(key.shape)}; it must be (T, H, d) with at least one head and d above 0."
        )
    if value.dim() != 3 or value.shape[:2] != key.shape[:2] or value.shape[2] == 0:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; with key of shape {tuple(key.shape)} it must be "
            f"({key.shape[0]}, {key.shape[1]}, dv) with dv above 0."
        )
    if value.dtype != key.dtype:
        raise ValueError(f"value is {value.dtype} and key {key.dtype}; cast one of them with .to(dtype).")
    check_device("value", value, key, "key")
    for name, tensor in (("index", index), ("copies", copies), ("offsets", offsets)):
        check_integers(name, tensor)
        check_device(name, tensor, key, "key")
    if index.dim() != 1:
        raise ValueError(f"index has shape {tuple(index.shape)}; it must be (K,), the row of each gathered key.")
    if copies.shape != index.shape:
        raise ValueError(f"copies has shape {tuple(copies.shape)}; index has {index.shape[0]} entries, and so must it.")
    if offsets.dim() != 1 or offsets.shape[0] != key.shape[0] + 1:
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; the {key.shape[0]} rows of key need ({key.shape[0] + 1},)."
        )


def _forward(
    key: Tensor, value: Tensor, index: Tensor, copies: Tensor, offsets: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return gather_kernels(impl, key).gather_kv_fwd(key, value, index)


def _backward(
    grad_key: Tensor, grad_value: Tensor, copies: Tensor, offsets: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return gather_kernels(impl, grad_key).gather_kv_bwd(grad_key, grad_value, copies, offsets)


def _rows_like(key: Tensor, value: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    return key.new_empty((num_rows, *key.shape[1:])), value.new_empty((num_rows, *value.shape[1:]))


_forward_op = define("gather_kv", _forward)
_forward_op.register_fake(lambda key, value, index, copies, offsets, impl: _rows_like(key, value, index.shape[0]))
_backward_op = define("gather_kv_backward", _backward)
_backward_op.register_fake(
    lambda grad_key, grad_value, copies, offsets, impl: _rows_like(grad_key, grad_value, offsets.shape[0] - 1)
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, _, copies, offsets, ctx.impl = inputs
    ctx.mark_non_differentiable(*(out for out, needed in zip(output, ctx.needs_input_grad, strict=False) if not needed))
    ctx.save_for_backward(copies, offsets)


@first_derivative_only("gather_kv")
def _autograd(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_op(grad_key, grad_value, *ctx.saved_tensors, ctx.impl)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 4


_forward_op.register_autograd(_autograd, setup_context=_setup_context)
