"""Tokenized rows into a PreferenceBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.data.validate import REF_COLUMNS, TOKENIZED
from fastdpo.packing.batch import PreferenceBatch
from fastdpo.packing.layout import pack
from fastdpo.packing.microbatch import Cost, MicroBatches, even_cuts, fewest, packed_cost, padded_cost
from fastdpo.packing.padding import pad
from fastdpo.packing.tree import pays

PACKINGS = ("prefix", "varlen", "padded")
TRUNCATION_MODES = ("keep_start", "keep_end")
PromptCompletion = tuple[Sequence[int], Sequence[int]]  # (prompt, completion)


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of token ids) into a batch.

    packing          "prefix": one row, each pair's prompt once. "varlen": one row, prompts repeated. "padded": a
                     rectangle, as other libraries run it.
    max_length       longest prompt + completion in tokens; None keeps everything
    truncation_mode  "keep_start" or "keep_end": which end of a longer sequence stays
    pad_token_id     for "padded"; never reaches a result
    pad_to_multiple_of  for "padded"
    max_tokens_per_microbatch  where given, a batch comes as MicroBatches: cut so that the backbone runs through at most
                     so many tokens at a time

    Rows that carry `ref_chosen_logps` and `ref_rejected_logps` give the batch its `ref_logps`.
    """

    packing: str = "prefix"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    max_tokens_per_microbatch: int | None = None

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"packing is {self.packing!r}; it must be one of {', '.join(map(repr, PACKINGS))}.")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode is {self.truncation_mode!r}; it must be one of "
                f"{', '.join(map(repr, TRUNCATION_MODES))}."
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2, or None for no limit.")
        if self.max_tokens_per_microbatch is not None and self.max_tokens_per_microbatch < 1:
            raise ValueError(
                f"max_tokens_per_microbatch is {self.max_tokens_per_microbatch}; it must be above 0, or None."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """A PreferenceBatch, or with `max_tokens_per_microbatch` MicroBatches."""
        return self.batch(rows) if self.max_tokens_per_microbatch is None else self.microbatches(rows)

    def microbatches(self, rows: Sequence[Mapping[str, Any]], count: int | None = None) -> MicroBatches:
        """The rows in `count` micro-batches of about the same number of tokens; default: as few as the budget lets."""
        cost = self._cost([self.sequences(row) for row in rows])
        if count is None:
            count = 1 if self.max_tokens_per_microbatch is None else fewest(
                len(rows), self.max_tokens_per_microbatch, cost
            )  # fmt: skip
        cuts = even_cuts(len(rows), count, cost) if rows else [(0, 0)]
        return MicroBatches(tuple(self.batch(rows[first:end]) for first, end in cuts), rows, self, count)

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        if not rows:
            raise ValueError("the batch holds no row; leave empty batches out.")
        pairs = [self.sequences(row) for row in rows]
        batch = self._padded(pairs) if self.packing == "padded" else self._packed(pairs)
        given = [name for name in REF_COLUMNS if name in rows[0]]
        if len(given) == 1:
            raise ValueError(f"the rows have {given[0]} but not the other one of ref_chosen_logps, ref_rejected_logps.")
        if given:
            values = [[float(row[name]) for row in rows] for name in given]
            batch["ref_logps"] = torch.tensor(values, dtype=torch.float32).view(-1)
        return batch

    def sequences(self, row: Mapping[str, Any]) -> tuple[PromptCompletion, PromptCompletion]:
        """(prompt, completion) of the chosen and of the rejected answer, truncated."""
        missing = [name for name in TOKENIZED if name not in row]
        if missing:
            raise ValueError(f"a row has no {missing[0]}; the collator takes tokenized rows (see fastdpo.data).")
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        return self._cut(prompt, chosen), self._cut(prompt, rejected)

    def _cut(self, prompt: Sequence[int], completion: Sequence[int]) -> PromptCompletion:
        length = len(prompt) + len(completion)
        if self.max_length is None or length <= self.max_length:
            return prompt, completion
        if self.truncation_mode == "keep_start":
            kept = max(0, self.max_length - len(prompt))
            return prompt[: self.max_length], completion[:kept]
        dropped = length - self.max_length
        return prompt[dropped:], completion[max(0, dropped - len(prompt)) :]

    def _cost(self, pairs: list[tuple[PromptCompletion, PromptCompletion]]) -> Cost:
        """Tokens of a run of these pairs in one forward pass: exact, but for beginnings shared beyond whole prompts."""
        lengths = [[len(prompt) + len(completion) for prompt, completion in pair] for pair in pairs]
        if self.packing == "padded":
            return padded_cost([max(both) for both in lengths], self.pad_to_multiple_of)
        if self.packing == "varlen":
            return packed_cost([sum(both) for both in lengths], [0] * len(pairs))
        prompts = [chosen[0] if len(chosen[0]) == len(rejected[0]) else [] for chosen, rejected in pairs]
        sizes = [sum(both) - self._saved(prompt, sum(both)) for both, prompt in zip(lengths, prompts, strict=True)]
        again = [
            self._saved(prompt, sum(both)) if before is not None and list(before) == list(prompt) else 0
            for both, before, prompt in zip(lengths, [None, *prompts], prompts, strict=False)
        ]
        return packed_cost(sizes, again)

    @staticmethod
    def _saved(prompt: Sequence[int], gathered: int) -> int:
        """Tokens of a prompt that its pair need not run again, where sharing them pays (`fastdpo.packing.tree`)."""
        return len(prompt) if pays(len(prompt), gathered) else 0

    def _packed(self, pairs: list[tuple[PromptCompletion, PromptCompletion]]) -> PreferenceBatch:
        sequences = [sequence for pair in pairs for sequence in pair]
        packed = pack(sequences, share=self.packing == "prefix")
        num_pairs = len(pairs)
        # They were packed as chosen 0, rejected 0, chosen 1, ...; a batch numbers all chosen first, then all rejected.
        pair_ids, is_rejected = packed.sequence_numbers // 2, packed.sequence_numbers % 2
        return PreferenceBatch(
            packing=self.packing,
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            layout=packed.layout,
            target_rows=packed.target_rows,
            target_ids=packed.target_ids,
            sequence_ids=pair_ids + num_pairs * is_rejected,
            tokens_per_pair=tuple(map(sum, zip(packed.target_counts[::2], packed.target_counts[1::2], strict=True))),
            num_tokens=packed.input_ids.shape[1],
            unshared_tokens=packed.unshared_tokens,
        )

    def _padded(self, pairs: list[tuple[PromptCompletion, PromptCompletion]]) -> PreferenceBatch:
        num_pairs = len(pairs)
        sequences = [pair[side] for side in (0, 1) for pair in pairs]
        rows = pad(sequences, self.pad_token_id, self.pad_to_multiple_of)
        order = [number for i in range(num_pairs) for number in (i, num_pairs + i)]  # pair by pair
        target_rows = torch.cat([rows.target_rows[number] for number in order])
        counts = torch.tensor([len(rows.target_rows[number]) for number in order])
        return PreferenceBatch(
            packing="padded",
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            target_rows=target_rows,
            target_ids=rows.targets(target_rows),
            sequence_ids=torch.tensor(order).repeat_interleave(counts),
            tokens_per_pair=tuple(counts.view(-1, 2).sum(1).tolist()),
            num_tokens=rows.input_ids.numel(),
            unshared_tokens=int(rows.attention_mask.sum()),
        )
