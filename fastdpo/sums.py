"""Losses of sums of log-probs, one sum an answer: plain PyTorch, whatever the sums come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.groups import (
    KINDS,
    GroupInputs,
    best_first,
    check_inputs,
    check_kl,
    check_lengths,
    check_reduction,
    mismatched_kl,
)
from fastdpo.groups.checks import check_finite
from fastdpo.groups.tokens import check_count, loss_of_sums
from fastdpo.losses import resolve_losses
from fastdpo.types import LossOutput, accumulation_dtype


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    margins: Tensor | None = None,
    **loss_options: Any,
) -> LossOutput:
    """-logsigmoid(beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))).mean()

    That is the loss "sigmoid", DPO (Rafailov et al. 2023); `fastdpo.list_losses()` has the others. Plain PyTorch, in
    float32, or float64 where `chosen_logps` is.

    Args:
        chosen_logps, rejected_logps: (B,) sums of the completions' log-probs under the policy, in nats; for the loss
            "reward" the scores of a reward model.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference.
        beta: strength of the pull towards the reference, above 0.
        loss_type: the name of a loss of pairs, or several whose sum, weighted by `loss_weights`, is taken.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5].
        reduction: "mean" or "sum" over the pairs, or "none".
        chosen_lengths, rejected_lengths: (B,) completion tokens; only losses that divide by length need them.
        pair_weights: (B,) not below 0; "mean" is then sum(weights * losses) / sum(weights), so that a pair of weight 0
            might as well not be there.
        margins: (B,) for the loss "reward": by how much the chosen score should be above the rejected one.
        loss_options: of the losses (`fastdpo.list_losses()`): f_divergence_type, f_alpha_divergence_coef, discopop_tau,
            dpop_lambda, cpo_alpha, simpo_gamma, center_rewards_coefficient, reference_free. `ld_alpha` and
            `use_weighting` act on tokens: `loss` and `linear_loss` take them.

    Raises:
        ValueError: an unknown loss, an option that the loss cannot honour, a missing reference or length, references
            that are not finite (looked at on a CPU only), shapes that do not fit, B = 0.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **loss_options)
    check_reduction(reduction)
    if losses.data not in ("pairs", "scores"):
        name = "listwise_loss" if losses.data == "lists" else "unpaired_loss"
        raise ValueError(f"loss_type {losses.names} is a loss of {losses.data}, not of pairs; call fastdpo.{name}.")
    if losses.ld_alpha is not None or losses.use_weighting:
        name = "use_weighting" if losses.use_weighting else "ld_alpha"
        raise ValueError(f"{name} acts on single tokens, which sums have lost; call fastdpo.loss or linear_loss.")
    num_pairs = chosen_logps.shape[0] if chosen_logps.dim() == 1 else -1
    named = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    for name, tensor in named.items():
        if tensor is not None and tuple(tensor.shape) != (num_pairs,):
            expected = f"({num_pairs},), that of chosen_logps" if num_pairs >= 0 else "(B,): one sum a pair"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
        if tensor is not None and tensor.device != chosen_logps.device:
            raise ValueError(
                f"{name} is on {tensor.device} and chosen_logps on {chosen_logps.device}; move {name} there."
            )
        if tensor is not None and name.endswith("lengths"):
            check_lengths(name, tensor)
    check_count(num_pairs, losses)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        missing = "ref_chosen_logps" if ref_chosen_logps is None else "ref_rejected_logps"
        raise ValueError(f"{missing} is missing; give both references or neither.")
    refs = None
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        refs = (ref_chosen_logps, ref_rejected_logps)
    if losses.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(
            f"loss_type {losses.names} divides by the completions' lengths; give chosen_lengths and rejected_lengths."
        )
    lengths = None
    if chosen_lengths is not None and rejected_lengths is not None:
        lengths = torch.cat([chosen_lengths, rejected_lengths])
    # float16, if either is: the narrowest range that the gradient must fit in.
    narrow = torch.float16 if torch.float16 in (chosen_logps.dtype, rejected_logps.dtype) else chosen_logps.dtype
    inputs = GroupInputs(refs, pair_weights, margins=margins, grad_dtype=narrow)
    check_inputs(losses, inputs)
    dtype = accumulation_dtype(chosen_logps.dtype)
    sums = torch.stack([chosen_logps.to(dtype), rejected_logps.to(dtype)], dim=1).flatten()
    return loss_of_sums(KINDS[losses.data](losses, inputs, lengths, sums), sums, reduction)


