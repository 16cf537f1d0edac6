"""Losses for a training loop of one's own: from logits, or from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.groups import KINDS, KL, GroupInputs, Groups, RefLogps, check_inputs, check_kl, check_reduction
from fastdpo.groups.checks import known_on_host, were_looked_at
from fastdpo.groups.tokens import (
    check_rows,
    loss_of_tokens,
    mean_stats,
    own_sequences,
    packed_sequences,
    padded_sequences,
    rows_by_group,
    sequence_lengths,
    with_kl,
)
from fastdpo.losses import WeightedLosses, resolve_losses
from fastdpo.ops import (
    fused_group_loss,
    is_fused,
    linear_token_logps,
    linear_token_logps_with_stats,
    token_logps,
    token_logps_with_stats,
)
from fastdpo.ops.budget import resolve_budget
from fastdpo.ops.dispatch import LogitOptions, check_device, check_integers, check_linear, compute_dtype
from fastdpo.ops.into_grad import GradAhead
from fastdpo.ops.linear_logps import needed_gradients
from fastdpo.types import IGNORE_INDEX, LossOutput, TokenStats, accumulation_dtype

__all__ = [
    "linear_loss",
    "linear_token_logps",
    "loss",
    "token_logps",
]


def loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: RefLogps = None,
    *,
    sequence_ids: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    list_sizes: int | Sequence[int] | None = None,
    desirable: Tensor | None = None,
    kl: KL = None,
    mean_chosen_length: Tensor | float | None = None,
    num_sequences: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    token_metrics: bool = True,
    impl: str = "auto",
    **loss_options: Any,
) -> LossOutput:
    """preference_loss of the completions' sums of token_logps(logits, labels).

    S sequences, in two forms of input:
        padded: logits (S, T, V), labels (S, T), unshifted as in transformers (the token at position t is predicted by
            the logits at t - 1), `ignore_index` on prompt and padding.
        packed: logits (N, V), labels (N,) already aligned, `sequence_ids` (N,) in [0, S); the rows of a sequence come
            in its order.
    The sequences are, by the data that the loss is a function of (`fastdpo.list_losses()`):
        pairs: S = 2B, chosen i is sequence i, rejected i is B + i.
        lists: those of prompt 0, best first, then those of prompt 1, ...; `list_sizes` says how many each has.
        answers: `desirable` says which are; where as many sequences again follow, those are answers to other prompts,
            of which the KL divergence is estimated (`kto`), without gradient.

    Args:
        ref_logps: (S,), in the order of the sequences; for pairs also (ref_chosen (B,), ref_rejected (B,)). With
            `ld_alpha` they must be summed with it, too (`fastdpo.sequence_logps`, `reference_columns`).
        pair_weights: (B,), a weight for each pair, list or answer: see `preference_loss`.
        list_sizes: of lists: K of each, as host integers, or one for all.
        desirable: of answers: (B,) bool.
        kl: of answers: the KL estimate, where it comes from elsewhere; or a function that makes of the estimate of
            these answers another, as the mean over all processes.
        mean_chosen_length: of a batch in parts, for losses with an NLL (`sft`, `cpo`, `orpo`): mean tokens of the
            chosen answers of the whole batch. Default: of this part.
        num_sequences: S of packed input, where neither references nor sizes tell it: without, the ids are looked at,
            which waits for the device.
        inplace_backward: lets the backward write the gradient over `logits`; see `token_logps`.
        token_metrics: whether the same pass also gives entropy, mean logits and token accuracy for `.metrics()`.
        loss_options: as `preference_loss`, and `ld_alpha` (LD-DPO, arXiv:2409.06411: tokens beyond the length of the
            pair's shorter answer weigh so much) and `use_weighting` (WPO, arXiv:2406.11827: a pair weighs
            exp(mean_t(logp_t - log sum_v p_v^2)) of both answers, without gradient).
        The other arguments are those of `preference_loss` and `token_logps`.

    Returns:
        LossOutput; gradients reach `logits` through `.loss` and `.losses`.

    Raises:
        ValueError: arguments that do not fit; on a CPU also a label outside [0, V) that is not `ignore_index`, with its
            place. On a GPU, where looking would wait for the device, and under torch.compile, its pair is NaN.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **loss_options)
    check_reduction(reduction)
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    inputs = GroupInputs(
        ref_logps, pair_weights, list_sizes, desirable, kl, mean_chosen_length=mean_chosen_length,
        num_sequences=num_sequences, grad_dtype=logits.dtype,
    )  # fmt: skip
    _check_token_inputs(losses, inputs)
    if sequence_ids is None:
        count = padded_sequences("logits", logits, labels, losses)
        _check_labels(labels, logits.shape[-1], ignore_index, first=1)
        # Shifting the labels leaves the logits where they are: the last position has no target and is not read.
        labels = torch.cat([labels[:, 1:], labels.new_full((count, 1), ignore_index)], dim=1)
        sequence_ids = torch.arange(count, device=logits.device).unsqueeze(1).expand_as(labels)
    else:
        count, sequence_ids = _packed(inputs, losses, sequence_ids, logits, "logits")
        _check_labels(labels, logits.shape[-1], ignore_index)
    logps, stats = token_logps_with_stats(
        logits, labels, options, stats=token_metrics or losses.use_weighting, inplace_backward=inplace_backward,
        impl=impl,
    )  # fmt: skip
    logps, labels, sequence_ids = logps.reshape(-1), labels.reshape(-1), sequence_ids.reshape(-1)
    if stats is not None:
        stats = TokenStats(*(values.reshape(-1) for values in vars(stats).values()))
    own = own_sequences(inputs, losses, count)
    if losses.data == "answers":
        is_own = sequence_ids < own
        rest = (torch.where(is_own, 0, logps), sequence_ids.clamp(min=own)) if count > own else (None, None)
        inputs = with_kl(inputs, losses, own, *rest)
        # Answers to other prompts have had their part.
        logps, labels = torch.where(is_own, logps, 0), torch.where(is_own, labels, ignore_index)
        sequence_ids = sequence_ids.clamp(max=own - 1)
    groups = _groups(losses, inputs, labels, sequence_ids, own, logps.dtype, ignore_index)
    return loss_of_tokens(
        groups, logps, stats, labels, sequence_ids, reduction=reduction, ignore_index=ignore_index,
        token_metrics=token_metrics,
    )  # fmt: skip


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: RefLogps = None,
    *,
    bias: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    tokens_per_pair: Sequence[int] | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    list_sizes: int | Sequence[int] | None = None,
    desirable: Tensor | None = None,
    kl: KL = None,
    mean_chosen_length: Tensor | float | None = None,
    num_sequences: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    head_grad_scale: float | None = None,
    token_metrics: bool = True,
    impl: str = "auto",
    **loss_options: Any,
) -> LossOutput:
    """loss(hidden @ weight.T + bias, labels, ...), as much of the logits at a time as the memory budget holds.

    What is done follows from what needs a gradient, the budget and the loss; with 2NDV FLOPs for one product:

        nothing needs one                            2NDV         one tile of logits
        hidden alone (a frozen head)                 4NDV         one tile, and dlogp/dhidden (N, D)
        weight or bias, all logits in the budget     6NDV         the logits
        weight or bias, a loss per pair              6NDV         one tile; the gradient is formed in the forward pass,
                                                                  a chunk of pairs at a time (8NDV for a pair larger
                                                                  than the budget)
        weight or bias, any other loss, or           (8 - 2f)NDV  a share f of the logits
        reduction "none", or under torch.compile

    Answers to other prompts, of which `kto` estimates the KL divergence, cost 2NDV. With reduction "mean" or "sum" only
    `.loss` carries a gradient, `.losses` does not.

    Args:
        hidden: padded (S, T, D) or packed (N, D), as `logits` in `loss`.
        weight: (V, D); bias: (V,) or None.
        tokens_per_pair: packed only: how many rows belong to each pair (list, answer), as host integers, where the rows
            of pair 0 come first, then those of pair 1, and so on. Saves a sort and a wait for the device. Rows of
            answers to other prompts come last, and are not counted here.
        head_dtype, memory_budget: as in `linear_token_logps`.
        head_grad_scale: what `backward` will bring as the gradient of `.loss`, where that is known before: 1.0 for
            `.loss.backward()`, 1 / 8 where it is divided by 8 accumulation steps. For a head in float32 whose gradient
            is formed in the forward pass this saves its sum, 4VD bytes: the tiles are added to `weight.grad` in the
            forward pass already. In exchange each call needs its one `backward`, with that gradient, before the next
            call and before `zero_grad`, and none may be checkpointed. Not for float16, nor under torch.distributed.
        The other arguments are those of `loss`.

    Raises:
        ValueError: as `loss` and `linear_token_logps`. RuntimeError: a second backward where the gradient was formed in
            the forward pass; a backward other than `head_grad_scale` announced (on a GPU, where looking would wait for
            it, another gradient makes the first row of `weight.grad` NaN).
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **loss_options)
    check_reduction(reduction)
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    inputs = GroupInputs(
        ref_logps, pair_weights, list_sizes, desirable, kl, mean_chosen_length=mean_chosen_length,
        num_sequences=num_sequences, grad_dtype=hidden.dtype,
    )  # fmt: skip
    _check_token_inputs(losses, inputs)
    if sequence_ids is None:
        count = padded_sequences("hidden", hidden, labels, losses)
        _check_labels(labels, weight.shape[0], ignore_index, first=1)
        hidden, labels, sequence_ids = _targets_of_padded(hidden, labels, ignore_index)
        tokens_per_pair = None
    else:
        count, sequence_ids = _packed(inputs, losses, sequence_ids, hidden, "hidden")
        _check_labels(labels, weight.shape[0], ignore_index)
    check_linear(hidden, weight, labels, bias)
    _check_scale(head_grad_scale, weight, compute_dtype(hidden, head_dtype))
    dtype, training = compute_dtype(hidden, head_dtype), any(needed_gradients(hidden, weight, bias))
    budget = resolve_budget(memory_budget, hidden.device, weight.shape[0], dtype, training=training)
    head: dict[str, Any] = {"bias": bias, "head_dtype": head_dtype, "memory_budget": budget, "impl": impl}
    own = own_sequences(inputs, losses, count)
    if losses.data == "answers":
        rest: tuple[Tensor | None, Tensor | None] = (None, None)
        if count > own:
            mine, others = _split_rows(sequence_ids, own, tokens_per_pair)
            if losses.needs_kl and (kl is None or callable(kl)):
                with torch.no_grad():
                    logps, _ = linear_token_logps_with_stats(hidden[others], weight, labels[others], options, **head)
                rest = logps, sequence_ids[others]
            hidden, labels, sequence_ids = hidden[mine], labels[mine], sequence_ids[mine]
        inputs = with_kl(inputs, losses, own, *rest)
    groups = _groups(losses, inputs, labels, sequence_ids, own, hidden.dtype, ignore_index)
    if tokens_per_pair is not None:
        check_rows(tokens_per_pair, groups, sequence_ids)
    stats = token_metrics or losses.use_weighting
    per_pair = reduction != "none" and losses.per_pair
    if not (per_pair and is_fused(hidden, weight, bias, dtype, budget)):
        logps, token_stats = linear_token_logps_with_stats(hidden, weight, labels, options, stats=stats, **head)
        output = loss_of_tokens(
            groups, logps, token_stats, labels, sequence_ids, reduction=reduction, ignore_index=ignore_index,
            token_metrics=token_metrics,
        )  # fmt: skip
        # As where the gradient is formed in the forward: which way was taken must not show.
        return output if reduction == "none" else replace(output, losses=output.losses.detach())
    if tokens_per_pair is None:
        order, tokens_per_pair = rows_by_group(groups, sequence_ids)
        hidden, labels, sequence_ids = hidden[order], labels[order], sequence_ids[order]
    ahead = None
    if head_grad_scale is not None and weight.requires_grad:
        one = torch.ones((), dtype=accumulation_dtype(dtype), device=hidden.device)
        ahead = GradAhead(weight, head_grad_scale * groups.reduced(one, reduction))
    total, each, sums, token_stats = fused_group_loss(
        hidden.to(dtype), weight, labels,
        groups.slot_ids(sequence_ids, labels != ignore_index), tokens_per_pair, groups.slots_per_group, groups,
        options, bias=bias, stats=stats, sum_p2=losses.use_weighting, memory_budget=budget, ahead=ahead, impl=impl,
    )  # fmt: skip
    tokens = mean_stats(token_stats, labels, sequence_ids, groups, ignore_index) if token_metrics else None
    return groups.output(each, groups.reduced(total, reduction), sums, tokens)


def _targets_of_padded(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), labels (N,), sequence ids (N,) of the positions with a target; a wait for the device.

    torch.compile cannot know N: there all positions but the last are taken.
    """
    shifted = labels[:, 1:]
    if torch.compiler.is_compiling():
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(shifted)
        return hidden[:, :-1].flatten(0, 1), shifted.flatten(), rows.flatten()
    rows, positions = (shifted != ignore_index).nonzero(as_tuple=True)
    return hidden[rows, positions], shifted[rows, positions], rows


