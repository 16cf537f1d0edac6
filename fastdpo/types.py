"""Plain data shared by all parts. A leaf: imports nothing of fastdpo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


class UserError(ValueError):
    """A mistake of the user's that one sentence explains; the command line prints it and exits with code 2."""


class DataError(UserError):
    """A row of the user's data cannot be used; the message names the file, the row, and the remedy."""


class DamageWarning(UserWarning):
    """Something on disk was damaged, and the run goes on without it."""


@dataclass(frozen=True)
class TokenStats:
    """What one pass over the logits tells of each token besides its log-prob; every field is (N,), detached.

    entropy      -sum_v p_v log p_v, in nats
    mean_logit   mean_v z_v of the final logits (after logit scale, softcap and temperature)
    is_top1      1.0 where no logit is larger than the label's, else 0.0
    log_sum_p2   log sum_v p_v^2
    """

    entropy: Tensor
    mean_logit: Tensor
    is_top1: Tensor
    log_sum_p2: Tensor

    @classmethod
    def from_rows(cls, stats: Tensor) -> TokenStats:
        """From the (4, N) tensor of the kernels, whose rows stand in the order of the fields."""
        return cls(*stats.unbind(0))


@dataclass(frozen=True)
class TokenMetrics:
    """Means over completion tokens, each a 0-d tensor on the device of the logits."""

    entropy: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    mean_token_accuracy: Tensor


@dataclass(frozen=True)
class LossOutput:
    """What every loss function returns; B pairs (or lists, or single answers).

    loss              scalar, the reduction of `losses` (with `reduction="none"`: `losses` itself)
    losses            (B,) one loss a pair, times its weight where there are any; carries a gradient, except in
                      `linear_loss` with reduction "mean" or "sum", which forms its gradient for `loss` alone
    chosen_logps      (B,) sum of log-probs over the completion, detached, as is all that follows
    rejected_logps    (B,)
    chosen_rewards    (B,) beta * (logp - ref_logp), the implicit reward; with an f-divergence beta times its score
    rejected_rewards  (B,)
    tokens            means over tokens, where they were asked for
    accuracies        lists: (B,) the share of two of its completions that the rewards order as the ranking does
    kl                losses that estimate it: the KL divergence from the reference, a scalar
    paired            False for single answers: the chosen entries are NaN where an answer is not desirable, the
                      rejected ones where it is
    extras            further means that a loss reports, by name
    aux_loss          the load-balancing loss of a mixture of experts, where `loss` holds it

    Of lists, chosen is the best completion, rejected the mean of the others.
    """

    loss: Tensor
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    tokens: TokenMetrics | None = None
    accuracies: Tensor | None = None
    kl: Tensor | None = None
    paired: bool = True
    extras: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are; what a wrapped model's forward returns, for wrappers look for tensors in dicts."""
        tokens = None if self.tokens is None else dict(vars(self.tokens))
        return {**vars(self), "tokens": tokens}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LossOutput:
        tokens = fields["tokens"]
        return cls(**{**fields, "tokens": None if tokens is None else TokenMetrics(**tokens)})

    def metrics(self) -> dict[str, Tensor]:
        """Batch means under the names that trainers log; 0-d tensors on the device, so that nothing waits for it."""
        mean = torch.mean if self.paired else torch.nanmean
        chosen, rejected = mean(self.chosen_rewards), mean(self.rejected_rewards)
        values = {"rewards/chosen": chosen, "rewards/rejected": rejected}
        if self.paired:
            right = self.accuracies
            if right is None:
                right = (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype)
            values["rewards/accuracies"] = right.mean()
        values["rewards/margins"] = chosen - rejected
        values["logps/chosen"] = mean(self.chosen_logps)
        values["logps/rejected"] = mean(self.rejected_logps)
        if self.tokens is not None:
            values["logits/chosen"] = self.tokens.chosen_logits
            values["logits/rejected"] = self.tokens.rejected_logits
            values["entropy"] = self.tokens.entropy
            values["mean_token_accuracy"] = self.tokens.mean_token_accuracy
        if self.kl is not None:
            values["kl"] = self.kl
        values.update(self.extras or {})
        if self.aux_loss is not None:
            values["aux_loss"] = self.aux_loss
        return values


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all softmax arithmetic and of returned log-probs: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