def listwise_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    list_sizes: int | Sequence[int] | None = None,
    ranks: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "listwise",
    loss_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    **loss_options: Any,
) -> LossOutput:
    """-sum_k log_softmax(beta * (logps - ref_logps)[:, k:], dim=1)[:, 0], the mean over the lists

    Plackett-Luce over K ranked completions of one prompt (Rafailov et al. 2023, appendix A.3). Plain PyTorch.

    Args:
        logps: (B, K) sums of the completions' log-probs under the policy, in nats, best completion first; or (S,), list
            behind list, with `list_sizes`.
        ref_logps: the same under the reference.
        list_sizes: K of each list, as host integers (or one for all); for `logps` of shape (S,).
        ranks: of the shape of `logps`, where they do not come best first: 1 for the best, no two alike in a list.
        lengths: of the shape of `logps`, completion tokens; for losses that ask for lengths.
        pair_weights: (B,), one a list.
        The other arguments are those of `preference_loss`.

    Returns:
        LossOutput, whose `chosen_*` are the best completion's and whose `rejected_*` are means over the others.

    Raises:
        ValueError: as `preference_loss`; a list of fewer than two completions, ranks with ties.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, **loss_options)
    check_reduction(reduction)
    if losses.data != "lists":
        raise ValueError(f"loss_type {losses.names} is a loss of {losses.data}, not of lists.")
    if logps.dim() == 2:
        if list_sizes is not None:
            raise ValueError("list_sizes is for logps of shape (S,); logps of shape (B, K) says it itself.")
        list_sizes = logps.shape[1]
        if not logps.numel():
            raise ValueError(f"the batch holds no list: logps has shape {tuple(logps.shape)}; leave empty batches out.")
    elif logps.dim() != 1:
        raise ValueError(f"logps has shape {tuple(logps.shape)}; it must be (B, K), or (S,) with list_sizes.")
    for name, tensor in {"ref_logps": ref_logps, "ranks": ranks, "lengths": lengths}.items():
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(logps.shape)}, that of logps.")
        if tensor is not None and tensor.device != logps.device:
            raise ValueError(f"{name} is on {tensor.device} and logps on {logps.device}; move {name} there.")
    if losses.needs_lengths and lengths is None:
        raise ValueError(f"loss_type {losses.names} divides by the completions' lengths; give lengths.")
    if lengths is not None:
        check_lengths("lengths", lengths)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten()

    dtype = accumulation_dtype(logps.dtype)
    sums, refs, sizes = logps.to(dtype).flatten(), flat(ref_logps), flat(lengths)
    if ranks is not None:
        order = best_first(ranks.flatten(), list_sizes)
        sums = sums[order]
        refs, sizes = (None if tensor is None else tensor[order] for tensor in (refs, sizes))
    inputs = GroupInputs(refs, pair_weights, list_sizes, grad_dtype=logps.dtype)
    check_inputs(losses, inputs)
    return loss_of_sums(KINDS["lists"](losses, inputs, sizes, sums), sums, reduction)


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    desirable: Tensor,
    kl: Tensor | float | None = None,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "kto",
    loss_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    **loss_options: Any,
) -> LossOutput:
    """torch.where(desirable, 1 - sigmoid(beta * (d - kl)), 1 - sigmoid(beta * (kl - d))).mean(), d = logps - ref_logps

    KTO (Ethayarajh et al. 2024), with kl = (kl_logps - ref_kl_logps).mean().clamp(min=0), without gradient. Plain
    PyTorch.

    Args:
        logps: (B,) sums of the answers' log-probs under the policy, in nats.
        ref_logps: (B,) the same under the reference.
        desirable: (B,) bool.
        kl: the estimate of KL(pi || pi_ref), a number or scalar tensor (taken as 0 where it is below); or
        kl_logps, ref_kl_logps: (M,) sums of answers to other prompts than theirs, of which it is made.
        lengths: (B,) completion tokens; for losses that ask for lengths.
        pair_weights: (B,), one an answer.
        loss_options: desirable_weight, undesirable_weight.
        The other arguments are those of `preference_loss`.

    Returns:
        LossOutput, whose `chosen_*` are NaN where an answer is not desirable and whose `rejected_*` where it is.

    Raises:
        ValueError: as `preference_loss`; no estimate of the KL divergence where the loss needs it.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, **loss_options)
    check_reduction(reduction)
    if losses.data != "answers":
        raise ValueError(f"loss_type {losses.names} is a loss of {losses.data}, not of single answers.")
    if logps.dim() != 1:
        raise ValueError(f"logps has shape {tuple(logps.shape)}; it must be (B,): one sum an answer.")
    check_count(len(logps), losses)
    if losses.needs_lengths and (lengths is None or lengths.shape != logps.shape):
        raise ValueError(f"loss_type {losses.names} divides by the answers' lengths; give lengths, ({len(logps)},).")
    if lengths is not None:
        check_lengths("lengths", lengths)
    check_kl(kl)
    if (kl_logps is None) != (ref_kl_logps is None):
        raise ValueError("kl_logps and ref_kl_logps go together; give both or neither.")
    if kl_logps is not None and ref_kl_logps is not None:
        if kl is not None:
            raise ValueError("kl is given, and kl_logps, of which it would be made; leave one of them out.")
        if kl_logps.shape != ref_kl_logps.shape or kl_logps.dim() != 1 or not len(kl_logps):
            raise ValueError(
                f"kl_logps has shape {tuple(kl_logps.shape)} and ref_kl_logps {tuple(ref_kl_logps.shape)}; "
                "both must be (M,), M at least 1."
            )
        check_finite("ref_kl_logps", ref_kl_logps)
        kl = mismatched_kl(kl_logps, ref_kl_logps)
    if losses.needs_kl and kl is None:
        raise ValueError(
            f"kl is missing, and loss_type {losses.names} needs it; give kl, or kl_logps and ref_kl_logps."
        )
    inputs = GroupInputs(ref_logps, pair_weights, desirable=desirable, kl=kl, grad_dtype=logps.dtype)
    check_inputs(losses, inputs)
    sums = logps.to(accumulation_dtype(logps.dtype))
    return loss_of_sums(KINDS["answers"](losses, inputs, lengths, sums), sums, reduction)