def _split_rows(sequence_ids: Tensor, own: int, tokens_per_pair: Sequence[int] | None) -> tuple[Any, Any]:
    """Indices of the rows of answers, and of those of answers to other prompts; without counts, a wait."""
    if tokens_per_pair is not None:
        return slice(0, sum(tokens_per_pair)), slice(sum(tokens_per_pair), None)
    is_own = sequence_ids < own
    return is_own.nonzero().squeeze(1), (~is_own).nonzero().squeeze(1)


def _groups(
    losses: WeightedLosses, inputs: GroupInputs, labels: Tensor, sequence_ids: Tensor, num_sequences: int,
    dtype: torch.dtype, ignore_index: int,
) -> Groups:  # fmt: skip
    lengths = sequence_lengths(labels, sequence_ids, num_sequences, ignore_index)
    like = torch.zeros(num_sequences, dtype=accumulation_dtype(dtype), device=labels.device)
    return KINDS[losses.data](losses, inputs, lengths, like)


def _packed(
    inputs: GroupInputs, losses: WeightedLosses, sequence_ids: Tensor, tensor: Tensor, name: str
) -> tuple[int, Tensor]:
    check_integers("sequence_ids", sequence_ids)
    check_device("sequence_ids", sequence_ids, tensor, name)
    return packed_sequences(inputs, losses, sequence_ids, tensor, name), sequence_ids.long()


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int, first: int = 0) -> None:
    """That labels on a CPU are tokens; on a GPU, where looking would wait for the device, others give NaN.

    first: the first position that is a target

    Raises:
        ValueError: the first label outside [0, V) that is not `ignore_index`, and where it stands.
    """
    if not known_on_host(labels) or were_looked_at():
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    wrong[..., :first] = False
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels{place} is {int(labels[tuple(place)])}, and there are {vocabulary} tokens; labels must lie in "
            f"[0, {vocabulary}) or be ignore_index={ignore_index}."
        )


