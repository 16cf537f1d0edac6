"""Per-token log-probs from hidden states, without the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.dispatch import LogitOptions, check_device, check_float, check_labels, row_kernels
from fastdpo.types import IGNORE_INDEX, TokenStats


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """token_logps(hidden @ weight.T + bias, labels), a tile of logits at a time.

    Args:
        hidden: (N, D) floating point.
        weight: (V, D), the head's weight; where its dtype differs from that of `hidden`, the product runs in the dtype
            of `hidden` (under autocast: in the autocast dtype).
        labels: (N,) integers in [0, V), or `ignore_index`.
        bias: (V,) or None.
        memory_budget: bytes that the tile of logits may take. Default: see `default_budget`.
        The other arguments are those of `token_logps`.

    Returns:
        (N,) float32 (float64 for float64 `hidden`), in nats. Gradients reach hidden, weight and bias; the gradient of
        the weight is accumulated in float32. FLOPs, with 2NDV for one product: 2NDV without a gradient, 4NDV where only
        `hidden` needs one, 8NDV where weight or bias need one (the backward forms the tiles again).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an option out of range.
    """
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    return linear_token_logps_with_stats(
        hidden, weight, labels, options, bias=bias, stats=False, memory_budget=memory_budget, impl=impl
    )[0]


def linear_token_logps_with_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LogitOptions,
    *,
    bias: Tensor | None = None,
    stats: bool = True,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, TokenStats | None]:
    """As `linear_token_logps`; with `stats`, also the token statistics of the same pass (zero where ignored)."""
    check_linear(hidden, weight, labels, bias)
    dtype = compute_dtype(hidden)
    # A cast outside the function: autograd brings the gradient back to the dtype of the tensor.
    hidden = hidden.to(dtype)
    kernels = row_kernels(impl, hidden)
    tile = tile_rows(weight, dtype, memory_budget)
    logps, rows = LinearTokenLogpsFunction.apply(hidden, weight, bias, labels.long(), options, stats, tile, kernels)
    return logps, None if rows is None else TokenStats.from_rows(rows)


def check_linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; it must be (N, D): one row a token.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; with hidden of shape {tuple(hidden.shape)} "
            f"it must be (V, {hidden.shape[1]})."
        )
    check_device("weight", weight, hidden, "hidden")
    check_labels(labels, hidden.shape[:1], hidden, "hidden")
    if bias is not None:
        check_float("bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight's {weight.shape[0]} rows need "
                             f"({weight.shape[0]},).")  # fmt: skip
        check_device("bias", bias, hidden, "hidden")


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's products: that of autocast where it is on, else that of `hidden`."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def default_budget(device: torch.device) -> int:
    """Bytes for the tile: an eighth of the free memory of a GPU (at least 256 MiB); 64 MiB on a CPU.

    On a CPU a tile of a few hundred rows already runs the products at full speed, and a larger one only leaves the
    caches.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What PyTorch has reserved but not handed out counts as free, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(free // 8, 1 << 28)
    return 1 << 26


def tile_rows(weight: Tensor, dtype: torch.dtype, memory_budget: int | None) -> int:
    """How many rows of logits (C, V) the budget holds; at least one, at most 16384."""
    if memory_budget is None:
        memory_budget = default_budget(weight.device)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget!r}; it must be a number of bytes above 0, or None.")
    return max(1, min(16384, memory_budget // max(1, weight.shape[0] * dtype.itemsize)))


class LinearTokenLogpsFunction(torch.autograd.Function):
    """Keeps u = dlogp/dhidden (N, D) where only `hidden` needs a gradient; else hidden and lse, and tiles again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LogitOptions,
        stats: bool, tile: int, kernels: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        from fastdpo_kernels import linear_logprobs as kernel

        head = make_head(weight, bias, hidden.dtype, options, kernels)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.frozen_head = needs_hidden and not (needs_weight or needs_bias)
        if ctx.frozen_head:
            logps, u, all_stats = kernel.fwd_with_hidden_grad(hidden, labels, head, tile=tile, stats=stats)
            ctx.save_for_backward(u)
        else:
            logps, lse, all_stats = kernel.fwd(hidden, labels, head, tile=tile, stats=stats)
            ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options, ctx.tile, ctx.kernels = options, tile, kernels
        if all_stats is not None:
            ctx.mark_non_differentiable(all_stats)
        return logps, all_stats

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        from fastdpo_kernels import linear_logprobs as kernel

        if ctx.frozen_head:
            (u,) = ctx.saved_tensors
            return ((u * grad_logps.unsqueeze(1)).to(u.dtype), *[None] * 7)
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        head = make_head(weight, bias, hidden.dtype, ctx.options, ctx.kernels)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads = kernel.HeadGrads.zeros(head, needs_weight, needs_bias)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        kernel.bwd(hidden, labels, lse, grad_logps, head, grads, tile=ctx.tile, dhidden=dhidden)
        dweight = None if grads.weight is None else grads.weight.to(weight.dtype)
        dbias = None if grads.bias is None or bias is None else grads.bias.to(bias.dtype)
        return (dhidden, dweight, dbias, *[None] * 5)


def make_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, options: LogitOptions, kernels: Any) -> Any:
    """The kernels' view of a head, its weight and bias in the dtype of the products."""
    from fastdpo_kernels.linear_logprobs import Head

    return Head(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), options.kwargs(), kernels)
