"""Losses for a training loop of one's own: from logits, from hidden states, or from log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses import PairTerms, WeightedLosses, resolve_losses
from fastdpo.ops import (
    fused_pair_loss,
    is_fused,
    linear_token_logps,
    linear_token_logps_with_stats,
    token_logps,
    token_logps_with_stats,
)
from fastdpo.ops.budget import resolve_budget
from fastdpo.ops.dispatch import LogitOptions, check_device, check_integers, check_linear, compute_dtype
from fastdpo.types import IGNORE_INDEX, LossOutput, TokenMetrics, TokenStats, accumulation_dtype

__all__ = ["linear_loss", "linear_token_logps", "loss", "preference_loss", "token_logps"]

RefLogps = Tensor | tuple[Tensor, Tensor] | None
_REDUCTIONS = ("mean", "sum", "none")


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
    **loss_options: Any,
) -> LossOutput:
    """-logsigmoid(beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))).mean()

    That is the loss "sigmoid", DPO (Rafailov et al. 2023); `fastdpo.losses.REGISTRY` has the others. Plain PyTorch.

    Args:
        chosen_logps, rejected_logps: (B,) sums of the completions' log-probs under the policy, in nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference.
        beta: strength of the pull towards the reference, above 0.
        loss_type: the name of a loss, or several whose sum, weighted by `loss_weights`, is taken.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5].
        reduction: "mean" or "sum" over the pairs, or "none".
        chosen_lengths, rejected_lengths: (B,) completion tokens; only losses that divide by length need them.

    Raises:
        ValueError: an unknown loss, an option that the loss cannot honour, a missing reference or length, shapes that
            do not fit.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **loss_options)
    _check_reduction(reduction)
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
    _check_pairs(num_pairs)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        missing = "ref_chosen_logps" if ref_chosen_logps is None else "ref_rejected_logps"
        raise ValueError(f"{missing} is missing; give both references or neither.")
    refs = None
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        refs = (ref_chosen_logps, ref_rejected_logps)
    ref_c, ref_r = _reference(refs, losses, chosen_logps)
    if losses.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(
            f"loss_type {loss_type!r} divides by the completions' lengths; give chosen_lengths and rejected_lengths."
        )
    terms = PairTerms(chosen_logps, rejected_logps, ref_c, ref_r, chosen_lengths, rejected_lengths)
    return _output(losses(terms), terms, beta, reduction)


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

    Two forms of input, B pairs:
        padded: logits (2B, T, V), labels (2B, T), chosen rows first, labels unshifted as in transformers (the token at
            position t is predicted by the logits at t - 1), `ignore_index` on prompt and padding.
        packed: logits (N, V), labels (N,) already aligned, `sequence_ids` (N,) in [0, 2B): chosen i is i, rejected i is
            B + i. B is then half the length of `ref_logps`.

    Args:
        ref_logps: (2B,), chosen first, or the pair (ref_chosen (B,), ref_rejected (B,)).
        inplace_backward: lets the backward write the gradient over `logits`; see `token_logps`.
        token_metrics: whether the same pass also gives entropy, mean logits and token accuracy for `.metrics()`.
        The other arguments are those of `preference_loss` and `token_logps`.

    Returns:
        LossOutput; gradients reach `logits` through `.loss` and `.losses`.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **loss_options)
    _check_reduction(reduction)
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    if sequence_ids is None:
        num_sequences = _padded_sequences("logits", logits, labels)
        # Shifting the labels leaves the logits where they are: the last position has no target and is not read.
        labels = torch.cat([labels[:, 1:], labels.new_full((num_sequences, 1), ignore_index)], dim=1)
        sequence_ids = torch.arange(num_sequences, device=logits.device).unsqueeze(1).expand_as(labels)
    else:
        if logits.dim() != 2:
            raise ValueError(f"logits has shape {tuple(logits.shape)}; with sequence_ids it must be (N, V).")
        num_sequences, sequence_ids = _packed_sequences(ref_logps, sequence_ids, logits, "logits")
    logps, stats = token_logps_with_stats(
        logits, labels, options, stats=token_metrics, inplace_backward=inplace_backward, impl=impl
    )
    return _from_tokens(logps, stats, labels, sequence_ids, num_sequences, ref_logps, losses, beta, reduction,
                        ignore_index)  # fmt: skip


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
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
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

    With reduction "mean" or "sum" only `.loss` carries a gradient, `.losses` does not.

    Args:
        hidden: padded (2B, T, D) or packed (N, D), as `logits` in `loss`.
        weight: (V, D); bias: (V,) or None.
        tokens_per_pair: packed only: how many rows belong to each pair, as host integers, where the rows of pair 0 come
            first, then those of pair 1, and so on. Saves a sort and a wait for the device.
        head_dtype, memory_budget: as in `linear_token_logps`.
        The other arguments are those of `loss`.

    Raises:
        ValueError: as `loss` and `linear_token_logps`. RuntimeError: a second backward where the gradient was formed in
            the forward pass.
    """
    losses = resolve_losses(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **loss_options)
    _check_reduction(reduction)
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    if sequence_ids is None:
        num_sequences = _padded_sequences("hidden", hidden, labels)
        hidden, labels, sequence_ids = _targets_of_padded(hidden, labels, ignore_index)
        tokens_per_pair = None
    else:
        if hidden.dim() != 2:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}; with sequence_ids it must be (N, D).")
        num_sequences, sequence_ids = _packed_sequences(ref_logps, sequence_ids, hidden, "hidden")
    num_pairs = num_sequences // 2
    if tokens_per_pair is not None and (len(tokens_per_pair) != num_pairs or sum(tokens_per_pair) != hidden.shape[0]):
        raise ValueError(
            f"tokens_per_pair has {len(tokens_per_pair)} values with the sum {sum(tokens_per_pair)}; "
            f"it must have {num_pairs} (the pairs) with the sum {hidden.shape[0]} (the rows of hidden)."
        )
    check_linear(hidden, weight, labels, bias)
    budget = resolve_budget(memory_budget, hidden.device)
    per_pair = reduction != "none" and losses.per_pair
    if per_pair and is_fused(hidden, weight, bias, compute_dtype(hidden, head_dtype), budget):
        return _fused_linear_loss(
            hidden.to(compute_dtype(hidden, head_dtype)), weight, labels, sequence_ids, tokens_per_pair, num_pairs,
            ref_logps, losses, beta, reduction, options, bias=bias, stats=token_metrics, memory_budget=budget,
            impl=impl,
        )  # fmt: skip
    logps, stats = linear_token_logps_with_stats(
        hidden, weight, labels, options, bias=bias, stats=token_metrics, head_dtype=head_dtype, memory_budget=budget,
        impl=impl,
    )  # fmt: skip
    output = _from_tokens(logps, stats, labels, sequence_ids, num_sequences, ref_logps, losses, beta, reduction,
                          ignore_index)  # fmt: skip
    # As where the gradient is formed in the forward: which way was taken must not show.
    return output if reduction == "none" else replace(output, losses=output.losses.detach())


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


def _fused_linear_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, sequence_ids: Tensor, tokens_per_pair: Sequence[int] | None,
    num_pairs: int, ref_logps: RefLogps, losses: WeightedLosses, beta: float, reduction: str, options: LogitOptions,
    *, bias: Tensor | None, stats: bool, memory_budget: int, impl: str,
) -> LossOutput:  # fmt: skip
    if tokens_per_pair is None:
        pair_ids = sequence_ids.remainder(num_pairs)
        order = pair_ids.argsort(stable=True)
        hidden, labels, sequence_ids = hidden[order], labels[order], sequence_ids[order]
        tokens_per_pair = torch.bincount(pair_ids, minlength=num_pairs).tolist()
    lengths = sequence_lengths(labels, sequence_ids, 2 * num_pairs, options.ignore_index).view(2, -1)
    like = torch.zeros(num_pairs, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    ref_c, ref_r = _reference(ref_logps, losses, like)

    def pair_loss(first: int, end: int, sums: Tensor) -> Tensor:
        part = slice(first, end)
        return losses(PairTerms(sums[0], sums[1], ref_c[part], ref_r[part], lengths[0, part], lengths[1, part]))

    total, per_pair, logps, token_stats = fused_pair_loss(
        hidden, weight, labels, sequence_ids, tokens_per_pair, pair_loss, options,
        bias=bias, stats=stats, memory_budget=memory_budget, impl=impl,
    )  # fmt: skip
    chosen, rejected = logps.view(2, -1)
    terms = PairTerms(chosen, rejected, ref_c, ref_r)
    tokens = _token_metrics(token_stats, labels, sequence_ids, num_pairs, options.ignore_index)
    reduced = total if reduction == "sum" else total / num_pairs
    return replace(_output(per_pair, terms, beta, "none", tokens), loss=reduced)


def sequence_lengths(labels: Tensor, sequence_ids: Tensor, num_sequences: int, ignore_index: int) -> Tensor:
    """Tokens with a target in each sequence, (num_sequences,) float32."""
    counted = (labels != ignore_index).reshape(-1).to(torch.float32)
    zeros = torch.zeros(num_sequences, dtype=torch.float32, device=labels.device)
    return zeros.index_add_(0, sequence_ids.reshape(-1), counted)


def _from_tokens(
    logps: Tensor, stats: TokenStats | None, labels: Tensor, sequence_ids: Tensor, num_sequences: int,
    ref_logps: RefLogps, losses: WeightedLosses, beta: float, reduction: str, ignore_index: int,
) -> LossOutput:  # fmt: skip
    sums = logps.new_zeros(num_sequences).index_add(0, sequence_ids.reshape(-1), logps.reshape(-1))
    chosen, rejected = sums.view(2, -1)
    ref_c, ref_r = _reference(ref_logps, losses, chosen)
    lengths = sequence_lengths(labels, sequence_ids, num_sequences, ignore_index).view(2, -1)
    terms = PairTerms(chosen, rejected, ref_c, ref_r, lengths[0], lengths[1])
    tokens = _token_metrics(stats, labels, sequence_ids, num_sequences // 2, ignore_index)
    return _output(losses(terms), terms, beta, reduction, tokens)


def _token_metrics(
    stats: TokenStats | None, labels: Tensor, sequence_ids: Tensor, num_pairs: int, ignore_index: int
) -> TokenMetrics | None:
    if stats is None:
        return None
    counted = labels != ignore_index
    chosen = counted & (sequence_ids < num_pairs)
    rejected = counted & (sequence_ids >= num_pairs)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)

    return TokenMetrics(
        entropy=mean(stats.entropy, counted),
        chosen_logits=mean(stats.mean_logit, chosen),
        rejected_logits=mean(stats.mean_logit, rejected),
        mean_token_accuracy=mean(stats.is_top1, chosen),
    )


def _output(
    losses: Tensor, terms: PairTerms, beta: float, reduction: str, tokens: TokenMetrics | None = None
) -> LossOutput:
    reduced = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    return LossOutput(
        loss=reduced,
        losses=losses,
        chosen_logps=terms.chosen_logps.detach(),
        rejected_logps=terms.rejected_logps.detach(),
        chosen_rewards=beta * terms.chosen_logratios.detach(),
        rejected_rewards=beta * terms.rejected_logratios.detach(),
        tokens=tokens,
    )


def _reference(ref_logps: RefLogps, losses: WeightedLosses, like: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's (B,) sums on the device and in the dtype of `like` (B,); zeros for losses without reference."""
    num_pairs = like.shape[0]
    if ref_logps is None:
        if losses.needs_reference:
            names = " + ".join(spec.name for spec, _ in losses.parts)
            raise ValueError(f"ref_logps is missing, and loss_type {names} needs the reference's log-probs.")
        return torch.zeros_like(like), torch.zeros_like(like)
    if isinstance(ref_logps, Tensor):
        if tuple(ref_logps.shape) != (2 * num_pairs,):
            raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}; {num_pairs} pairs need "
                             f"({2 * num_pairs},), chosen first.")  # fmt: skip
        ref_c, ref_r = ref_logps.view(2, -1)
    else:
        ref_c, ref_r = ref_logps
        for name, tensor in (("chosen", ref_c), ("rejected", ref_r)):
            if tuple(tensor.shape) != (num_pairs,):
                raise ValueError(
                    f"ref_logps, {name} part, has shape {tuple(tensor.shape)}; {num_pairs} pairs need ({num_pairs},)."
                )
    if ref_c.device != like.device:
        raise ValueError(f"ref_logps is on {ref_c.device} and the log-probs on {like.device}; move ref_logps there.")
    return ref_c.detach().to(like.dtype), ref_r.detach().to(like.dtype)


