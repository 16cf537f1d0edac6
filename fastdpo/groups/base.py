"""What pairs, lists and single answers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.losses import WeightedLosses
from fastdpo.losses.terms import nonzero
from fastdpo.types import LossOutput, TokenMetrics

RefLogps = Tensor | tuple[Tensor, Tensor] | None
# The KL estimate, or what makes of this process's estimate that of all processes.
KL = Tensor | float | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class GroupInputs:
    """What the caller gives beside the tokens, as `fastdpo.loss` takes it."""

    ref_logps: RefLogps = None
    pair_weights: Tensor | None = None
    list_sizes: int | Sequence[int] | None = None
    desirable: Tensor | None = None
    kl: KL = None
    margins: Tensor | None = None
    mean_chosen_length: Tensor | float | None = None
    num_sequences: int | None = None
    grad_dtype: torch.dtype = torch.float32  # of what the gradient reaches


class Groups:
    """S sequences in B groups. Tensors are on the device of the log-probs and in their dtype; slots' sums may come in
    float64, and are rounded where a sequence has its one.

    losses     what is to be computed
    what       the groups, in messages
    count      B
    weights    (B,) or None
    dtype      of the sums' losses and metrics
    grad_dtype  of what the gradient of the sums reaches
    num_slots  of all groups
    """

    losses: WeightedLosses
    what: str
    count: int
    weights: Tensor | None
    dtype: torch.dtype
    grad_dtype: torch.dtype

    @property
    def slots_per_group(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def num_slots(self) -> int:
        return sum(self.slots_per_group)

    def slot_ids(self, sequence_ids: Tensor, counted: Tensor) -> Tensor:
        """(N,) the slot of each row; `counted` (N,) is where it has a target."""
        return sequence_ids

    def group_ids(self, sequence_ids: Tensor) -> Tensor:
        """(N,) the group of each row."""
        raise NotImplementedError

    def rejected(self) -> Tensor:
        """(S,) bool: which sequences count as rejected in the metrics; the others as chosen."""
        raise NotImplementedError

    def __call__(self, first: int, end: int, sums: Tensor, sums_p2: Tensor | None = None) -> Tensor:
        """(end - first,) weighted losses of these groups, of whose slots these are the sums."""
        raise NotImplementedError

    def output(self, losses: Tensor, loss: Tensor, sums: Tensor, tokens: TokenMetrics | None) -> LossOutput:
        raise NotImplementedError

    def bounded(self, sums: Tensor) -> Tensor:
        """The sums, whose gradient stays within the numbers of float16 where it is to become one."""
        if self.grad_dtype != torch.float16 or not sums.requires_grad:
            return sums
        largest = torch.finfo(torch.float16).max
        sums = sums.view_as(sums)
        sums.register_hook(lambda grad: grad.clamp(-largest, largest))
        return sums

    def weighted(self, losses: Tensor, first: int, end: int) -> Tensor:
        return losses if self.weights is None else losses * self.weights[first:end]

    def reduced(self, total: Tensor, reduction: str) -> Tensor:
        """Of the sum of weighted losses."""
        if reduction == "sum":
            return total
        return total / self.count if self.weights is None else total / nonzero(self.weights.sum())