def _check_scale(head_grad_scale: float | None, weight: Tensor, dtype: torch.dtype) -> None:
    if head_grad_scale is None:
        return
    if isinstance(head_grad_scale, bool) or not isinstance(head_grad_scale, int | float) or head_grad_scale == 0:
        raise ValueError(f"head_grad_scale is {head_grad_scale!r}; it must be a number other than 0, or None.")
    if dtype == torch.float16:
        raise ValueError(
            "head_grad_scale is for products in bfloat16 and float32: the loss scale that float16 needs is not known "
            "before the backward; leave it out."
        )
    if weight.requires_grad and not (weight.is_leaf and weight.dtype in (torch.float32, torch.float64)):
        raise ValueError(
            "head_grad_scale has the head's gradient summed up in weight.grad, so weight must be a leaf in float32 or "
            f"float64, and this one is {weight.dtype}{'' if weight.is_leaf else ' and no leaf'}; leave it out."
        )


def _check_token_inputs(losses: WeightedLosses, inputs: GroupInputs) -> None:
    if losses.data == "scores":
        raise ValueError(
            f"loss_type {losses.names} is a loss of a reward model's scores, not of log-probs; call "
            "fastdpo.preference_loss with the scores."
        )
    check_inputs(losses, inputs)
    check_kl(inputs.kl)
