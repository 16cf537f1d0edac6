"""Between tokens and groups: which rows belong to which sequence, and what their log-probs add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.groups.answers import mismatched_kl
from fastdpo.groups.base import GroupInputs, Groups
from fastdpo.groups.checks import known_on_host
from fastdpo.losses import WeightedLosses
from fastdpo.ops import sum_by_id
from fastdpo.types import LossOutput, TokenMetrics, TokenStats


def padded_sequences(name: str, tensor: Tensor, labels: Tensor, losses: WeightedLosses) -> int:
    """S of a padded input (S, T, _).

    Raises:
        ValueError: shapes that do not fit, or no sequence.
    """
    pairs = losses.data == "pairs"
    if tensor.dim() != 3 or (pairs and tensor.shape[0] % 2):
        shape = "(2B, T, _), chosen rows first, then rejected ones" if pairs else "(S, T, _)"
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; without sequence_ids it must have three dimensions, {shape}."
        )
    if tuple(labels.shape) != tuple(tensor.shape[:2]):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; {name} of shape {tuple(tensor.shape)} needs "
            f"{tuple(tensor.shape[:2])}."
        )
    check_count(tensor.shape[0], losses)
    return tensor.shape[0]


def packed_sequences(
    inputs: GroupInputs, losses: WeightedLosses, sequence_ids: Tensor, tensor: Tensor, name: str
) -> int:
    """S of a packed input (N, _), from what else is given, so that the device need not be asked; or from the ids.

    Raises:
        ValueError: as `padded_sequences`; ids that lie outside (looked at on a CPU only).
    """
    num_rows, refs = tensor.shape[0], inputs.ref_logps
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with sequence_ids it must be (N, _), a row a token.")
    if tuple(sequence_ids.shape) != (num_rows,):
        raise ValueError(f"sequence_ids has shape {tuple(sequence_ids.shape)}; it must be ({num_rows},): one id a row.")
    if inputs.num_sequences is not None:
        count = inputs.num_sequences
    elif inputs.desirable is not None:
        count = 2 * len(inputs.desirable)  # rows of answers to other prompts may be there, or none
    elif isinstance(refs, Tensor):
        if refs.dim() != 1 or (losses.data == "pairs" and len(refs) % 2):
            shape = "(2B,), chosen first" if losses.data == "pairs" else "(S,)"
            raise ValueError(f"ref_logps has shape {tuple(refs.shape)}; it must be {shape}.")
        count = len(refs)
    elif refs is not None:
        count = 2 * len(refs[0])
    elif inputs.list_sizes is not None and not isinstance(inputs.list_sizes, int):
        count = sum(inputs.list_sizes)
    else:
        # The last completion has the highest id; of pairs it is B + B - 1.
        count = int(sequence_ids.max()) + 1 if num_rows else 0
        if losses.data == "pairs" and count % 2:
            raise ValueError(f"the largest of sequence_ids is {count - 1}; with ids in [0, 2B) it must be odd.")
    check_count(count, losses)
    if num_rows and known_on_host(sequence_ids):
        low, high = (int(bound) for bound in sequence_ids.aminmax())
        if low < 0 or high >= count:
            what = f"{count // 2} pairs" if losses.data == "pairs" else f"{count} sequences"
            raise ValueError(f"sequence_ids lie in [{low}, {high}]; {what} need ids in [0, {count}).")
    return count


def check_count(num_sequences: int, losses: WeightedLosses) -> None:
    if num_sequences == 0:
        what = {"lists": "list", "answers": "answer"}.get(losses.data, "pair")
        raise ValueError(f"the batch holds no {what} (B = 0); leave empty batches out.")


def own_sequences(inputs: GroupInputs, losses: WeightedLosses, num_sequences: int) -> int:
    """How many of them have a loss: all, but for answers to other prompts, which come behind.

    Raises:
        ValueError: `desirable` is of another number of answers.
    """
    if losses.data != "answers":
        return num_sequences
    assert inputs.desirable is not None  # `check_inputs`
    own = len(inputs.desirable)
    if num_sequences not in (own, 2 * own):
        raise ValueError(
            f"desirable says it of {own} answers, and there are {num_sequences} sequences; there must be {own}, or "
            f"{2 * own} with as many answers to other prompts behind them."
        )
    return own


def with_kl(
    inputs: GroupInputs, losses: WeightedLosses, own: int, mismatched_logps: Tensor | None, sequence_ids: Tensor | None
) -> GroupInputs:
    """`inputs` of the answers alone, with the KL estimate from answers to other prompts, where it is not given.

    Args:
        mismatched_logps, sequence_ids: (M,) of the rows of answers to other prompts, ids in [own, 2 * own); or None.

    Raises:
        ValueError: there is no estimate and the loss needs one; no references for those answers.
    """
    refs, kl = inputs.ref_logps, inputs.kl
    over_processes = kl if callable(kl) else None
    ref_mismatched = None
    if isinstance(refs, Tensor) and len(refs) == 2 * own:
        refs, ref_mismatched = refs[:own], refs[own:]
    if losses.needs_kl and (kl is None or over_processes is not None):
        if mismatched_logps is None or sequence_ids is None or not (len(sequence_ids) or ref_mismatched is not None):
            raise ValueError(
                f"kl is missing, and loss_type {losses.names} needs it: give a number, or behind the answers as many "
                "to other prompts, of which it is estimated."
            )
        if ref_mismatched is None:
            raise ValueError(
                f"ref_logps has no values of the answers to other prompts; it must be ({2 * own},), theirs last."
            )
        sums = sum_by_id(mismatched_logps.detach(), sequence_ids - own, own)
        kl = mismatched_kl(sums, ref_mismatched).to(mismatched_logps.dtype)
        kl = kl if over_processes is None else over_processes(kl)
    return replace(inputs, ref_logps=refs, kl=kl)


def sequence_lengths(labels: Tensor, sequence_ids: Tensor, num_sequences: int, ignore_index: int) -> Tensor:
    """Tokens with a target in each sequence, (num_sequences,) float32."""
    counted = (labels != ignore_index).to(torch.float32)
    return torch.zeros(num_sequences, dtype=torch.float32, device=labels.device).index_add_(0, sequence_ids, counted)


def rows_by_group(groups: Groups, sequence_ids: Tensor) -> tuple[Tensor, list[int]]:
    """The order of rows in which those of a group stand together, and how many each has; a wait for the device."""
    numbers = groups.group_ids(sequence_ids)
    counts = torch.bincount(numbers, minlength=groups.count).tolist()
    return numbers.argsort(stable=True), counts


def check_rows(tokens_per_pair: Sequence[int], groups: Groups, sequence_ids: Tensor) -> None:
    """That so many rows belong to each group, in this order (looked at on a CPU only)."""
    num_rows = len(sequence_ids)
    if len(tokens_per_pair) != groups.count or sum(tokens_per_pair) != num_rows:
        raise ValueError(
            f"tokens_per_pair has {len(tokens_per_pair)} values with the sum {sum(tokens_per_pair)}; "
            f"it must have {groups.count} (the {groups.what}) with the sum {num_rows} (the rows of hidden)."
        )
    if not known_on_host(sequence_ids):
        return
    numbers = torch.arange(groups.count).repeat_interleave(torch.tensor(tokens_per_pair))
    wrong = (groups.group_ids(sequence_ids) != numbers).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"tokens_per_pair says that row {row} belongs to number {numbers[row]} of the {groups.what}, and its "
            f"sequence_ids is {sequence_ids[row]}; order the rows, or leave tokens_per_pair out."
        )


def loss_of_tokens(
    groups: Groups, logps: Tensor, stats: TokenStats | None, labels: Tensor, sequence_ids: Tensor, *, reduction: str,
    ignore_index: int, token_metrics: bool,
) -> LossOutput:  # fmt: skip
    """The loss of tokens' log-probs (N,)."""
    slot_ids = groups.slot_ids(sequence_ids, labels != ignore_index)
    sums = sum_by_id(logps, slot_ids, groups.num_slots)
    sums_p2 = None
    if groups.losses.use_weighting:
        assert stats is not None
        sums_p2 = sum_by_id(stats.log_sum_p2, slot_ids, groups.num_slots)
    tokens = mean_stats(stats, labels, sequence_ids, groups, ignore_index) if token_metrics else None
    return loss_of_sums(groups, sums, reduction, sums_p2, tokens)


def loss_of_sums(
    groups: Groups, sums: Tensor, reduction: str, sums_p2: Tensor | None = None, tokens: TokenMetrics | None = None
) -> LossOutput:
    """The loss of the slots' sums."""
    losses = groups(0, groups.count, sums, sums_p2)
    loss = losses if reduction == "none" else groups.reduced(losses.sum(), reduction)
    return groups.output(losses, loss, sums, tokens)


def mean_stats(
    stats: TokenStats | None, labels: Tensor, sequence_ids: Tensor, groups: Groups, ignore_index: int
) -> TokenMetrics | None:
    if stats is None:
        return None
    counted = labels != ignore_index
    rejected = groups.rejected()[sequence_ids]

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)

    return TokenMetrics(
        entropy=mean(stats.entropy, counted),
        chosen_logits=mean(stats.mean_logit, counted & ~rejected),
        rejected_logits=mean(stats.mean_logit, counted & rejected),
        mean_token_accuracy=mean(stats.is_top1, counted & ~rejected),
    )
