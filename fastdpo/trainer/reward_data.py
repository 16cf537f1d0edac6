"""Data sets of a reward model: pairs of whole sequences, of which it does not matter where the answer begins."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from fastdpo.data.tokenize import tokenized
from fastdpo.data.validate import (
    REF_COLUMNS,
    TOKENIZED,
    common_prefix_length,
    data_of,
    is_tokenized,
    margin_problem,
    row_problem,
)
from fastdpo.trainer.dataset import (
    check_columns,
    columns_of,
    features_after,
    own_number,
    table_of,
    with_other_columns,
)
from fastdpo.types import DataError

logger = logging.getLogger(__name__)

KEPT = (*TOKENIZED, "pair_weight", "margin", "row_number")
_EMPTY_PROMPT: dict[bool, dict[str, Any]] = {True: {"prompt_ids": []}, False: {"prompt": ""}}  # tokenized or not
_OLDER = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}


def prepare_scored(dataset: Any, tokenizer: Any, args: Any, *, name: str) -> Any:
    """Token ids of every row whose sequences fit `max_length`: nothing is cut, for the score is that of the end.

    Rows have `chosen` and `rejected`, behind a `prompt` or whole, as text (ended by the end-of-sequence token) or as
    messages; or `chosen_ids` and `rejected_ids`, behind `prompt_ids` or whole. `margin` and `pair_weight` are kept.
    `name` says in messages which data set it is.

    Raises:
        DataError: a row that cannot be used, or no row left.
    """
    prepare = partial(_prepared_row, tokenizer=tokenizer, name=name)
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise DataError(f"the {name} data set is empty; it needs rows with chosen and rejected.")
    if isinstance(dataset, list):
        prepared = table_of([prepare(row, number) for number, row in enumerate(dataset)])
    else:
        options: dict[str, Any] = {"remove_columns": [each for each in columns_of(dataset) if each not in KEPT]}
        if isinstance(dataset, Dataset):
            features = features_after(dataset, TOKENIZED, KEPT)
            options |= {"num_proc": args.dataset_num_proc, "desc": f"tokenizing {name}", "features": features}
        else:  # a stream, of which no one can count the rows beforehand
            first: dict[str, Any] = next(iter(dataset), {})
            prepare = partial(prepare, margins=first.get("margin") is not None)
        prepared = dataset.map(prepare, with_indices=True, **options)
    if isinstance(prepared, Dataset):
        check_columns(prepared, name, "margin")
        prepared = with_other_columns(prepared, dataset, (*KEPT, *_OLDER, *REF_COLUMNS))
    return prepared if args.max_length is None else _fitting(prepared, args.max_length, name)


def _fits(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], max_length: int) -> bool:
    return len(prompt) + max(len(chosen), len(rejected)) <= max_length


def _fitting(dataset: Any, max_length: int, name: str) -> Any:
    options: dict[str, Any] = {"fn_kwargs": {"max_length": max_length}, "input_columns": list(TOKENIZED)}
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_fits, **options)
    kept = dataset.filter(_fits, desc=f"checking lengths of {name}", **options)
    if len(kept) < len(dataset):
        logger.warning(
            "%d of %d rows of the %s data set are left out: they are longer than max_length=%d.",
            len(dataset) - len(kept), len(dataset), name, max_length,
        )  # fmt: skip
    if not len(kept):
        raise DataError(
            f"no row of the {name} data set is left: all are longer than max_length={max_length}; raise max_length."
        )
    return kept


def _prepared_row(
    row: dict[str, Any], number: int, tokenizer: Any, name: str, margins: bool | None = None
) -> dict[str, Any]:
    """`margins`: whether each row must have one, or none may; None: that is seen later."""
    row = {key: value for key, value in _renamed(row).items() if value is not None}  # tables fill up with None
    number = own_number(row, number)
    where = f"{name} data set, row {number} (counted from 0)"
    problem = _problem(row)
    if problem is None and margins is not None and margins != ("margin" in row):
        has, first = ("has no", "has one") if margins else ("has a", "has none")
        problem = f"it {has} margin, and the first row {first}; add it to all rows or drop it from all."
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    whole = _is_whole(row)
    ids = tokenized({**row, **_EMPTY_PROMPT[is_tokenized(row)]} if whole else row, tokenizer, where)
    if whole:
        ids |= _parted(*(ids["prompt_ids"] + ids[side] for side in ("chosen_ids", "rejected_ids")))
    margin = {"margin": float(row["margin"])} if "margin" in row else {}
    return {**ids, **margin, "row_number": number}


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    older = [column for column in _OLDER if column in row]
    if older:
        warnings.warn(f"{older[0]} is deprecated: call it {_OLDER[older[0]]}.", FutureWarning, stacklevel=2)
    return {_OLDER.get(key, key): value for key, value in row.items()}


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether `chosen` and `rejected` are texts, or token ids, that hold the question, too."""
    return "prompt_ids" not in row if is_tokenized(row) else isinstance(row["chosen"], str) and not row.get("prompt")


def _problem(row: dict[str, Any]) -> str | None:
    """What is wrong with the row and how to mend it, or None."""
    if "image" in row or "images" in row:
        return "it has images, and batches hold tokens only; train on text."
    if data_of(row) != "pairs":
        return f"it is one of {data_of(row)}, and a reward model trains on pairs, chosen and rejected."
    if "margin" in row and (problem := margin_problem(row["margin"])):
        return problem
    if is_tokenized(row):
        return row_problem({"prompt_ids": [], **row})
    if isinstance(row.get("chosen"), str) and not row.get("prompt"):
        return row_problem({**row, "prompt": "within chosen and rejected"})
    return row_problem(row)


def _parted(chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    """What two sequences begin with as the prompt, so that what a row takes when packed is known from its lengths."""
    shared = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return {"prompt_ids": chosen[:shared], "chosen_ids": chosen[shared:], "rejected_ids": rejected[shared:]}
