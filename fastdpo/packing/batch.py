"""The batch that the collator makes and every model pass takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.packing.layout import PackedLayout


class PreferenceBatch(dict):
    """B pairs, ready for a model pass. A dict, so that trainers and data loaders handle it; fields read as attributes.

    packing          "prefix", "varlen" or "padded"
    input_ids        (1, T) packed, or (2B, T) padded on the right, chosen rows first
    position_ids     as input_ids
    attention_mask   (2B, T), padded only
    layout           PackedLayout, packed only
    target_rows      (N,) rows of the flattened hidden states (T or 2B * T of them) that predict completion tokens
    target_ids       (N,) those tokens, pair by pair: first the chosen completion's, then the rejected one's
    sequence_ids     (N,) in [0, 2B): chosen i is i, rejected i is B + i
    tokens_per_pair  B host integers: how many of the N targets belong to each pair
    num_tokens       tokens that the backbone runs through, padding counted
    unshared_tokens  tokens with every prompt repeated, without padding
    ref_logps        (2B,) the reference's sums, where the rows carry them
    weight           0 where the batch only keeps step with other processes; default 1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no field {name!r}; it has: {', '.join(self)}.") from None

    @property
    def num_pairs(self) -> int:
        return len(self["tokens_per_pair"])

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
