"""The batch that the collator makes and every model pass takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.packing.layout import PackedLayout

TARGET_KINDS = ("all", "chosen", "rejected")
# The metrics that are means over targets, and over which.
_OVER_TARGETS = {
    "entropy": "all",
    "logits/chosen": "chosen",
    "logits/rejected": "rejected",
    "mean_token_accuracy": "chosen",
}


class PreferenceBatch(dict):
    """B pairs (or ranked lists, or single answers), S sequences, ready for a model pass.

    A dict, so that trainers and data loaders handle it; fields read as attributes.

    packing          "prefix", "varlen" or "padded"
    input_ids        (1, T) packed, or (S, T) padded on the right, in the order of the sequences
    position_ids     as input_ids
    attention_mask   (S, T), padded only
    layout           PackedLayout, packed only
    target_rows      (N,) rows of the flattened hidden states (T or S * T of them) that predict completion tokens
    target_ids       (N,) those tokens, pair by pair: first the chosen completion's, then the rejected one's; a list's
                     from the best completion to the worst
    sequence_ids     (N,) in [0, S). Pairs: chosen i is i, rejected i is B + i; lists: list behind list; answers: i, and
                     behind them as many answers to other prompts than theirs (`mismatched`)
    tokens_per_pair  B host integers: how many of the N targets belong to each pair; mismatched answers' come behind
    num_sequences    S
    num_tokens       tokens that the backbone runs through, padding counted
    unshared_tokens  tokens with every prompt repeated, without padding
    own_tokens       answers only: unshared_tokens without the mismatched
    list_sizes       lists only: B host integers, the completions of each
    desirable        answers only: (B,) bool; num_desirable counts them on the host
    rows             numbers of the rows in their data set, where they carry a `row_number`
    ref_logps        (S,) the reference's sums, where the rows carry them
    pair_weights     (B,) where the rows carry weights; total_weight is their sum on the host
    chosen_tokens    pairs only: host number, the chosen answers' targets, times their pairs' weights
    margins          (B,) where a reward model's rows carry them
    score_rows       (S,) packed, for a reward model: rows of the flattened hidden states that its head scores, those of
                     each sequence's last token that is not score_pad_id
    mean_chosen_length  of a batch in parts: mean tokens of the whole batch's chosen answers
    targets          how many targets there are by kind: "all", "chosen" (best, desirable) and "rejected"
    target_shares    of a part of a batch: its share of the batch's targets, by kind; batch_pairs says how many pairs,
                     and how many desirable answers, the batch has
    longest          tokens of the longest sequence; of a batch in parts, of the whole batch
    weight           0 where the batch only keeps step with other processes; default 1
    """

    @property
    def data(self) -> str:
        """What its rows are: "pairs", "lists" or "answers"."""
        return "lists" if "list_sizes" in self else "answers" if "desirable" in self else "pairs"

    @property
    def total_weight(self) -> float:
        """Of all pairs, on the host; their number where the rows carry no weights."""
        return self.get("total_weight", float(self.num_pairs))

    @property
    def data_tokens(self) -> int:
        """Tokens of the rows' own sequences, prompts counted with every completion, without padding."""
        return int(self.get("own_tokens", self["unshared_tokens"]))

    @property
    def chosen_tokens(self) -> float | None:
        """Of pairs: targets of the chosen answers, times their pairs' weights; on the host."""
        return self.get("chosen_tokens")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no field {name!r}; it has: {', '.join(self)}.") from None

    @property
    def num_pairs(self) -> int:
        return len(self["tokens_per_pair"])

    def metric_weights(self) -> dict[str, float]:
        """What the batch's metrics count by, where that is not its pairs.

        Of single answers those of each kind; of a part of a batch what makes the parts' means that of the batch.
        """
        weights: dict[str, float] = {}
        if self.data == "answers":
            good = float(self["num_desirable"])
            kinds = {"chosen": good, "rejected": self.num_pairs - good}
            names = ("rewards", "logps", "logits")
            weights = {f"{name}/{side}": count for name in names for side, count in kinds.items()}
            weights |= {"mean_token_accuracy": good, "rewards/margins": min(kinds.values())}
        if "target_shares" in self:
            pairs, good = self["batch_pairs"]
            counts = dict.fromkeys(TARGET_KINDS, float(pairs))
            if self.data == "answers":
                counts |= {"chosen": float(good), "rejected": float(pairs - good)}
            weights |= {name: self["target_shares"][kind] * counts[kind] for name, kind in _OVER_TARGETS.items()}
        return weights

    @property
    def saved_tokens_fraction(self) -> float:
        """Share of the unshared, unpadded tokens that this batch does not run; below 0 where padding adds more."""
        return 1 - self["num_tokens"] / max(1, self["unshared_tokens"])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        def move(value: Any) -> Any:
            if isinstance(value, Tensor | PackedLayout):
                return value.to(device, non_blocking=non_blocking)
            return value

        return PreferenceBatch({name: move(value) for name, value in self.items()})

    def pin_memory(self) -> PreferenceBatch:
        def pin(value: Any) -> Any:
            return value.pin_memory() if isinstance(value, Tensor | PackedLayout) else value

        return PreferenceBatch({name: pin(value) for name, value in self.items()})
