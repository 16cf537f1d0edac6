"""Data sets of a run: checked, tokenized, and without the rows that no token of an answer is left of."""

from __future__ import annotations

import logging
import math
import numbers
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from fastdpo.data.tokenize import tokenized
from fastdpo.data.validate import REF_COLUMNS, row_problem
from fastdpo.models import PositionLimit
from fastdpo.types import DataError

logger = logging.getLogger(__name__)

_KEPT = ("prompt_ids", "chosen_ids", "rejected_ids", *REF_COLUMNS)


def prepare_dataset(dataset: Any, tokenizer: Any, args: Any, *, name: str) -> Any:
    """Token ids of every row. `name` says in messages which data set it is.

    Raises:
        DataError: a row that cannot be used, or no row left.
    """
    if isinstance(dataset, list):
        dataset = _from_list(dataset, tokenizer, name, progress=not args.disable_tqdm)
    else:
        dataset = _from_dataset(dataset, tokenizer, name, args.dataset_num_proc)
    if isinstance(dataset, Dataset):
        _check_references(dataset, name)
    if args.max_length is None or args.truncation_mode != "keep_start":
        return dataset

    def has_answer(row: dict[str, Any]) -> bool:
        """keep_start would leave nothing of the answers of a row whose prompt fills max_length."""
        return len(row["prompt_ids"]) < args.max_length

    if isinstance(dataset, IterableDataset):
        return dataset.filter(has_answer)
    kept = dataset.filter(has_answer, desc=f"checking lengths of {name}")
    dropped = len(dataset) - len(kept)
    if dropped:
        logger.warning(
            "%d of %d rows of the %s data set are left out: their prompt alone fills max_length=%d.",
            dropped, len(dataset), name, args.max_length,
        )  # fmt: skip
    if not len(kept):
        raise DataError(f"no row of the {name} data set is left: every prompt fills max_length={args.max_length}; "
                        "raise max_length or set truncation_mode='keep_end'.")  # fmt: skip
    return kept


def _from_list(rows: list[dict[str, Any]], tokenizer: Any, name: str, progress: bool) -> Dataset:
    """Row by row: a list may mix text, messages and columns of any kind, which a table of rows could not hold."""
    if not rows:
        raise DataError(f"the {name} data set is empty; it needs rows with prompt, chosen and rejected.")
    with tqdm(rows, desc=f"tokenizing {name}", unit="row", disable=not progress, leave=False) as bar:
        return Dataset.from_list([_tokenized(row, number, tokenizer, name) for number, row in enumerate(bar)])


def _from_dataset(dataset: Any, tokenizer: Any, name: str, num_proc: int | None) -> Any:
    if isinstance(dataset, Dataset) and not len(dataset):
        raise DataError(f"the {name} data set is empty; it needs rows with prompt, chosen and rejected.")
    columns = dataset.column_names
    if columns is None:  # a streamed data set learns its columns from its first row
        columns = list(next(iter(dataset)))
    options: dict[str, Any] = {"fn_kwargs": {"tokenizer": tokenizer, "name": name}, "with_indices": True}
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"tokenizing {name}"}
    return dataset.map(_tokenized, remove_columns=[column for column in columns if column not in _KEPT], **options)


def _tokenized(row: dict[str, Any], number: int, tokenizer: Any, name: str) -> dict[str, Any]:
    row = {key: value for key, value in row.items() if value is not None}  # tables fill missing fields with None
    where = f"{name} data set, row {number} (counted from 0)"
    problem = row_problem(row)
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    return {**tokenized(row, tokenizer, where), **_references(row, where)}


def _references(row: dict[str, Any], where: str) -> dict[str, float]:
    """The columns of reference log-probs, where the row has them."""
    given = {name: row[name] for name in REF_COLUMNS if name in row}
    if len(given) == 1:
        raise DataError(f"{where}: it has {next(iter(given))} but not the other of {', '.join(REF_COLUMNS)}; add it.")
    for name, value in given.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise DataError(f"{where}: {name!r} is {value!r}; it must be a sum of log-probs, a finite number.")
    return given


def _check_references(dataset: Dataset, name: str) -> None:
    """All rows have them, or none: a table fills what is missing with None."""
    given = [column for column in REF_COLUMNS if column in dataset.column_names]
    if not given:
        return
    tables = dataset.select_columns(given).with_format("arrow").iter(10_000)
    lacking = sum(table[column].null_count for table in tables for column in given)
    if lacking:
        raise DataError(
            f"{lacking // len(given)} of {len(dataset)} rows of the {name} data set have no {', '.join(REF_COLUMNS)}, "
            "and the others have; add them or drop the columns."
        )


def token_counts(dataset: Dataset) -> np.ndarray:
    """(rows, 3): tokens of prompt, chosen and rejected answer of each row."""
    parts = []
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        parts.append(np.stack([pc.list_value_length(table[name]).to_numpy() for name in _KEPT[:3]], axis=1))
    return np.concatenate(parts).astype(np.int64)


def cut_counts(counts: np.ndarray, max_length: int | None) -> np.ndarray:
    """What is left of `token_counts` at `max_length`."""
    if max_length is None:
        return counts
    prompt = np.minimum(counts[:, :1], max_length)
    return np.concatenate([prompt, np.minimum(counts[:, 1:], max_length - prompt)], axis=1)


def check_lengths(dataset: Any, limit: PositionLimit | None, args: Any, *, name: str) -> None:
    """Says before anything runs how many rows do not fit, and how: cut, running alone, or refused.

    Raises:
        DataError: sequences that the model has no positions for; how many rows, the longest of them, and the remedy.
    """
    if not isinstance(dataset, Dataset):
        return
    whole = token_counts(dataset)
    counts = cut_counts(whole, args.max_length)
    cut = int((whole != counts).any(1).sum())
    if cut:
        logger.warning(
            "%d of %d rows of the %s data set are longer than max_length=%d and are cut (truncation_mode=%r).",
            cut, len(whole), name, args.max_length, args.truncation_mode,
        )  # fmt: skip
    budget = args.max_tokens_per_microbatch
    if budget is not None and (alone := int((counts.sum(1) > budget).sum())):
        logger.warning(
            "%d of %d rows of the %s data set run alone: they take more tokens (up to %d) than "
            "max_tokens_per_microbatch=%d.",
            alone, len(whole), name, counts.sum(1).max(), budget,
        )  # fmt: skip
    longest = counts[:, 0] + counts[:, 1:].max(1)
    too_long = 0 if limit is None else int((longest > limit.tokens).sum())
    if limit is not None and too_long:
        row = int(longest.argmax())
        raise DataError(
            f"{too_long} of {len(longest)} rows of the {name} data set do not fit: the model has {limit.why}, and the "
            f"longest row, number {row} (counted from 0), has {longest[row]} tokens; set max_length={limit.tokens} to "
            "cut them, or leave them out."
        )
