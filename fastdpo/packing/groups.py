"""What the rows of a batch are: pairs, ranked lists or single answers, and which sequences each stands for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdpo.data.validate import ID_COLUMNS, MISMATCHED, REF_MISMATCHED, REFERENCES, data_of, ranks_problem

Row = Mapping[str, Any]
PromptCompletion = tuple[Sequence[int], Sequence[int]]  # (prompt, completion)
WEIGHT, MARGIN = "pair_weight", "margin"
FILLER = "filler"  # marks rows that only make the batches of several processes alike in size


@dataclass(frozen=True)
class Grouping:
    """The sequences of a batch, group by group: of pairs (chosen, rejected), of lists from best to worst.

    data         "pairs", "lists" or "answers"
    groups       of each row its (prompt, completion) sequences
    mismatched   of answers: the same prompts, each with the answer to another; else empty
    """

    data: str
    groups: tuple[tuple[PromptCompletion, ...], ...]
    mismatched: tuple[PromptCompletion, ...] = ()

    @property
    def sequences(self) -> list[PromptCompletion]:
        return [sequence for group in self.groups for sequence in group] + list(self.mismatched)

    def ids(self) -> np.ndarray:
        """The number that each of `sequences` has in the batch: of pairs, all chosen come first."""
        numbers_ = np.arange(len(self.sequences))
        return numbers_ if self.data != "pairs" else numbers_ // 2 + len(self.groups) * (numbers_ % 2)

    def tokens_per_group(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Targets of each group, from those of each of `sequences`; without the mismatched."""
        totals, start = [], 0
        for group in self.groups:
            totals.append(sum(counts[start : start + len(group)]))
            start += len(group)
        return tuple(totals)


def kind_of_rows(rows: Sequence[Row]) -> str:
    """ "pairs", "lists" or "answers".

    Raises:
        ValueError: rows of several kinds, or rows that lack token ids; the message numbers the row.
    """
    kinds = [data_of(row) for row in rows]
    for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        if kind != kinds[0]:
            raise ValueError(f"row 0 of the batch is of {kinds[0]} and row {number} of {kind}; a batch holds one kind.")
        for name in (*ID_COLUMNS[kind], *([MISMATCHED] if row.get(MISMATCHED) is not None else [])):
            ids = row.get(name)
            if ids is None:
                raise ValueError(
                    f"row {number} of the batch has no {name}; the collator takes tokenized rows (see fastdpo.data)."
                )
            several = name == "completions_ids"
            if not (_is_list(ids) and (not several or all(map(_is_list, ids)))):
                what = "a list of lists" if several else "a list"
                raise ValueError(f"row {number} of the batch: {name} is {ids!r}; it must be {what} of token ids.")
    return kinds[0]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray | torch.Tensor)


def completions_of(row: Row) -> list[Sequence[int]]:
    """The completions that a row of token ids stands for, in the order in which they stand there.

    Of a single answer with `KL_completion_ids` those come second.
    """
    data = data_of(row)
    if data == "lists":
        return list(row["completions_ids"])
    names = ("completion_ids", MISMATCHED) if data == "answers" else ("chosen_ids", "rejected_ids")
    return [row[name] for name in names if row.get(name) is not None]


def best_first(row: Row) -> list[int]:
    """The places of the completions of a ranked list, from best to worst; without ranks, as they come.

    Raises:
        ValueError: ranks that do not rank the completions, or fewer than two of them.
    """
    count = len(row["completions_ids"])
    ranks = row.get("ranks")
    problem = ranks_problem(count, ranks)
    if problem is not None:
        raise ValueError(problem)
    return list(range(count)) if ranks is None else sorted(range(count), key=list(ranks).__getitem__)


