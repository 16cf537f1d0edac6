"""Tokenized rows into a PreferenceBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fastdpo.data.validate import data_of
from fastdpo.packing.batch import TARGET_KINDS, PreferenceBatch
from fastdpo.packing.groups import (
    FILLER,
    Grouping,
    PromptCompletion,
    best_first,
    completions_of,
    desirable,
    kind_of_rows,
    margins,
    mismatched_completions,
    references,
    weights,
)
from fastdpo.packing.layout import as_arrays, pack
from fastdpo.packing.microbatch import Cost, MicroBatches, even_cuts, fewest_cuts, packed_cost, padded_cost
from fastdpo.packing.padding import pad

PACKINGS = ("prefix", "varlen", "padded")
TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of token ids into a batch. By their fields the rows of a batch are

        pairs     `prompt_ids`, `chosen_ids`, `rejected_ids`
        lists     `prompt_ids`, `completions_ids` (K lists), `ranks` (1 the best, no two alike; default: as they come)
        answers   `prompt_ids`, `completion_ids`, `label` (True: desirable)

    packing          "prefix": one row, each pair's prompt once. "varlen": one row, prompts repeated. "padded": a
                     rectangle, as other libraries run it.
    max_length       longest prompt + completion in tokens; None keeps everything
    truncation_mode  "keep_start" or "keep_end": which end of a longer sequence stays
    pad_token_id     for "padded"; never reaches a result
    pad_to_multiple_of  for "padded"
    max_tokens_per_microbatch  where given, a batch comes as MicroBatches: cut so that the backbone runs through at most
                     so many tokens at a time
    mismatched       of answers: whether each prompt also gets the answer to another, of which `kto` estimates the KL
                     divergence: the row's `KL_completion_ids`, or the answer of the row before in the batch
    scores           of pairs: whether the batch is for a reward model, and says in `score_rows` which tokens are
                     scored; `pad_token_id` is then that of the model's config, for models pass over it

    Rows that carry the reference's sums (pairs: `ref_chosen_logps` and `ref_rejected_logps`; lists: `ref_logps`, K of
    them; answers: `ref_logps`, and `ref_KL_logps` for the mismatched) give the batch its `ref_logps`; rows with a
    `pair_weight` its `pair_weights`; for a reward model rows with a `margin` its `margins`. Rows marked `filler` are
    left out; where there is no other, the batch has one of them and weighs nothing.

    Raises:
        ValueError: rows of several kinds or without token ids, a list of fewer than two completions, ranks with ties, a
            label that is no bool, a reference, weight or margin that is no finite number; with the number of the row.
    """

    packing: str = "prefix"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    max_tokens_per_microbatch: int | None = None
    mismatched: bool = True
    scores: bool = False

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
        rows = without_fillers(rows)
        grouping = self._grouping(rows)
        budget, cost = self.max_tokens_per_microbatch, self._cost(grouping)
        if count is None:
            count = 1 if budget is None else len(fewest_cuts(len(rows), budget, cost))
        if grouping.mismatched and count > 1:
            raise ValueError(
                "a batch of single answers cannot be cut into micro-batches: its KL estimate is one of the whole "
                "batch; set max_tokens_per_microbatch=None, or mismatched=False for a loss without the estimate."
            )
        cuts = even_cuts(len(rows), count, cost, budget)
        parts = tuple(self.batch(rows[first:end]) for first, end in cuts)
        longest = max((part["longest"] for part in parts), default=0)
        targets = {kind: sum(part["targets"][kind] for part in parts) for kind in TARGET_KINDS}
        for part in parts:
            part["longest"] = longest
            part["target_shares"] = {kind: part["targets"][kind] / max(1, total) for kind, total in targets.items()}
            part["batch_pairs"] = len(rows), sum(other.get("num_desirable", 0) for other in parts)
        batches = MicroBatches(parts, rows, self, count)
        if batches.chosen_tokens is not None:
            for part in parts:
                part["mean_chosen_length"] = batches.chosen_tokens / (batches.total_weight or 1.0)
        return batches

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        rows = without_fillers(rows)
        grouping = self._grouping(rows)
        data, groups = grouping.data, grouping.groups
        if not any(len(prompt) + len(answer) for group in groups for prompt, answer in group):
            raise ValueError("the batch holds no token: prompts and answers are empty; leave such rows out.")
        if self.scores and data != "pairs":
            raise ValueError(f"scores=True is for a reward model's pairs, and the batch holds {data}.")
        batch = self._padded(grouping) if self.packing == "padded" else self._packed(grouping)
        batch["longest"] = max(len(prompt) + len(answer) for group in groups for prompt, answer in group)
        if self.scores:
            batch["score_pad_id"] = self.pad_token_id
            if (row_margins := margins(rows)) is not None:
                batch["margins"] = row_margins
        if data == "lists":
            batch["list_sizes"] = tuple(map(len, groups))
        if data == "answers":
            batch["desirable"] = desirable(rows)
            batch["num_desirable"] = int(batch["desirable"].sum())
            batch["own_tokens"] = sum(len(prompt) + len(answer) for ((prompt, answer),) in groups)
        if "row_number" in rows[0]:
            batch["rows"] = tuple(int(row["row_number"]) for row in rows)
        refs, row_weights = references(rows, data, data == "answers" and self.mismatched), weights(rows)
        if refs is not None:
            batch["ref_logps"] = refs
        if row_weights is not None:
            batch["pair_weights"] = torch.tensor(row_weights, dtype=torch.float32)
            batch["total_weight"] = sum(row_weights)
        counts = torch.bincount(batch["sequence_ids"], minlength=batch["num_sequences"]).tolist()
        batch["targets"] = _targets_by_kind(batch, counts)
        if data == "pairs":
            each = zip(row_weights or [1.0] * len(rows), counts, strict=False)  # chosen sequences come first
            batch["chosen_tokens"] = float(sum(weight * count for weight, count in each))
        if rows[0].get(FILLER):
            batch["weight"], batch["total_weight"] = 0.0, 0.0
            if data == "pairs":
                batch["chosen_tokens"] = 0.0
        return batch

    def sequences(self, row: Mapping[str, Any]) -> tuple[PromptCompletion, ...]:
        """(prompt, completion) of each answer of a row, truncated; of a pair, chosen and rejected."""
        kind_of_rows([row])
        return tuple(self._cut(row["prompt_ids"], completion) for completion in completions_of(row))

    def _grouping(self, rows: Sequence[Mapping[str, Any]]) -> Grouping:
        if not rows:
            raise ValueError("the batch holds no row; leave empty batches out.")
        data = kind_of_rows(rows)
        groups = tuple(self._group(row, number) for number, row in enumerate(rows))
        if data != "answers" or not self.mismatched:
            return Grouping(data, groups)
        pairs = zip(rows, mismatched_completions(rows), strict=True)
        return Grouping(data, groups, tuple(self._cut(row["prompt_ids"], other) for row, other in pairs))

    def _group(self, row: Mapping[str, Any], number: int) -> tuple[PromptCompletion, ...]:
        """`sequences` in the order of a batch: those of a ranked list from best to worst."""
        sequences, data = self.sequences(row), data_of(row)
        if data == "lists":
            try:
                return tuple(sequences[place] for place in best_first(row))
            except ValueError as error:
                raise ValueError(f"row {number} of the batch: {error}") from None
        return sequences[:1] if data == "answers" else sequences

    def _cut(self, prompt: Sequence[int], completion: Sequence[int]) -> PromptCompletion:
        length = len(prompt) + len(completion)
        if self.max_length is None or length <= self.max_length:
            return prompt, completion
        if self.truncation_mode == "keep_start":
            kept = max(0, self.max_length - len(prompt))
            return prompt[: self.max_length], completion[:kept]
        dropped = length - self.max_length
        return prompt[dropped:], completion[max(0, dropped - len(prompt)) :]

    def _cost(self, grouping: Grouping) -> Cost:
        """Of runs of rows; with mismatched completions, which depend on the run, only that of all rows is right."""
        rows = [list(group) for group in grouping.groups]
        for row, sequence in zip(rows, grouping.mismatched, strict=False):
            row.append(sequence)
        if self.packing == "padded":
            widths = [max(len(prompt) + len(completion) for prompt, completion in row) for row in rows]
            return padded_cost(widths, list(map(len, rows)), self.pad_to_multiple_of)
        ids = iter(as_arrays([sequence for row in rows for sequence in row])[0])
        return packed_cost([[next(ids) for _ in row] for row in rows], share=self.packing == "prefix")

    def _packed(self, grouping: Grouping) -> PreferenceBatch:
        packed = pack(grouping.sequences, share=self.packing == "prefix")
        scored = {"score_rows": self._score_rows(grouping, packed.token_rows)} if self.scores else {}
        return PreferenceBatch(
            **scored,
            packing=self.packing,
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            layout=packed.layout,
            target_rows=packed.target_rows,
            target_ids=packed.target_ids,
            sequence_ids=torch.from_numpy(grouping.ids())[packed.sequence_numbers],
            tokens_per_pair=grouping.tokens_per_group(packed.target_counts),
            num_sequences=len(grouping.sequences),
            num_tokens=packed.input_ids.shape[1],
            unshared_tokens=packed.unshared_tokens,
        )

    def _score_rows(self, grouping: Grouping, token_rows: Sequence[np.ndarray]) -> torch.Tensor:
        score_rows = np.empty(len(token_rows), dtype=np.int64)
        for number, sequence, own in zip(grouping.ids(), grouping.sequences, token_rows, strict=True):
            if not len(own):
                raise ValueError("a sequence of the batch holds no token, and has no score; leave its row out.")
            score_rows[number] = own[last_token(sequence, self.pad_token_id)]
        return torch.from_numpy(score_rows)

    def _padded(self, grouping: Grouping) -> PreferenceBatch:
        ids = grouping.ids()
        order = ids.argsort()  # the rows of the rectangle: of pairs, all chosen first
        sequences = grouping.sequences
        rows = pad([sequences[number] for number in order], self.pad_token_id, self.pad_to_multiple_of)
        target_rows = torch.cat([rows.target_rows[number] for number in ids])  # group by group
        counts = [len(rows.target_rows[number]) for number in ids]
        return PreferenceBatch(
            packing="padded",
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            target_rows=target_rows,
            target_ids=rows.targets(target_rows),
            sequence_ids=torch.from_numpy(ids.repeat(counts)),
            tokens_per_pair=grouping.tokens_per_group(counts),
            num_sequences=len(sequences),
            num_tokens=rows.input_ids.numel(),
            unshared_tokens=int(rows.attention_mask.sum()),
        )