def _packed_sequences(ref_logps: RefLogps, sequence_ids: Tensor, tensor: Tensor, name: str) -> tuple[int, Tensor]:
    """2B of a packed input (N, _) and its sequence_ids, int64.

    2B comes from the references, so that the device need not be asked; without them from the ids.
    """
    num_rows = tensor.shape[0]
    check_integers("sequence_ids", sequence_ids)
    check_device("sequence_ids", sequence_ids, tensor, name)
    if tuple(sequence_ids.shape) != (num_rows,):
        raise ValueError(f"sequence_ids has shape {tuple(sequence_ids.shape)}; it must be ({num_rows},): one id a row.")
    if isinstance(ref_logps, Tensor):
        count = ref_logps.shape[0] if ref_logps.dim() == 1 else -1
        if count < 0 or count % 2:
            raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}; it must be (2B,), chosen first.")
    elif ref_logps is not None:
        count = 2 * ref_logps[0].shape[0]
    else:
        # The last rejected completion has the highest id, B + B - 1.
        count = int(sequence_ids.max()) + 1 if num_rows else 0
        if count % 2:
            raise ValueError(f"the largest of sequence_ids is {count - 1}; with ids in [0, 2B) it must be odd.")
    _check_pairs(count // 2)
    if num_rows and sequence_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in sequence_ids.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"sequence_ids lie in [{low}, {high}]; {count // 2} pairs need ids in [0, {count}).")
    return count, sequence_ids.long()


def _padded_sequences(name: str, tensor: Tensor, labels: Tensor) -> int:
    """2B of a padded input (2B, T, _)."""
    if tensor.dim() != 3 or tensor.shape[0] % 2:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; without sequence_ids it must have three dimensions, (2B, T, _), "
            "chosen rows first, then rejected ones."
        )
    if tuple(labels.shape) != tuple(tensor.shape[:2]):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; {name} of shape {tuple(tensor.shape)} needs "
            f"{tuple(tensor.shape[:2])}."
        )
    _check_pairs(tensor.shape[0] // 2)
    return tensor.shape[0]


def _check_pairs(num_pairs: int) -> None:
    if num_pairs == 0:
        raise ValueError("the batch holds no pair (B = 0); leave empty batches out.")


def _check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(map(repr, _REDUCTIONS))}.")
