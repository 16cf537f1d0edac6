"""Data sets of a run: checked, tokenized, and without the rows that no token of an answer is left of."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, IterableDataset

from fastdpo.data import tokenize_row
from fastdpo.data.validate import row_problem
from fastdpo.types import DataError

logger = logging.getLogger(__name__)

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_KEPT = ("prompt_ids", "chosen_ids", "rejected_ids", *REF_COLUMNS)


def prepare_dataset(dataset: Any, tokenizer: Any, args: Any, *, name: str) -> Any:
    """Token ids of every row. `name` says in messages which data set it is.

    Raises:
        DataError: a row that cannot be used, or no row left.
    """
    if isinstance(dataset, list):
        if not dataset:
            raise DataError(f"the {name} data set is empty; it needs rows with prompt, chosen and rejected.")
        dataset = Dataset.from_list(dataset)

    def tokenize(row: dict[str, Any], number: int) -> dict[str, Any]:
        problem = row_problem({key: value for key, value in row.items() if value is not None})
        if problem is not None:
            raise DataError(f"{name} data set, row {number}: {problem}")
        return tokenize_row(row, tokenizer)

    def has_answer(row: dict[str, Any]) -> bool:
        return len(row["prompt_ids"]) < args.max_length

    options: dict[str, Any] = {"with_indices": True}
    if isinstance(dataset, Dataset):
        options |= {"num_proc": args.dataset_num_proc, "desc": f"tokenizing {name}"}
    columns = dataset.column_names
    if columns is None:  # a streamed data set learns its columns from its first row
        columns = list(next(iter(dataset)))
    dataset = dataset.map(tokenize, remove_columns=[column for column in columns if column not in _KEPT], **options)
    if args.max_length is None or args.truncation_mode != "keep_start":
        return dataset
    # keep_start would leave nothing of these rows' answers.
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