def _targets_by_kind(batch: PreferenceBatch, counts: Sequence[int]) -> dict[str, int]:
    """Targets that metrics are means over, from those of each sequence."""
    pairs = batch.num_pairs
    if batch.data == "pairs":
        own, chosen = counts, counts[:pairs]
    elif batch.data == "lists":
        own, chosen = counts, [counts[start] for start in accumulate([0, *batch["list_sizes"][:-1]])]
    else:  # without those to other prompts
        own = counts[:pairs]
        chosen = [count for count, good in zip(own, batch["desirable"].tolist(), strict=True) if good]
    return dict(zip(TARGET_KINDS, (sum(own), sum(chosen), sum(own) - sum(chosen)), strict=True))


def without_fillers(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows that are not marked as fillers; one of them where there is no other."""
    if not any(row.get(FILLER) for row in rows):
        return rows
    return [row for row in rows if not row.get(FILLER)] or rows[:1]


def last_token(sequence: PromptCompletion, pad_token_id: int) -> int:
    """The place of the token that a sequence classifier of transformers scores: the last that is not `pad_token_id`,
    also where a sequence ends with that token (as the end of the text it often is); without one, the first."""
    ids = [*sequence[0], *sequence[1]]
    return next((place for place in range(len(ids) - 1, 0, -1) if ids[place] != pad_token_id), 0)
