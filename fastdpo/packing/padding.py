"""Sequences into a rectangle, padded on the right: for models that cannot run packed, and as the second opinion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedRows:
    """S sequences of at most T tokens; `target_rows[s]` are the flat rows that predict completion s's tokens."""

    input_ids: Tensor  # (S, T)
    position_ids: Tensor  # (S, T)
    attention_mask: Tensor  # (S, T)
    target_rows: list[Tensor]

    def targets(self, rows: Tensor) -> Tensor:
        """The tokens that these flat rows predict."""
        return self.input_ids.view(-1)[rows + 1]


def pad(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int = 0, multiple_of: int | None = None
) -> PaddedRows:
    """Pads (prompt, completion) sequences to the longest, or to the next multiple of `multiple_of`."""
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    if multiple_of:
        width = -(-width // multiple_of) * multiple_of
    input_ids = torch.full((len(sequences), width), pad_token_id)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    target_rows = []
    for number, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[number, :length] = torch.tensor([*prompt, *completion], dtype=torch.long)
        attention_mask[number, :length] = 1
        first = max(0, len(prompt) - 1)  # the last prompt token predicts the first completion token
        target_rows.append(torch.arange(number * width + first, number * width + max(first, length - 1)))
    position_ids = torch.arange(width).repeat(len(sequences), 1)
    return PaddedRows(input_ids, position_ids, attention_mask, target_rows)