def mismatched_completions(rows: Sequence[Row]) -> list[Sequence[int]]:
    """For each prompt the answer to another: the row's own `KL_completion_ids`, or the answer of the row before.

    Raises:
        ValueError: a single row without one.
    """
    given = [row.get(MISMATCHED) is not None for row in rows]
    if all(given):
        return [row[MISMATCHED] for row in rows]
    if any(given):
        raise ValueError(f"row {given.index(False)} of the batch has no {MISMATCHED}, and others have; add or drop it.")
    if len(rows) == 1:
        raise ValueError(
            "the batch holds a single row, and the KL estimate needs the answer to another prompt: take batches of "
            f"two rows or more (drop_last=True), give {MISMATCHED}, or set mismatched=False for a loss without it."
        )
    return [rows[number - 1]["completion_ids"] for number in range(len(rows))]


def references(rows: Sequence[Row], data: str, mismatched: bool) -> torch.Tensor | None:
    """The sums of the reference that the rows carry, in the order of a batch's sequences; None where they have none.

    Raises:
        ValueError: some have them and others not, or a value that is no finite number.
    """
    names = (*REFERENCES[data], REF_MISMATCHED) if mismatched else REFERENCES[data]
    given = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not given or given == [REF_MISMATCHED]:
        if given:
            raise ValueError(f"the rows have {REF_MISMATCHED} but no {REFERENCES[data][0]}; add it.")
        return None
    if data == "pairs" and len(given) < len(names):
        raise ValueError(f"the rows have {given[0]} but not the other one of {', '.join(names)}.")
    values: list[float] = []
    for name in given:
        for number, row in enumerate(rows):
            if row.get(name) is None:
                raise ValueError(f"row {number} of the batch has no {name}, and others have; add or drop it.")
            own = [row[name]] if data != "lists" else _ranked(row, name, number)
            values += [_finite(value, name, number) for value in own]
    return torch.tensor(values, dtype=torch.float32)


def weights(rows: Sequence[Row]) -> list[float] | None:
    """The column `pair_weight` of the rows; 1 where a row has none and others have.

    Raises:
        ValueError: a weight that is below 0 or no finite number.
    """
    given = [row.get(WEIGHT) for row in rows]
    if all(weight is None for weight in given):
        return None
    values = [1.0 if weight is None else _finite(weight, WEIGHT, number) for number, weight in enumerate(given)]
    if min(values) < 0:
        raise ValueError(f"row {values.index(min(values))} of the batch has the pair_weight {min(values)}, below 0.")
    return values


def margins(rows: Sequence[Row]) -> torch.Tensor | None:
    """The column `margin` of the rows, (B,): by how much a reward model should score chosen above rejected.

    Raises:
        ValueError: some rows have one and others not, or a margin that is no finite number.
    """
    given = [row.get(MARGIN) is not None for row in rows]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(f"row {given.index(False)} of the batch has no {MARGIN}, and others have; add or drop it.")
    return torch.tensor([_finite(row[MARGIN], MARGIN, number) for number, row in enumerate(rows)])


def desirable(rows: Sequence[Row]) -> torch.Tensor:
    """The column `label` of single answers, (B,) bool.

    Raises:
        ValueError: a label that is neither True nor False.
    """
    for number, row in enumerate(rows):
        if not isinstance(row.get("label"), bool | np.bool_):
            raise ValueError(
                f"row {number} of the batch has the label {row.get('label')!r}; it must be True (desirable) or False."
            )
    return torch.tensor([bool(row["label"]) for row in rows])


def _ranked(row: Row, name: str, number: int) -> list[Any]:
    if not _is_list(row[name]):
        raise ValueError(
            f"row {number} of the batch: {name} is {row[name]!r}; it must be a list, one sum a completion."
        )
    values = list(row[name])
    if len(values) != len(row["completions_ids"]):
        raise ValueError(
            f"row {number} of the batch has {len(values)} {name} and {len(row['completions_ids'])} completions."
        )
    return [values[place] for place in best_first(row)]


def _finite(value: Any, name: str, number: int) -> float:
    if not isinstance(value, numbers.Real | torch.Tensor) or not math.isfinite(float(value)):
        raise ValueError(f"row {number} of the batch: {name} is {value!r}; it must be a finite number.")
    return float(value)
